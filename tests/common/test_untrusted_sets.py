"""Image sets and .npz files from strangers: linear time, one line of error, nothing for a terminal.

Archives are damaged byte by byte here, at places that the zip format's description gives.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erk_guid.common import datasets
from erk_guid.common.datasets import DatasetError, load_image_set, open_images
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.npz import NpzError, read_npz
from erk_guid.metrics.scoring import names_of, tell_ignored

NASTY = "a\x1b[31m\n\u202eb"
"""An escape of terminals, a new line, and a mark that turns the direction of writing."""


def png(side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 7).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def patched(path: Path, place: int, value: bytes, local: int | None = None) -> Path:
    """Overwrite bytes of the first entry of the directory and, if `local`, of its own header."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + place : entry + place + len(value)] = value
    if local is not None:
        data[local : local + len(value)] = value
    path.write_bytes(data)
    return path


def one_line(found: pytest.ExceptionInfo[Any]) -> str:
    message = str(found.value)
    assert message.isprintable(), ascii(message)
    assert len(message) < 1000
    return message


# --- time -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_found_in_linear_time(tmp_path: Path) -> None:
    # Catches: a search through all names for each name (60,000 names took minutes).
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for k in range(60_000):
            archive.writestr(f"{k}.png", b"")
        archive.writestr("59999.png", b"")
    begun = time.monotonic()
    with pytest.raises(DatasetError, match=r"59999\.png more than once"):
        open_images(tmp_path / "a.zip")
    assert time.monotonic() - begun < 20


def test_labels_of_many_files_take_linear_time() -> None:
    # Catches: a look through the table, or through the folders, for each image.
    names = [f"{k % 20_000}/{k}.png" for k in range(60_000)]
    table = json.dumps({"labels": [[name, 3] for name in reversed(names)]}).encode()
    for more in ([], ["dataset.json"]):
        begun = time.monotonic()
        source = datasets._listed(Path("a.zip"), [*names, *more], lambda name: table)
        labels = datasets._labels(source)
        assert time.monotonic() - begun < 20
        assert len(labels) == 60_000
        assert set(labels) == ({3} if more else set(range(20_000)))


# --- zips of images -------------------------------------------------------------------------


def test_names_that_lead_out_of_a_zip_are_told(tmp_path: Path) -> None:
    # Catches: half of a set passed over in silence.
    source = open_images(zipped(tmp_path / "a.zip", {"0.png": png(), "../1.png": png()}))
    assert source.names == ["0.png"]
    assert source.ignored == ["../1.png"]
    with pytest.raises(
        DatasetError, match=r"no images in .* among 1 files \(such as \.\./1\.png\)"
    ):
        open_images(zipped(tmp_path / "b.zip", {"../1.png": png()}))


def encrypted(path: Path, name: str = "0.png") -> Path:
    return patched(zipped(path, {name: png()}), 8, b"\x01\x00", local=6)


def of_method(number: int) -> Callable[..., Path]:
    def make(path: Path, name: str = "0.png") -> Path:
        method = struct.pack("<H", number)
        return patched(zipped(path, {name: png()}), 10, method, local=8)

    return make


def of_version(path: Path) -> Path:
    return patched(zipped(path, {"0.png": png()}), 6, struct.pack("<H", 999))


def bad_unicode(path: Path) -> Path:
    zipped(path, {"\xe9.png": png()})
    path.write_bytes(path.read_bytes().replace("\xe9".encode(), b"\xff\xff"))
    return path


def damaged_data(path: Path, name: str = "0.png") -> Path:
    zipped(path, {name: png() + bytes(range(200))})
    data = bytearray(path.read_bytes())
    data[50:95] = b"\xff" * 45
    path.write_bytes(data)
    return path


def damaged_extra(path: Path) -> Path:
    """A zip64 field that is shorter than its own length says."""
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("0.png")
        info.extra = struct.pack("<HHI", 1, 4, 0)
        archive.writestr(info, png())
    return patched(path, 24, b"\xff" * 4)


def wrong_local_header(path: Path) -> Path:
    return patched(zipped(path, {"0.png": png()}), 46, b"1.png")


def lying_size(path: Path) -> Path:
    """A member that says 10 bytes, and holds 10 GB behind them if all of it is unpacked."""
    return patched(zipped(path, {"0.png": png() * 50}, zipfile.ZIP_BZIP2), 24, struct.pack("<I", 9))


