"""erk-guid calibrate, and --settings."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from generation.test_settings import MADE_FOR
from support.tree import SIGMAS, TREE, starts

from erk_guid import (
    ERKGuidance,
    calibrate,
)
from erk_guid.cli import main
from erk_guid.cli.calibrate import network_options
from erk_guid.cli.common import SeedList, compact
from erk_guid.generation.settings import Settings, read_settings
from erk_guid.solvers import DEIS


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_settings_stand_for_the_options(tmp_path: Path) -> None:
    Settings(ERKGuidance(0.6, 0.3), MADE_FOR, {"net": "elsewhere"}).write(tmp_path / "s.json")
    common = ("generate", "--net=digits", "--seeds=0-1")
    done = run(*common, f"--outdir={tmp_path / 'a'}", f"--settings={tmp_path / 's.json'}")
    assert done.exit_code == 0, done.output
    assert "w_stiff 0.6, w_con 0.3, solver heun, 5 noise levels" in done.output
    assert "measured with the network elsewhere, this is digits" in done.output
    levels = {k: v for k, v in MADE_FOR.items() if k != "num_steps"} | {"schedule": [9.0, 1.0, 0.1]}
    Settings(ERKGuidance(0.6, 0.3), levels).write(tmp_path / "l.json")
    listed = run(*common, f"--outdir={tmp_path / 'l'}", f"--settings={tmp_path / 'l.json'}")
    assert "solver heun, 3 noise levels" in listed.output  # it said 32
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert "0.6" in json.dumps(record)
    run(*common, f"--outdir={tmp_path / 'b'}", "--steps=5", "--w_stiff=0.6", "--w_con=0.3")
    run(*common, f"--outdir={tmp_path / 'c'}", "--steps=5")
    assert images(tmp_path / "a") == images(tmp_path / "b")
    assert len(images(tmp_path / "c")) == 2
    again = run(*common, f"--outdir={tmp_path / 'a'}", "--resume", "--steps=5", "--w_stiff=0.6",
                "--w_con=0.3")  # fmt: skip
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--w_stiff=0.5", "--w_stiff and --settings both"),
        ("--w_con=0.5", "--w_con and --settings both"),
        ("--bound=0.5", "--bound and --settings both"),
        ("--gate=step", "--gate and --settings both"),
        ("--steps=8", "--steps 8: .*s.json was made for --steps 5"),
        ("--solver=dpm2", "--solver dpm2: .*s.json was made for --solver heun"),
        ("--schedule=logsnr", "--schedule logsnr: .* was made for --schedule polynomial"),
    ],
)
def test_settings_and_options_that_contradict_them(
    option: str, message: str, tmp_path: Path
) -> None:
    Settings(ERKGuidance(0.6, 0.3), MADE_FOR).write(tmp_path / "s.json")
    done = run("generate", "--net=digits", f"--outdir={tmp_path / 'a'}", option,
               f"--settings={tmp_path / 's.json'}")  # fmt: skip
    assert done.exit_code == 2
    assert re.search(message, done.output), done.output
    assert not (tmp_path / "a").exists()


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    done = run("generate", "--net=digits", f"--outdir={tmp_path}", "--settings=/no/such.json")
    assert done.exit_code == 1
    assert "cannot read /no/such.json" in done.output


@pytest.mark.slow
def test_calibrating_and_using_it(tmp_path: Path) -> None:
    done = run("calibrate", "--net=digits", "--steps=4", "--seeds=50000-50007", "--no-auto",
               "--solver=dpm2", "--r=0.6", "--sigma_max=60",
               f"--outdir={tmp_path / 'cal'}")  # fmt: skip
    assert done.exit_code == 0, done.output
    settings = read_settings(tmp_path / "cal" / "settings.json")
    assert settings.made_for == {
        "solver": "dpm2", "order": None, "r": 0.6, "deis_mode": None, "num_steps": 4,
        "sigma_min": 0.002, "sigma_max": 60, "rho": 7, "schedule": "polynomial",
    }  # fmt: skip
    assert settings.measured["seeds"] == "50000-50007"
    with open(tmp_path / "cal" / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["samples"] for row in rows} == {"8"}
    assert float(rows[0]["ratio"]) == pytest.approx(settings.measured["ratio"], rel=1e-5)
    assert b"w_con" in (tmp_path / "cal" / "calibration.svg").read_bytes()
    assert "Recommended" in (tmp_path / "cal" / "calibration.md").read_text()
    done = run("generate", "--net=digits", f"--outdir={tmp_path / 'out'}", "--seeds=0",
               f"--settings={tmp_path / 'cal' / 'settings.json'}")  # fmt: skip
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net=digits", "--solver=modal"], "no embedded pair"),
        (["--net=digits", "--steps=2"], "Heun needs three"),
        (["--net=digits", "--seeds=1-2"], "a calibration needs at least 4"),
        (["--net=digits", "--bound=-1"], "bound must not be negative"),
        ([], "name a network"),
    ],
)
def test_what_the_command_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    done = run("calibrate", *options, f"--outdir={tmp_path}")
    assert done.exit_code in (1, 2)
    assert message in done.output, done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_seeds_in_short() -> None:
    seeds = [1, 2, 3, 7, 9, 10, 4]
    assert compact(seeds) == "1-3,7,9-10,4"
    assert SeedList().convert(compact(seeds), None, None) == seeds
    assert compact([]) == ""


def test_deis_with_options_is_a_solver_too() -> None:
    found = calibrate(TREE, starts(12, 0), SIGMAS, solver=DEIS(order=3, deis_mode="rhoab"))
    assert found.chosen.ratio <= 1
    assert isinstance(found.guidance, ERKGuidance)


def test_the_line_that_uses_it_names_the_same_denoiser() -> None:
    given: dict[str, Any] = {"preset": "digits", "net": None, "gnet": "digits", "guidance": 2.0}
    recipe: Any = SimpleNamespace(
        net="digits", gnet="digits", guidance=2.0, guidance_interval=None, class_idx=3
    )
    line = network_options(recipe, given)
    assert line == "--preset=digits --gnet=digits --guidance=2.0 --class=3"
    recipe.class_idx = None
    assert network_options(recipe, {**given, "preset": None}) == (
        "--net=digits --gnet=digits --guidance=2"
    )
    alone = {**given, "gnet": None, "guidance": None}
    assert network_options(recipe, alone) == "--preset=digits"
    recipe.guidance_interval = (0.2, 5.0)
    assert network_options(recipe, alone) == "--preset=digits --guidance-interval=0.2,5"


@pytest.mark.parametrize(
    "name", ["settings.json", "trials.csv", "calibration.svg", "calibration.md"]
)
def test_files_of_others_in_its_folder_are_kept(name: str, tmp_path: Path) -> None:
    # Catches: somebody's settings.json and trials.csv replaced, since the names are common ones.
    (tmp_path / name).write_text('{"other": 1}')
    done = run("calibrate", "--net=digits", f"--outdir={tmp_path}")
    assert done.exit_code == 1
    assert "is no earlier output of this kind" in " ".join(done.output.split())
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"other": 1}'


def test_noise_levels_in_its_folder_are_an_input(tmp_path: Path) -> None:
    # Catches: the levels of --schedule replaced by the table of trials.
    levels = tmp_path / "calibration.md"
    levels.write_text("80,10,1,0.1")
    done = run("calibrate", "--net=digits", f"--schedule={levels}", f"--outdir={tmp_path}")
    assert done.exit_code == 1
    assert "is an input; write to another file" in " ".join(done.output.split())
    assert levels.read_text() == "80,10,1,0.1"


@pytest.mark.parametrize(
    ("command", "name"),
    [("fit", "fit.csv"), ("fit", "fit-6.json"), ("fit", "fit.md"), ("accuracy", "accuracy.csv"),
     ("accuracy", "accuracy.md"), ("toy", "toy.npz"), ("demo", "demo.txt"), ("demo", "demo.json"),
     ("accuracy", "accuracy.json"),
     ("reproduce", "report.md")],
)  # fmt: skip
def test_so_are_those_of_other_studies(command: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{mine}")
    options = {"fit": ["--net=digits", "--evaluations=6"], "accuracy": ["--problem=gauss"],
               "reproduce": ["--table=digits", "--num=2"]}  # fmt: skip
    done = run(command, *options.get(command, []), f"--outdir={tmp_path}")
    assert done.exit_code == 1
    assert "is no earlier output of this kind" in " ".join(done.output.split())
    assert (tmp_path / name).read_text() == "{mine}"


def test_guided_fits_are_not_refused_for_their_steps() -> None:
    # Catches: a check of --steps in a command that has none.
    done = run("fit", "--net=digits", "--solver=heun", "--w_stiff=0.5", "--seeds=0-3")
    assert "a fit needs at least" in done.output


def test_too_few_seeds_to_calibrate_with_are_named() -> None:
    done = run("calibrate", "--net=digits", "--steps=3", "--seeds=0-2")
    assert done.exit_code == 2
    assert "--seeds lists 3; a calibration needs at least 4" in done.output
