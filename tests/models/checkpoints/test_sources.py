"""Names of networks behind which there is none, files that cannot be written, foreign code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from erk_guid.cli import main
from erk_guid.common.errors import CheckpointError, ErkGuidError
from erk_guid.models.checkpoints import convert, loading
from erk_guid.models.checkpoints.loading import check_source, locate

LONG = "a" * 400
DEEP = "/".join(["folder"] * 700)


@pytest.mark.parametrize(
    "name",
    [LONG, f"./{LONG}.pkl", f"uncond:{LONG}", f"/{LONG}/{LONG}", f"./{DEEP}", f"{DEEP}/x.pkl"],
)
def test_names_that_no_system_takes(name: str) -> None:
    # Catches: a traceback of OSError; a message whose end, which helps, is cut off with the name.
    for look in (locate, check_source):
        with pytest.raises(ErkGuidError, match=r"is no file, no URL and no preset") as caught:
            look(name)
        assert len(str(caught.value)) < 350


def test_a_home_that_is_none() -> None:
    # Catches: the RuntimeError of pathlib.
    for look in (locate, check_source):
        with pytest.raises(ErkGuidError, match="home directory; write the path in full"):
            look("~no-such-user-here/net.pkl")


def test_checking_a_source_fetches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Catches: a check that downloads; one that refuses what only a download can tell.
    for name in ("download", "fetch_from_hub"):
        monkeypatch.setattr(loading, name, lambda *a, **k: pytest.fail("fetched"))
    (tmp_path / "net.pkl").write_bytes(b"anything")
    for source in (
        "digits", "uncond:digits", "edm2-img512-xs-fid", "https://example.invalid/x.pkl",
        "owner/name/folder@main", str(tmp_path / "net.pkl"),
    ):  # fmt: skip
        check_source(source)
    for source in ("/nonexistent", "nonexistent.pkl", "uncond:nonexistent", "./owner/name"):
        with pytest.raises(ErkGuidError, match="is no file, no URL and no preset"):
            check_source(source)


@pytest.mark.parametrize(
    ("dest", "message"),
    [
        ("file/x.safetensors", "Not a directory; write elsewhere"),
        (f"{LONG}.safetensors", "File name too long; write elsewhere"),
        (f"{DEEP}/x.safetensors", "File name too long; write elsewhere"),
        ("digits.safetensors", "DEST .* is an input; write to another file"),
        ("link.safetensors", "DEST .* is an input; write to another file"),
    ],
)
def test_places_that_nothing_is_converted_to(dest: str, message: str, tmp_path: Path) -> None:
    # Catches: a traceback; the only copy of a network replaced by its conversion.
    source = tmp_path / "digits.safetensors"
    source.write_bytes(locate("digits").read_bytes())
    (tmp_path / "file").write_text("")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = [source.stat().st_ino, source.stat().st_mtime_ns]  # reading it changes its atime
    with pytest.raises(ErkGuidError, match=message):
        convert(source, tmp_path / dest, overwrite=True)
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / dest), "--overwrite"])
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert [source.stat().st_ino, source.stat().st_mtime_ns] == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where nothing can be made")
def test_a_folder_where_not_even_root_may_write() -> None:
    # Catches: SafetensorError, which is no OSError.
    done = CliRunner().invoke(main, ["convert", "digits", "/proc/x.safetensors"])
    assert done.exit_code == 1
    assert "cannot write to /proc" in done.output


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: the same, where the folder seemed good.
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(loading, "save_network", full)
    with pytest.raises(ErkGuidError, match="No space left on device; write elsewhere"):
        convert("digits", tmp_path / "x.safetensors")


def test_an_empty_destination() -> None:
    # Catches: an empty name taken for the current folder.
    done = CliRunner().invoke(main, ["convert", "digits", ""])
    assert done.exit_code == 2
    assert "it is empty" in done.output


class Foreign(torch.nn.Module):
    img_channels, img_resolution, label_dim = 1, 4, 0

    def __init__(self, returns: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.returns = returns
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: object = None) -> Any:
        return self.returns(x)


def raising(error: Exception) -> Callable[[torch.Tensor], Any]:
    def fail(x: torch.Tensor) -> Any:
        raise error

    return fail


def trusted(
    returns: Callable[[torch.Tensor], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> loading.Checkpoint:
    path = tmp_path / "net.pkl"
    path.write_bytes(b"anything")
    monkeypatch.setattr(loading, "read_trusted", lambda path: {"ema": Foreign(returns)})
    return loading.load(path, trust=True)


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda x: None, r"returned NoneType for an x of \[2, 1, 4, 4\]"),
        (lambda x: (x, x), "returned tuple for an x"),
        (lambda x: x[:, :, :2], r"returned \[2, 1, 2, 4\] for an x of \[2, 1, 4, 4\]"),
        (lambda x: x.mean((1, 2, 3), keepdim=True), r"returned \[2, 1, 1, 1\]"),
        (raising(MemoryError()), r"its network failed \(MemoryError: \)"),
        (raising(KeyError("\x1b[31mred\n")), r"its network failed \(KeyError: "),
    ],
)
def test_foreign_networks_that_misbehave(
    returns: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a traceback of somebody else's code, or an output that is broadcast in silence.
    net = trusted(returns, tmp_path, monkeypatch).net
    with pytest.raises(CheckpointError, match=message) as caught:
        net(torch.zeros(2, 1, 4, 4), torch.ones(()))
    assert str(caught.value).isprintable()
    assert str(tmp_path / "net.pkl") in str(caught.value)


def test_foreign_networks_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a wrapper that hides the network's attributes, its mode or its weights.
    net: Any = trusted(lambda x: x / 2, tmp_path, monkeypatch).net
    assert (net.img_channels, net.img_resolution, net.label_dim) == (1, 4, 0)
    assert not net.training
    assert not net.net.training
    assert [p.requires_grad for p in net.parameters()] == [False]
    assert torch.equal(
        net(torch.ones(1, 1, 4, 4), torch.ones(()), None), torch.full((1, 1, 4, 4), 0.5)
    )


def test_a_gpu_that_is_full_is_not_the_networks_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: the advice to take smaller batches lost on the way.
    net = trusted(raising(torch.cuda.OutOfMemoryError("full")), tmp_path, monkeypatch).net
    with pytest.raises(torch.cuda.OutOfMemoryError):
        net(torch.zeros(2, 1, 4, 4), torch.ones(()))


def test_a_network_that_is_there_is_kept(tmp_path: Path) -> None:
    # Catches: somebody's network replaced by a name typed twice.
    dest = tmp_path / "net.safetensors"
    dest.write_bytes(b"precious")
    refused = CliRunner().invoke(main, ["convert", "digits", str(dest)])
    assert refused.exit_code == 1
    assert "is there already" in " ".join(refused.output.split())
    assert dest.read_bytes() == b"precious"
    assert CliRunner().invoke(main, ["convert", "digits", str(dest), "--overwrite"]).exit_code == 0
    assert dest.stat().st_size > 1000


def test_a_converted_network_is_as_readable_as_other_files(tmp_path: Path) -> None:
    # Catches: mode 0600, whatever the user's umask: nobody else of the group could read it.
    (tmp_path / "other").write_text("")
    convert("digits", tmp_path / "net.safetensors")
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "net.safetensors")}
    assert len(modes) == 1