def overlapping(path: Path) -> Path:
    """The packed size of one member reaches beyond the file."""
    return patched(zipped(path, {"0.png": png()}), 20, struct.pack("<I", 1 << 30))


MAKERS: tuple[tuple[Callable[..., Path], str], ...] = (
    (encrypted, "0.png is encrypted; pack it again"),
    (of_method(12), "0.png is packed by the method 12"),
    (of_method(14), "0.png is packed by the method 14"),
    (of_method(99), "0.png is packed by the method 99"),
    (of_version, "cannot read "),
    (bad_unicode, "cannot read "),
    (damaged_data, "cannot read the image 0.png"),
    (damaged_extra, "cannot read "),
    (wrong_local_header, "cannot read the image 1.png"),
    (lying_size, "0.png is packed by the method 12"),
    (overlapping, "overlap or are cut short"),
)


@pytest.mark.parametrize(("make", "message"), MAKERS)
def test_a_damaged_zip_is_one_line_of_error(
    make: Callable[..., Path], message: str, tmp_path: Path
) -> None:
    # Catches: NotImplementedError, RuntimeError, UnicodeDecodeError, zlib.error, struct.error.
    path = make(tmp_path / "a.zip")
    with pytest.raises(DatasetError) as found:
        load_image_set(path)
    assert str(path) in one_line(found)
    assert message in one_line(found)


@pytest.mark.parametrize(
    "make", [encrypted, of_method(12), of_method(14), of_method(99), damaged_data]
)
def test_a_damaged_table_of_labels_is_one_line_of_error(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    # Catches: only an image's errors being reported, not those of dataset.json.
    path = make(tmp_path / "a.zip", "dataset.json")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("0.png", png())
    with pytest.raises(DatasetError, match=r"dataset\.json is") as found:
        load_image_set(path)
    assert str(path) in one_line(found)


def test_no_more_is_unpacked_than_a_member_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: read() without a number, which unpacks all before it cuts off what is too much.
    path = zipped(tmp_path / "a.zip", {"0.png": bytes(1 << 27)})
    patched(path, 24, struct.pack("<I", 100), local=22)
    asked: list[int | None] = []
    real = zipfile.ZipExtFile._read1  # type: ignore[attr-defined]

    def counted(self: Any, n: int) -> Any:
        asked.append(n)
        return real(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", counted)
    with pytest.raises(DatasetError, match=r"cannot read the image 0\.png"):
        open_images(path).read(0)
    assert max(n or 1 << 62 for n in asked) <= 4096


# --- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["folder", "zip"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"{", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 200_000, "is damaged"),
        (b'{"labels": ' + b"[" * 200_000, "is damaged"),
        (b'{"labels": 5}', "must hold"),
        (b'{"labels": {"0.png": 1}}', "must hold"),
        (b'{"labels": [["0.png", 1, 2]]}', "must hold"),
        (b'{"labels": [[0, 1]]}', "must hold"),
        (b'{"labels": [["0.png", NaN]]}', "no whole number"),
        (b'{"labels": [["0.png", true]]}', "no whole number"),
        (b'{"labels": [["0.png", 1.5]]}', "no whole number"),
        (b'{"labels": [["0.png", "1"]]}', "no whole number"),
        (b'{"labels": [["0.png", -1]]}', "no whole number"),
        (b'{"labels": [["0.png", 9223372036854775808]]}', "no whole number"),
        (b'{"labels": [["0.png", ' + b"9" * 5000 + b"]]}", ""),
        (b'{"labels": [["0.png", 1], ["0.png", 2]]}', "gives 0.png two classes"),
        (json.dumps({"labels": [[NASTY, -1]]}).encode(), "no whole number"),
        (json.dumps({"labels": [["x", 1]]}).encode(), "no label for 0.png"),
    ],
)
def test_labels_that_are_none(container: str, table: bytes, message: str, tmp_path: Path) -> None:
    # Catches: true taken for class 1, 1.5 for 1, an overflow that wraps, a traceback.
    files = {"0.png": png(), "dataset.json": table}
    path = tmp_path / "a.zip"
    if container == "zip":
        zipped(path, files)
    else:
        path = tmp_path / "set"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    with pytest.raises(DatasetError) as found:
        load_image_set(path)
    assert message in one_line(found)
    assert "dataset.json" in one_line(found)


