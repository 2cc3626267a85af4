"""``erk-guid fit``, on the shipped model and on networks of a few thousand weights."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import DATA

import erk_guid
from erk_guid.cli import main
from erk_guid.generation.locks import locked
from erk_guid.generation.settings import read_settings
from erk_guid.integrations.comfyui import fitting
from erk_guid.studies.fitting import fit_files

COND, GUIDE = DATA / "edm2_cond.pkl", DATA / "edm2_guide.pkl"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.slow
def test_a_fit_from_the_command_line_to_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fit"
    args = [
        "fit", "--net", COND, "--gnet", GUIDE, "--guidance", 1.4, "--guidance-interval", "0.1,20",
        "--evaluations", "4,5", "--solver", "modal", "--seeds", "0-15", "--trials", 3,
        "--device", "cpu", "--outdir", out,
    ]  # fmt: skip
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert "| 4 | modal" in done.output
    assert "--guidance-interval=0.1,20 --settings=" in done.output
    for name in ("fit-4.json", "fit-5.json", "fit.md", "fit.csv", "levels.svg", "errors.svg",
                 "samples.png"):  # fmt: skip
        assert (out / name).stat().st_size > 100, name
    settings = read_settings(out / "fit-5.json")
    levels = settings.made_for["schedule"]
    assert len(levels) == 6
    made = run(
        "generate", "--net", COND, "--gnet", GUIDE, "--guidance", 1.4,
        "--guidance-interval", "0.1,20", "--settings", out / "fit-5.json",
        "--outdir", tmp_path / "images", "--seeds", "0-1", "--device", "cpu",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "network evaluations each: 5" in made.output
    assert "was measured with" not in made.output
    record = json.loads((tmp_path / "images" / "run.json").read_text())["settings"]
    assert record["schedule"] == list(levels)
    assert record["denoise_to_zero"] is False
    # The same again costs nothing, and another denoiser does not take its journal.
    assert run(*args).exit_code == 0
    refused = run(*args, "--class", 1)
    assert refused.exit_code == 1
    assert "another search" in refused.output
    # Two functions that need ComfyUI.
    monkeypatch.setattr(fitting, "make_ksampler", lambda *method: method)
    monkeypatch.setattr(fitting, "outputs", lambda: tmp_path)
    sigmas, _ = fitting.read_fit(str(out / "fit-5.json"))
    assert sigmas.tolist() == pytest.approx(list(levels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--order", 2], "--order belongs to one solver"),
        (["--w_stiff", 0.5], "name it with --solver"),
        (["--evaluations", "1"], "not a number of 2 to"),
        (["--evaluations", "8,x"], "x"),
        (["--solver", "heun", "--evaluations", 3], "no noise level to choose"),
        (["--seeds", "0-3"], "lists 4; a fit needs at least 16"),
        (["--solver", "modal", "--w_stiff", 0.5], "--solver modal"),
        (["--sigma_min", 90], "sigma_min"),
        (["--seeds", "0-19", "--samples", 11], "--samples 11: the images of the report"),
    ],
)
def test_mistakes_are_named(options: list[Any], message: str, tmp_path: Path) -> None:
    args = ["--net", COND, "--device", "cpu", "--outdir", tmp_path]
    done = run("fit", *args, *options)
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "command",
    [["fit", "--net", COND, "--seeds", "0-15"], ["calibrate", "--net", COND],
     ["accuracy", "--problem", "gauss"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_one_search_a_folder(command: list[Any], tmp_path: Path) -> None:
    # Catches: two searches that write one journal and each other's results.
    with locked(tmp_path):
        done = run(*command, "--outdir", tmp_path)
    assert done.exit_code == 1
    assert "is at work in" in " ".join(done.output.split()), done.output


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a traceback when the disk fills after hours of search.
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "fit.csv")

    monkeypatch.setattr(fit_files, "write_bytes", full)
    done = run("fit", "--net", COND, "--device", "cpu", "--outdir", tmp_path, "--seeds", "0-15",
               "--evaluations", 3, "--solver", "euler", "--trials", 2, "--samples", 0)  # fmt: skip
    assert done.exit_code == 1
    assert "No space left on device (fit.csv); mend that" in " ".join(done.output.split())


def test_shipped_fits_are_taken_by_name(tmp_path: Path) -> None:
    args = ["generate", "--preset", "digits", "--schedule", "fitted", "--seeds", 0,
            "--device", "cpu", "--outdir", tmp_path]  # fmt: skip
    done = run(*args, "--steps", 6)
    assert done.exit_code == 0, done.output
    assert "network evaluations each: 6" in done.output
    missing = run(*args, "--steps", 7)
    assert missing.exit_code == 2
    assert "only for --preset digits --steps 6, 8, 10, 14, 20" in missing.output
    both = run(*args, "--steps", 6, "--settings", "a.json")
    assert "leave one out" in both.output
    other = run(*args, "--steps", 6, "--solver", "heun")
    assert "was made for --solver modal" in other.output
    wrong = run("calibrate", "--preset", "digits", "--schedule", "fitted")
    assert "for commands that make images" in wrong.output


@pytest.mark.slow
def test_the_shipped_fits_hold_on_other_images() -> None:
    """On seeds that no fit saw, against the better usual spacing of the same solver."""
    import torch

    from erk_guid.generation.images import draw
    from erk_guid.generation.seeds import SeededNoise
    from erk_guid.schedules import make_sigmas
    from erk_guid.solvers import Modal, make_solver

    net = erk_guid.load("digits").net
    noise, labels = draw(net, SeededNoise(range(7000, 7024), torch.device("cpu")), None)

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return net(x, sigma, labels)

    def error(sigmas: torch.Tensor, solver: Any) -> float:
        found = erk_guid.sample(denoiser, 80 * noise, sigmas, solver=solver)
        return float((found - exact).flatten(1).norm(dim=1).mean())

    with torch.no_grad():
        fine = make_sigmas("polynomial", 129, 0.002, 80, 7)[:-1]
        exact = erk_guid.sample(denoiser, 80 * noise, fine, solver=Modal())
        for count in (6, 10):
            path = Path(erk_guid.__file__).parent / "data" / "fits" / f"digits-{count}.json"
            made_for = dict(read_settings(path).made_for)
            options = {k: made_for[k] for k in ("order", "response") if k in made_for}
            fitted = torch.tensor(made_for["schedule"], dtype=torch.float64)
            after = error(fitted, make_solver(made_for["solver"], **options))
            before = min(
                error(make_sigmas(name, count + 1, 0.002, 80, 7)[:-1], Modal())
                for name in ("polynomial", "logsnr")
            )
            assert after < 0.65 * before
