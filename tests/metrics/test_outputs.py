"""What the scoring commands write never replaces, or joins, what they read."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from PIL import Image

from erk_guid.cli.generate import generate_command
from erk_guid.cli.metrics import metrics_command
from erk_guid.metrics.statistics.references import locate_reference

COMMON = ("--ref", "digits", "--metrics", "fd_digits", "--device", "cpu", "--num", 3)


def run(*args: Any) -> Result:
    return CliRunner().invoke(metrics_command, list(map(str, args)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "run.json").write_text("{}")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["run.json", "dataset.json", "1.png", "scores.png", "./x/../run.json"]
)
def test_scores_do_not_join_the_images(name: str, images: Path) -> None:
    # Catches: the record of a run replaced by its scores; scores that are scored next time.
    before = state(images)
    calc = run("calc", "--images", images, *COMMON, "--json", f"{images}/{name}")
    assert calc.exit_code == 1
    assert "would be taken for a file of the images" in " ".join(calc.output.split())
    assert state(images) == before


def test_a_reference_is_not_written_over_its_images(images: Path, tmp_path: Path) -> None:
    # Catches: a set of images in an .npz replaced by its statistics, through a link.
    source = tmp_path / "set.npz"
    np.savez(source, images=np.zeros((3, 1, 32, 32), np.uint8))
    (tmp_path / "link.npz").symlink_to(source)
    before = source.read_bytes()
    for dest in (source, tmp_path / "link.npz", images / ".." / "set.npz"):
        done = run("ref", "--data", source, "--dest", dest, "--metrics", "fd_digits",
                   "--device", "cpu")  # fmt: skip
        assert done.exit_code == 1
        assert "--dest" in done.output
        assert "is an input; write to another file" in " ".join(done.output.split())
    assert source.read_bytes() == before


def test_what_an_earlier_run_wrote_is_not_replaced_in_silence(images: Path, tmp_path: Path) -> None:
    scores, reference = tmp_path / "scores.json", tmp_path / "ref.npz"
    for option, output, args in (
        ("--json", scores, ("calc", "--images", images, *COMMON, "--json", scores)),
        ("--dest", reference, ("ref", "--data", images, "--dest", reference,
                               "--metrics", "fd_digits", "--device", "cpu")),
    ):  # fmt: skip
        first, second = run(*args), run(*args)
        assert (first.exit_code, second.exit_code) == (0, 0)
        assert "will replace" not in first.output
        assert f"{option} will replace" in second.output
        assert output.name in second.output


def test_scores_and_features_are_two_files(images: Path, tmp_path: Path) -> None:
    # Catches: scores over the features, when all is computed.
    out = tmp_path / "out.npz"
    (tmp_path / "link.npz").symlink_to(out)
    for other in (out, tmp_path / "link.npz", images / ".." / "out.npz"):
        done = run("calc", "--images", images, *COMMON, "--json", out, "--features", other)
        assert done.exit_code == 1
        assert "--json and --features are one file" in " ".join(done.output.split())
    assert not out.exists()


def test_weights_are_not_written_over(images: Path, tmp_path: Path) -> None:
    # Catches: a detector's own file taken for a place to write to.
    weights = tmp_path / "weights.npz"
    shutil.copy(locate_reference("digits"), weights)
    before = weights.read_bytes()
    done = run("calc", "--images", images, *COMMON, "--detector-weights", f"fd_digits={weights}",
               "--features", weights)  # fmt: skip
    assert done.exit_code == 1
    assert "--features" in done.output
    assert "is an input" in done.output
    assert weights.read_bytes() == before


def test_scores_beside_the_images_are_written(images: Path) -> None:
    # Catches: a refusal of what has always worked.
    done = run("calc", "--images", images, *COMMON, "--json", images / "scores.json")
    assert done.exit_code == 0, done.output
    again = run("calc", "--images", images, *COMMON, "--json", images / "scores.json")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("named", ["schedule", "settings", "plugin"])
def test_files_that_options_read_are_inputs(
    named: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a fit's settings, noise levels or the user's own program replaced by scores.
    monkeypatch.chdir(tmp_path)
    path = tmp_path / {"schedule": "levels.csv", "settings": "s.json", "plugin": "p.py"}[named]
    fits = ROOT / "erk_guid" / "data" / "fits" / "digits-6.json"
    path.write_text({"schedule": "80,5,1", "plugin": ""}.get(named, fits.read_text()))
    before = path.read_bytes()
    if named == "plugin":
        tried = run("calc", "--images", images, *COMMON, "--plugin", path, "--json", path)
    else:
        tried = run("gen", "--preset=digits", *COMMON, f"--{named}", path, "--json", path)
        made = CliRunner().invoke(
            generate_command,
            ["--preset=digits", "--outdir=o", "--device=cpu", f"--{named}={path}",
             f"--trace={path.with_suffix('.csv')}", "--grid=levels.png"],
        )  # fmt: skip
        assert made.exit_code == (1 if named == "schedule" else 0), made.output
    assert tried.exit_code == 1, tried.output
    assert "is an input; write to another file" in " ".join(tried.output.split())
    assert path.read_bytes() == before


def test_rows_of_a_trace_are_not_replaced(images: Path) -> None:
    # Catches: scores over the part file of a trace.
    part = images / ".trace.0.part"
    part.write_bytes(bytes(80))
    done = run("calc", "--images", images, *COMMON, "--json", part)
    assert done.exit_code == 1
    assert part.read_bytes() == bytes(80)


def test_files_of_other_kinds_are_not_replaced(images: Path, tmp_path: Path) -> None:
    # Catches: --dest and --features over somebody's data set, weights or pickle.
    data, pickled = tmp_path / "data.npz", tmp_path / "net.pkl"
    np.savez(data, images=np.zeros((2, 4, 4), np.uint8), labels=np.arange(2))
    pickled.write_bytes(pickle.dumps({"my": "net"}))
    ref = ("ref", "--metrics=fd_digits", "--device=cpu", "--data", images)
    for args in (
        (*ref, "--dest", data), (*ref, "--dest", pickled),
        ("calc", "--images", images, *COMMON, "--features", data),
    ):  # fmt: skip
        before = Path(str(args[-1])).read_bytes()
        refused = run(*args)
        assert refused.exit_code == 1
        assert "holds no statistics or features" in " ".join(refused.output.split())
        assert Path(str(args[-1])).read_bytes() == before
    for name in ("r.npz", "r.pkl"):
        for _ in range(2):  # its own output is
            assert run(*ref, "--dest", tmp_path / name).exit_code == 0


def test_more_than_there_is(images: Path, tmp_path: Path) -> None:
    # Catches: --last cut down without a word; the advice to give --num 1.
    dest = ("--dest", tmp_path / "r.npz", "--metrics", "fd_digits", "--device", "cpu")
    done = run("ref", "--data", images, *dest, "--last", 9)
    assert done.exit_code == 1
    assert "--last 9: there are 3 images" in done.output
    for name in ("1.png", "2.png"):
        (images / name).unlink()
    done = run("calc", "--images", images, *COMMON)
    assert "has 1 image; scores need at least 2" in done.output