def test_the_largest_label_is_kept(tmp_path: Path) -> None:
    # The bound is that of int64, which labels are kept in.
    table = json.dumps({"labels": [["0.png", 2**63 - 1]]}).encode()
    path = zipped(tmp_path / "a.zip", {"0.png": png(), "dataset.json": table})
    assert load_image_set(path).labels.tolist() == [np.iinfo(np.int64).max]


@pytest.mark.parametrize("labels", [np.array([-1]), np.array([2**63], dtype=np.uint64)])
def test_labels_of_an_npz_that_are_none(labels: np.ndarray, tmp_path: Path) -> None:
    # Catches: a uint64 that wraps to a negative class.
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 1, 4, 4), np.uint8), labels=labels)
    with pytest.raises(DatasetError, match="must be whole numbers from 0"):
        load_image_set(tmp_path / "a.npz")


@pytest.mark.parametrize("container", ["folder", "zip"])
@pytest.mark.parametrize("name", ["0.png", "dataset.json"])
def test_a_file_that_is_too_large_is_not_read(
    container: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a sparse file of terabytes, or a bomb in the place of the labels.
    monkeypatch.setattr(datasets, "MAX_BYTES", 1000)
    table = json.dumps({"labels": [["0.png", 1], ["1.png", 1]]}).encode()
    files = {"0.png": png(), "1.png": png(), "dataset.json": table, name: bytes(1001)}
    path = tmp_path / "a.zip"
    if container == "zip":
        zipped(path, files)
    else:
        path = tmp_path / "set"
        path.mkdir()
        for one, data in files.items():
            (path / one).write_bytes(data)
    with pytest.raises(DatasetError, match=r"larger than 1,000|would unpack to 1,001") as found:
        load_image_set(path)
    assert name in one_line(found)


# --- folders --------------------------------------------------------------------------------


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    # Catches: a loop of links that ends in a traceback, or an image that is missing in silence.
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "1.png").symlink_to(tmp_path / "1.png")
    source = open_images(tmp_path)
    with pytest.raises(DatasetError, match=r"1\.png is no file, or a link that leads nowhere"):
        source.read(1)
    # Catches: "remove it", said of an image that somebody has just removed.
    (tmp_path / "0.png").unlink()
    with pytest.raises(DatasetError, match=r"0\.png was removed while the folder was read"):
        source.read(0)
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DatasetError, match="no such folder"):
        open_images(tmp_path / "loop")
    # Nor is a link for labels taken for "no labels", or a pipe waited for.
    (tmp_path / "1.png").unlink()
    (tmp_path / "dataset.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"dataset\.json is no file"):
        load_image_set(tmp_path)
    (tmp_path / "dataset.json").unlink()
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(DatasetError, match=r"dataset\.json is no file"):
        load_image_set(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: scoring without the images of a folder that may not be looked into.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png())
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if os.fspath(path).endswith("b"):  # root may read all, so the system would not refuse
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match="Permission denied") as found:
        open_images(tmp_path)
    assert str(tmp_path / "b") in one_line(found)


# --- names ----------------------------------------------------------------------------------


def test_what_printable_replaces() -> None:
    # The marks of direction are those of Unicode's "Trojan Source" report (TR 36, TR 39).
    directions = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    for c in (
        *directions,
        "\x1b",
        "\x9b",
        "\n",
        "\r",
        "\u2028",
        "\u2029",
        "\x7f",
        "\udcff",
        "\ud800",
    ):
        assert printable(f"a{c}b") == "a?b", ascii(c)
    assert printable("Größe 大 é") == "Größe 大 é"


