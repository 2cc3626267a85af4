"""The accuracy tables, the outside check, and the toy figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import golden

import erk_guid
from erk_guid.cli import main
from erk_guid.generation.settings import read_settings
from erk_guid.mixtures import tree_mixture
from erk_guid.solvers import make_solver
from erk_guid.studies.accuracy import METHODS, Method, Nearness, as_near, make_problem, measure
from erk_guid.studies.accuracy.measuring import Error, Table
from erk_guid.studies.accuracy.methods import OutsideMethod, choose_methods, fitted_row
from erk_guid.studies.accuracy.problems import solve_finely


@pytest.mark.slow
def test_the_fine_solution_is_the_golden_one() -> None:
    # Made by another program with another method.
    data = golden("tree")
    found = solve_finely(tree_mixture(), data["tree5_start"], 0.002, 5.0, 401)
    assert (found - data["tree5_end"]).norm(dim=1).max() < 1e-4


def test_the_gaussians_are_solved_in_closed_form() -> None:
    problem = make_problem("gauss", 20)
    found = solve_finely(problem.denoiser, problem.start, 0.002, 80.0, 801)
    torch.testing.assert_close(found, problem.end, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["tree5", "mixture64"])
def test_diffusers_own_schedulers_agree_with_ours(problem: str) -> None:
    # Written by other people: catches an error that our solvers and our tests share.
    pairs = {
        "euler": "diffusers EDM Euler", "heun": "diffusers Heun",
        "dpmpp 2 data": "diffusers DPM++ 2M", "unipc 3 data": "diffusers UniPC 3",
    }  # fmt: skip
    methods = [METHODS[name] for pair in pairs.items() for name in pair]
    table = measure(make_problem(problem, 40), methods, (6, 12))
    for ours, theirs in pairs.items():
        for a, b in zip(table.errors[ours], table.errors[theirs], strict=True):
            assert a.mean == pytest.approx(b.mean, rel=2e-4), (ours, theirs)
            assert a.worst == pytest.approx(b.worst, rel=2e-3), (ours, theirs)


def test_equal_evaluations_for_all() -> None:
    problem = make_problem("gauss", 3)
    calls: list[float] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma))
        return problem.denoiser(x, sigma)

    for name, method in METHODS.items():
        calls.clear()
        sigmas = method.sigmas(8, 0.002, 80.0)
        found = method.run(counting, problem.start, sigmas)
        assert len(calls) == 8, name
        assert found.isfinite().all()
        assert float(sigmas[-1]) == 0.002


def test_tables() -> None:
    rows = {"a": [Error(0.5, 0.1, 1.0), Error(2e-5, 1e-6, 1.0)], "b": [Error(0.25, 0.1, 1.0)] * 2}
    table = Table("p", (6, 10), rows)
    assert table.markdown().splitlines()[2:] == [
        "| a | 0.5 | **2.0e-05** |",
        "| b | **0.25** | 0.25 |",
    ]
    assert table.csv().splitlines()[1] == "p,a,6,0.5,0.1,1"
    with pytest.raises(ValueError, match="must be even and at least 2, got 7"):
        measure(make_problem("gauss", 3), [METHODS["heun"]], (7,))
    with pytest.raises(ValueError, match="no method begins with 'rk4'; there are: euler; heun"):
        choose_methods(["rk4"])
    assert [m.name for m in choose_methods(["modal"])] == ["modal", "modal (logsnr)"]
    assert not any("," in name for name in METHODS)  # the command's list is split there
    assert not any(isinstance(m, OutsideMethod) for m in choose_methods([], outside=False))


@pytest.mark.slow
def test_the_shortest_run_that_is_near_enough() -> None:
    # By trying every number of evaluations, with errors computed here.
    problem = make_problem("tree5", 40)

    def error(method: Method, count: int) -> float:
        chosen = method.at(count)
        assert chosen is not None
        sigmas = chosen.sigmas(count, problem.sigma_min, problem.sigma_max)
        found = chosen.run(problem.denoiser, problem.start, sigmas)
        return float((found - problem.end).norm(dim=1).mean())

    target = error(METHODS["heun"], 30)  # 16 noise levels
    methods = [METHODS[name] for name in ("heun", "heun + ERK auto", "euler", "modal", "res 2")]
    expected = {
        m.name: next((n for n in m.counts(30) if error(m, n) <= target), None) for m in methods
    }
    assert expected["euler"] is None
    assert expected["heun"] == 30
    assert len(set(expected.values())) == 5
    for evaluations in ((), (6, 20), (10, 30)):
        table = measure(problem, methods, evaluations) if evaluations else None
        nearness = as_near(problem, methods, table, steps=16)
        found = {name: f and f.evaluations for name, f in nearness.found.items()}
        assert found == expected
    assert nearness.target.error.mean == pytest.approx(target)
    modal = nearness.found["modal"]
    assert modal is not None
    assert modal.error.mean == pytest.approx(error(METHODS["modal"], modal.evaluations))
    assert modal.seconds > 0
    lines = nearness.markdown().splitlines()
    assert lines[2].startswith(f"| modal | {modal.evaluations} | {modal.evaluations / 30:.2f} | ")
    assert lines[-1] == "| euler | more than 30 | | | |"
    rows = nearness.csv().splitlines()
    assert rows[1].startswith(f"tree5,modal,{modal.evaluations},")
    assert rows[-1] == "tree5,euler,,,,"
    with pytest.raises(ValueError, match="needs 2 noise levels at least, got 1"):
        as_near(problem, methods, steps=1)


def test_results_are_there_as_they_come() -> None:
    # Catches: a table that is there at the end only; a table that changes after it was given.
    methods = [m for m in METHODS.values() if m.name in ("heun", "euler", "modal")]
    problem = make_problem("gauss", 4)
    tables: list[Table] = []
    whole = measure(problem, methods, [4, 6], note=tables.append)
    assert [list(t.errors) for t in tables] == [
        [m.name for m in methods[: k + 1]] for k in range(len(methods))
    ]
    assert tables[-1] == whole
    near: list[Nearness] = []
    found = as_near(problem, methods, whole, steps=4, note=near.append)
    assert [len(n.found) for n in near] == [1, 2, 3]
    assert near[-1].csv() == found.csv()


def test_fits_are_tried_at_their_own_evaluations() -> None:
    fits = Path(erk_guid.__file__).parent / "data" / "fits"
    row = fitted_row([fits / f"digits-{n}.json" for n in (6, 10, 14)], 0.002, 80.0)
    assert row.counts(12) == [6, 10]
    problem = make_problem("mixture64", 10)
    nearness = as_near(problem, [row], steps=8)
    errors = {}
    for count, fit in row.fits.items():
        sigmas = torch.tensor(fit.levels, dtype=torch.float64)
        end = erk_guid.sample(problem.denoiser, problem.start, sigmas, solver=fit.solver)
        errors[count] = float((end - problem.end).norm(dim=1).mean())
    near = [count for count in (6, 10, 14) if errors[count] <= nearness.target.error.mean]
    assert 14 in near
    found = nearness.found["fitted"]
    assert found is not None
    assert found.evaluations == near[0]
    # Where none of them is near enough, the table says how far was tried.
    short = as_near(problem, [replace(row, fits={6: row.fits[6]})], steps=32)
    assert short.found["fitted"] is None
    assert "| fitted | more than 6 | | | |" in short.markdown()


@pytest.mark.slow
def test_the_command_on_a_network(tmp_path: Path) -> None:
    args = ["accuracy", "--net=digits", "--num=3", "--fine=24", "--evaluations=4,6", "--device=cpu",
            "--as-near-as=4"]  # fmt: skip
    done = CliRunner().invoke(
        main, [*args, "--methods=heun,modal", "--batch=2", "--outdir", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "| heun + ERK auto |" in done.output
    lines = (tmp_path / "accuracy.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 5
    assert b"<svg" in (tmp_path / "accuracy.svg").read_bytes()
    record = json.loads((tmp_path / "accuracy.json").read_text())
    assert record["fine"] == 24
    assert record["as_near_as"] == 4
    assert "as near as Heun's 4 noise levels (6 evaluations" in done.output
    near = (tmp_path / "as-near.csv").read_text().splitlines()
    assert len(near) == 1 + 5
    assert {row.split(",")[1] for row in near[1:]} == {row.split(",")[1] for row in lines[1:]}
    assert b"<svg" in (tmp_path / "as-near.svg").read_bytes()
    bare = CliRunner().invoke(
        main, [*args[:-1], "--as-near-as=0", "--methods=heun", "--outdir", str(tmp_path / "b")]
    )
    assert bare.exit_code == 0, bare.output
    assert not (tmp_path / "b" / "as-near.csv").exists()
    assert "of an earlier run" not in bare.output
    (tmp_path / "b" / "as-near.md").write_text((tmp_path / "as-near.md").read_text())
    bare = CliRunner().invoke(
        main, [*args[:-1], "--as-near-as=0", "--methods=heun", "--outdir", str(tmp_path / "b")]
    )
    for said in ("as-near.md in", "of an earlier run\n", "accuracy.svg in", "until this run"):
        assert said in bare.output
    assert record["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a network with --net or --preset, or an exact --problem"),
        (["--net=digits", "--problem=gauss"], "name a network with --net or --preset, or an"),
        (["--problem=cube"], "--problem 'cube': known are tree5, tree80, gauss, mixture64"),
        (["--problem=gauss", "--evaluations=6,9"], "9 is not an even number"),
        (["--problem=gauss", "--methods=rk4"], "no method begins with 'rk4'"),
        (["--net=digits", "--num=3", "--seeds=1-4"], "--seeds stands in place of --num"),
        (["--problem=gauss", "--sigma_max=5"], "--sigma_max goes with a network, not with"),
        (["--problem=gauss", "--methods=diffusers", "--no-outside"], "those are switched off"),
        (
            ["--net=digits", "--fine=60"],
            "--fine 60 is too coarse to judge runs of 62 evaluations "
            "(--as-near-as) by; take 248 or more",
        ),
        (["--net=digits", "--fine=60", "--as-near-as=0"], "is too coarse to judge runs of 30"),
        (["--problem=gauss", "--as-near-as=1"], "--as-near-as 1 is not 0 or a number of 2 to"),
        (["--net=digits", "--sigma_max=inf"], "must be above 0 and below --sigma_max inf"),
        (["--net=digits", "--evaluations=9000000000"], "even number of 2 to 10000"),
        (["--net=digits", "--guidance=2"], "needs a guiding network"),
        (["--net=digits", "--sigma_min=3", "--sigma_max=2"], "must be above 0 and below"),
    ],
)
def test_what_makes_no_sense_is_refused(args: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["accuracy", *args, "--outdir", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_toy_figure_and_its_numbers(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["toy", "--outdir", str(tmp_path), "--paths=5"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "toy.npz") as data:
        assert data["path_0"].shape == data["exact"].shape == (8, 5, 2)
        # The stiff place is stiff, and the drift along its eigenvector has that slope there.
        line, drift = data["line"], data["stiff_drift"][:, 0]
        slope = (drift[121] - drift[119]) / (line[121] - line[119])
        assert slope == pytest.approx(float(data["stiff_eigenvalue"]), rel=0.02)
        assert abs(data["stiff_eigenvalue"]) > 10 * abs(data["calm_eigenvalue"])
        # The exact solution is one: a fine run from the same points ends there.
        start = torch.from_numpy(data["exact"][0])
        end = solve_finely(tree_mixture(), start, 0.002, 5.0, 401)
        assert np.abs(end.numpy() - data["exact"][-1]).max() < 1e-3
        # A step's own error is no larger than what the steps add up to, and guidance mends it.
        local = [data[f"local_error_{k}"].sum() for k in range(3)]
        assert local[2] < local[1] < local[0]
        assert [float(data[f"error_{k}"][0]) for k in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--w_stiff=nan"], "w_stiff must be a finite number, got nan"),
        (["--sigma=nan"], "--sigma must be a number from 0.005 to 5"),
        (["--seed=99999999999999999999"], "is not in the range"),
    ],
)
def test_a_toy_that_makes_no_sense(args: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["toy", *args, "--outdir", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_density_of_the_mixture() -> None:
    tree = tree_mixture()
    x = tree.sample(5, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(tree.log_density(x, 0.3).sum(), x)
    torch.testing.assert_close(gradient, tree.score(x, 0.3))
    # It integrates to 1 over the plane.
    u = torch.linspace(-6, 6, 121, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(u, u, indexing="ij"), -1).reshape(-1, 2)
    assert float(tree.log_density(points, 0.3).exp().sum() * 0.1**2) == pytest.approx(1, rel=1e-6)


@pytest.mark.slow
def test_fitted_levels_are_a_row_of_the_table(tmp_path: Path) -> None:
    """The row's cell is what a run by hand with the file's levels gives; others stay empty."""
    fits = Path(erk_guid.__file__).parent / "data" / "fits"
    args = ["accuracy", "--problem", "mixture64", "--num", "20", "--methods", "modal",
            "--no-outside", "--evaluations", "6,14", "--as-near-as", "0",
            "--outdir", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(main, [*args, "--settings", str(fits / "digits-14.json")])
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if line.startswith("| fitted")]
    assert row.split("|")[2].strip() == ""
    settings = read_settings(fits / "digits-14.json")
    problem = make_problem("mixture64", 20)
    solver = make_solver(settings.made_for["solver"], order=settings.made_for["order"])
    sigmas = torch.tensor(settings.made_for["schedule"], dtype=torch.float64)
    found = erk_guid.sample(problem.denoiser, problem.start, sigmas, solver=solver)
    wanted = float((found - problem.end).norm(dim=1).mean())
    assert float(row.split("|")[3].strip(" *")) == pytest.approx(wanted, rel=0.01)
    assert (tmp_path / "accuracy.svg").stat().st_size > 1000
    refused = CliRunner().invoke(main, [*args, "--settings", str(fits / "digits-8.json")])
    assert "is for 8 evaluations, which --evaluations lacks" in refused.output
    (tmp_path / "bare.json").write_text('{"erk_guid_settings": 1, "w_stiff": 0, "w_con": 0.5}')
    refused = CliRunner().invoke(main, [*args, "--settings", str(tmp_path / "bare.json")])
    assert "holds no noise levels" in refused.output
    assert "Traceback" not in refused.output
