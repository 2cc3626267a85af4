"""Places that cannot be written to are one line, before anything is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import (
    JSON_START,
    NPZ_START,
    PICTURE_START,
    check_folder,
    check_writable,
    user_path,
)
from erk_guid.common.pictures import save_picture
from erk_guid.common.plots import Curve, draw
from erk_guid.generation.trace import BEGINS, ROW, write_trace
from erk_guid.metrics.scoring import versions, write_json

LONG = "a" * 400
DEEP = "/".join(["folder"] * 700)


@pytest.mark.parametrize("name", [LONG, f"{LONG}.png", DEEP, f"{DEEP}/scores.json"])
def test_names_that_no_system_takes(name: str, tmp_path: Path) -> None:
    # Catches: a traceback of OSError from Path.is_dir, or from a look at the file itself that
    # comes hours later, when its folder was all that was tried.
    for check in (check_writable, check_folder):
        with pytest.raises(ErkGuidError, match="File name too long; ") as caught:
            check(tmp_path / name)
        assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


def test_a_folder_is_looked_at_and_not_made(tmp_path: Path) -> None:
    # Catches: a dry run that leaves folders behind; a file taken for a folder.
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for below in ("", "x", "x/y"):
        with pytest.raises(ErkGuidError, match="Not a directory; choose another folder"):
            check_folder(tmp_path / "file" / below)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: permission denied after the first row. (The system asks no questions of root.)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ErkGuidError, match="Permission denied"):
        check_folder(tmp_path / "new")


def test_homes_that_are_none() -> None:
    # Catches: a RuntimeError of pathlib; an error without a remedy.
    with pytest.raises(ErkGuidError, match="home directory; write the path in full"):
        user_path("~no-such-user-here/x")


@pytest.mark.parametrize("begins", [JSON_START, NPZ_START, PICTURE_START, BEGINS])
def test_a_file_of_another_kind_is_not_replaced(begins: tuple[bytes, ...], tmp_path: Path) -> None:
    # Catches: --trace=notes.csv and --json=notes.txt, which replaced somebody's notes.
    path = tmp_path / "notes.csv"
    path.write_text("name,age\n")
    with pytest.raises(ErkGuidError, match="is no earlier output of this kind"):
        check_writable(path, begins)
    assert path.read_text() == "name,age\n"
    for start in (b"", *begins):  # an empty file holds nothing that could be lost
        path.write_bytes(start + b" erk_guid\n"[: 99 * len(start)])
        check_writable(path, begins)
    path.write_text("{}")
    with pytest.raises(ErkGuidError, match="is no earlier output of this kind"):
        check_writable(path, begins)


def test_outputs_may_be_written_again(tmp_path: Path) -> None:
    # Catches: a kind whose files do not begin as it says; then no run could be repeated.
    rows = np.zeros(2, ROW)
    for name, begins in (("t.csv", BEGINS), ("t.npz", BEGINS)):
        write_trace(tmp_path / name, rows)
        check_writable(tmp_path / name, begins)
    write_json(tmp_path / "s.json", {"fid": 1.0, "names": ["n"] * 1000, "versions": versions()})
    check_writable(tmp_path / "s.json", JSON_START)
    for name in ("x.png", "x.jpg"):
        save_picture(tmp_path / name, Image.new("L", (4, 4)))
        check_writable(tmp_path / name, PICTURE_START)
    plot = draw("a plot", [Curve("a", [1, 2], [1, 2], [0, 0])], "x", "y")
    (tmp_path / "x.svg").write_bytes(plot)
    check_writable(tmp_path / "x.svg")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.svg", "x.html", "x.md"])
def test_a_picture_from_elsewhere_is_not_replaced(name: str, tmp_path: Path) -> None:
    # Catches: --grid=photo.png, which replaced somebody's photo.
    path = tmp_path / name
    if path.suffix in (".png", ".jpg"):
        Image.new("L", (4, 4)).save(path)
    else:
        texts = {".html": "<!DOCTYPE html>\n", ".svg": "<svg></svg>", ".md": "# My notes\n"}
        path.write_text(texts[path.suffix])
    before = path.read_bytes()
    with pytest.raises(ErkGuidError, match="is no earlier output of this kind"):
        check_writable(path)
    assert path.read_bytes() == before


def test_a_name_that_leaves_no_room_for_the_temporary_one(tmp_path: Path) -> None:
    # It failed when the images were made, and not before.
    path = tmp_path / ("n" * 245 + ".csv")
    path.write_text("seed")
    with pytest.raises(ErkGuidError, match="File name too long"):
        check_writable(path, [b"seed"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