@pytest.mark.parametrize("container", ["folder", "zip"])
def test_names_do_not_reach_the_terminal(
    container: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Catches: a name that clears the screen, or writes a line of its own.
    files = {
        f"{NASTY}.png": b"no image", f"{NASTY}2.png": png(), f"{NASTY}3.png": png(5),
        f"{NASTY}.txt": b"",
    }  # fmt: skip
    path = tmp_path / "a.zip"
    if container == "zip":
        zipped(path, files)
    else:
        path = tmp_path / "set"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    source = open_images(path)
    with pytest.raises(DatasetError) as found:
        source.read(source.names.index(f"{NASTY}.png"))
    assert "it is no image" in one_line(found)
    with pytest.raises(DatasetError) as found:
        source.read(source.names.index(f"{NASTY}3.png"), (4, 4))
    assert "all images must have one size" in one_line(found)
    tell_ignored(path)
    note = capsys.readouterr().err
    assert note.endswith("\n")
    assert note[:-1].isprintable(), ascii(note)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_errors_about_a_whole_set_are_printable(tmp_path: Path) -> None:
    # Catches: the names that are quoted where no image is read.
    zipped(tmp_path / "a.zip", {f"{NASTY}.txt": b""})
    with pytest.raises(DatasetError, match="no images in") as found:
        open_images(tmp_path / "a.zip")
    one_line(found)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(f"{NASTY}.png", b"")
        archive.writestr(f"{NASTY}.png", b"")
    with pytest.raises(DatasetError, match="more than once") as found:
        open_images(tmp_path / "b.zip")
    one_line(found)
    table = json.dumps({"labels": [["x", 1]]}).encode()
    zipped(tmp_path / "c.zip", {f"{NASTY}.png": png(), "dataset.json": table})
    with pytest.raises(DatasetError, match="has no label for") as found:
        load_image_set(tmp_path / "c.zip")
    one_line(found)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are no UTF-8")
def test_a_name_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Catches: UnicodeEncodeError in the digest of names, or where one is printed.
    for name in (b"\xff.png", b"\xfe.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(png())
    source = open_images(tmp_path)
    assert source.read(0).shape == (1, 4, 4)
    assert len(names_of(source, [0])["sha256"]) == 64
    tell_ignored(tmp_path)
    assert capsys.readouterr().err.endswith("passed over ?.txt, not an image\n")
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png")).write_bytes(b"no image")
    with pytest.raises(DatasetError) as found:
        source.read(0)
    one_line(found).encode()


def test_the_digest_of_usual_names_has_not_changed(tmp_path: Path) -> None:
    import hashlib

    for name in ("a.png", "ü.png"):
        (tmp_path / name).write_bytes(png())
    digest = hashlib.sha256("a.png\nü.png".encode()).hexdigest()
    assert names_of(open_images(tmp_path), [0, 1])["sha256"] == digest


# --- npz ------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode("latin1")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("mu.npy", b"", "mu.npy"),
        ("mu.npy", b"\x93NUMPY", "mu.npy"),
        ("mu.npy", header("("), "mu.npy"),
        ("mu.npy", header("(" * 9000), "mu.npy"),
        ("mu.npy", header("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}"), "mu.npy"),
        ("mu.npy", header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**80},)}}"),
         "mu.npy declares more"),
        ("mu.npy", header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (0, {2**80})}}"),
         "mu.npy"),
        ("mu.npy", header("{'descr': [('\x1b', '<f8')], 'fortran_order': False, 'shape': (1,)}"),
         "mu.npy holds"),
        ("mu.npy", npy(np.zeros(3))[:-1], "mu.npy"),
        (f"{NASTY}/mu.npy", npy(np.zeros(3)), "is no name of an array"),
    ],
)  # fmt: skip
def test_a_damaged_array_is_one_line_that_names_it(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    # Catches: a message without the member's name, or with what a terminal obeys.
    path = zipped(tmp_path / "a.npz", {name: data})
    with pytest.raises(NpzError) as found:
        read_npz(path, lambda name: "f" if name.endswith("mu") else None)
    assert str(path) in one_line(found)
    assert message in one_line(found)


@pytest.mark.parametrize(("make", "message"), MAKERS)
def test_a_damaged_npz_is_one_line_of_error(
    make: Callable[..., Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "a.npz")
    with pytest.raises(NpzError) as found:
        read_npz(path, lambda name: "f")
    assert str(path) in one_line(found)
    for read in (open_images, load_image_set):
        path.write_bytes(make(tmp_path / "b.npz").read_bytes())
        with pytest.raises(DatasetError) as again:
            read(path)
        one_line(again)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_arrays_under_one_name_are_refused(tmp_path: Path) -> None:
    # Catches: the last of two being taken, and all of many being unpacked.
    for second in ("mu.npy", "mu"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("mu.npy", npy(np.zeros(3)))
            archive.writestr(second, npy(np.ones(3)))
        with pytest.raises(NpzError, match=r"mu(\.npy)? more than once"):
            read_npz(tmp_path / "a.npz", lambda name: "f")


def test_a_bomb_of_many_arrays_is_refused(tmp_path: Path) -> None:
    # Catches: a bound for each array alone, which a thousand small bombs together pass.
    array = npy(np.zeros(6_000_000))  # 48 MB
    zipped(tmp_path / "a.npz", {f"{k}/mu.npy": array for k in range(3)})
    with pytest.raises(NpzError, match=r"1/mu\.npy would unpack to"):
        read_npz(tmp_path / "a.npz", lambda name: "f")
    assert len(read_npz(tmp_path / "a.npz", lambda name: "f" if name == "0/mu" else None)) == 1


def test_a_header_is_not_unpacked_before_its_size_is_checked(tmp_path: Path) -> None:
    # Catches: gigabytes of header, which NumPy reads before it finds them too long.
    text = header(" " * (1 << 27), b"\x02\x00")
    path = zipped(tmp_path / "a.npz", {"mu.npy": text})
    with pytest.raises(NpzError, match=r"mu\.npy would unpack to"):
        read_npz(path, lambda name: "f")


# --- outputs among inputs -------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "00").mkdir(parents=True)
    (folder / "00" / "0.png").write_bytes(png())
    (folder / "run.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "name",
    ["run.json", "dataset.json", "00/0.png", "00/new.png", "new.JPG", "./a/../new.png",
     "00/../run.json"],
)  # fmt: skip
def test_an_output_is_no_file_of_the_images(name: str, images: Path, tmp_path: Path) -> None:
    # Catches: a run's record replaced by scores, and a plot that is scored next time.
    refuse = datasets.refuse_overwriting
    with pytest.raises(ErkGuidError, match=r"--json .* would be taken for a file of the images"):
        refuse({"--json": images / name}, [images])
    with pytest.raises(ErkGuidError, match="would be taken"):
        refuse({"--json": Path(f"{images}/../images/{name}")}, [str(images)])
    (tmp_path / "link").symlink_to(images)
    for output, source in ((tmp_path / "link" / name, images), (images / name, tmp_path / "link")):
        with pytest.raises(ErkGuidError, match="would be taken"):
            refuse({"--json": output}, [source])
    refuse({"--json": images / "scores.json", "--features": images / "f.npz"}, [images])
    refuse({"--json": tmp_path / Path(name).name}, [images])


def test_an_output_is_no_input_by_another_name(images: Path, tmp_path: Path) -> None:
    # Catches: links, in the folder or beside it, and hard links.
    refuse = datasets.refuse_overwriting
    (tmp_path / "real").write_bytes(png())
    (images / "1.png").symlink_to(tmp_path / "real")
    with pytest.raises(ErkGuidError, match="is a file of the images"):
        refuse({"--json": tmp_path / "real"}, [images])
    (tmp_path / "out.json").symlink_to(images / "2.png")
    with pytest.raises(ErkGuidError, match="would be taken"):
        refuse({"--json": tmp_path / "out.json"}, [images])
    (tmp_path / "ref.npz").write_bytes(b"")
    os.link(tmp_path / "ref.npz", tmp_path / "hard.npz")
    (tmp_path / "soft.npz").symlink_to("ref.npz")
    for name in ("ref.npz", "hard.npz", "soft.npz", "images/../ref.npz"):
        with pytest.raises(ErkGuidError, match="is an input; write to another file"):
            refuse({"--features": tmp_path / name}, [tmp_path / "ref.npz"])


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    # Catches: the second output over the first, after hours of work.
    refuse = datasets.refuse_overwriting
    one = tmp_path / "a.npz"
    (tmp_path / "link.npz").symlink_to(one)
    for other in (one, tmp_path / "x" / ".." / "a.npz", tmp_path / "link.npz"):
        with pytest.raises(ErkGuidError, match="--json and --features are one file"):
            refuse({"--json": one, "--features": other}, [])
    refuse({"--json": one, "--features": None}, ["digits", "https://example.org/x", "", "y" * 999])
    refuse({"--json": Path("/dev/null"), "--features": Path("/dev/null")}, [])
