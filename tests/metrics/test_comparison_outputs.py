"""What precision-recall writes replaces nothing that it reads, and is tried first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from erk_guid.cli import precision_recall
from erk_guid.cli.metrics import metrics_command
from erk_guid.cli.precision_recall import precision_recall_command


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(precision_recall, "compare", lambda job: pytest.fail("computed"))
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(3):
        Image.fromarray(np.full((32, 32), k, np.uint8)).save(folder / f"{k}.png")
    (folder / "run.json").write_text("{}")
    return folder


def run(*args: Any) -> Result:
    return CliRunner().invoke(precision_recall_command, list(map(str, args)))


@pytest.mark.parametrize("name", ["run.json", "1.png", "scores.png"])
def test_scores_do_not_join_the_images(name: str, images: Path) -> None:
    # Catches: the record of a run replaced by its scores, of either side.
    before = {p.name: p.read_bytes() for p in images.iterdir()}
    for sides in ((images, "--real=digits"), (images.parent, f"--real={images}")):
        done = run(*sides, f"--json={images / name}")
        assert done.exit_code == 1
        assert "would be taken for a file of the images" in " ".join(done.output.split())
    assert {p.name: p.read_bytes() for p in images.iterdir()} == before


def test_scores_do_not_replace_real_images_or_weights(images: Path, tmp_path: Path) -> None:
    # Catches: an input that is one file overwritten through --json.
    file = tmp_path / "file.npz"
    np.savez(file, images=np.zeros((3, 1, 32, 32), np.uint8))
    for args in ((f"--real={file}",), ("--real=digits", f"--detector-weights=vgg16={file}")):
        done = run(images, *args, f"--json={file}")
        assert done.exit_code == 1
        assert "is an input; write to another file" in " ".join(done.output.split())


@pytest.mark.parametrize("name", ["images/0.png/x.json", "a" * 400])
def test_a_place_that_cannot_be_written_is_told_first(name: str, images: Path) -> None:
    # Catches: hours of work for a file that cannot be written; a traceback.
    done = run(images, "--real=digits", f"--json={images.parent / name}")
    assert done.exit_code == 1
    assert "cannot write to" in done.output


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (precision_recall_command, ["x", "--json="]),
        (precision_recall_command, [""]),
        (metrics_command, ["calc", "--images=x", "--ref=digits", "--json="]),
        (metrics_command, ["calc", "--images=x", "--ref=digits", "--features="]),
        (metrics_command, ["calc", "--images=", "--ref=digits"]),
        (metrics_command, ["ref", "--data=x", "--dest="]),
    ],
)
def test_empty_paths(command: Any, args: list[str]) -> None:
    # Catches: an empty name taken for the current folder.
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 2
    assert "it is empty; name a file or a folder" in " ".join(done.output.split())
