"""The search for noise levels, on problems whose solution is known."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import erk_guid
from erk_guid import VP, ERKGuidance, ParameterFreeGuidance, RectifiedFlow
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.settings import read_settings
from erk_guid.integrations.k_diffusion import sample_modal
from erk_guid.processes import Process
from erk_guid.quadrature import prior_response
from erk_guid.schedules import karras_sigmas, make_sigmas
from erk_guid.solvers import DPM2, Heun, Modal, Solver, UniPC
from erk_guid.studies.accuracy.problems import high_dimensional_mixture
from erk_guid.studies.fitting import Fitted, fit, fit_each
from erk_guid.studies.fitting.fit_files import settings_of_fit, to_paste
from erk_guid.studies.fitting.results import bootstrap_ratio
from erk_guid.studies.fitting.spacing import Spacing
from erk_guid.studies.fitting.sweep import Task
from erk_guid.studies.fitting.trials import DIFFERENCE, Changed, Method, Trials

MIXTURE = high_dimensional_mixture(dim=8, components=5)


def start(count: int, seed: int = 0, sigma: float = 80.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean = MIXTURE.sample(count, generator)
    return clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)


class Counted:
    def __init__(self, stop_after: float = math.inf) -> None:
        self.calls = 0
        self.rows = 0
        self.stop_after = stop_after

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        return MIXTURE(x, sigma)


@pytest.mark.parametrize("floor", [None, 0.0001])
def test_a_spacing_keeps_its_ends_and_knows_how_its_levels_move(floor: float | None) -> None:
    usual = karras_sigmas(7)[:-1].tolist()
    spacing = Spacing.of(usual, 80.0, floor)
    assert spacing.levels == pytest.approx(usual)
    gaps = 6 if floor is None else 7
    shift = torch.tensor([0.3, -0.5, 0.1, 0.0, 2.0, -1.0, 0.2], dtype=torch.float64)[:gaps]
    moved = spacing.moved(shift).levels
    assert moved[0] == 80
    assert moved[-1] == 0.002 if floor is None else moved[-1] != pytest.approx(0.002, rel=0.1)
    assert all(a > b for a, b in pairwise([*moved, floor or 0.0]))
    here = torch.tensor(spacing.levels, dtype=torch.float64).log()
    for k in range(gaps):  # catches: a gap's own share left out
        nudge = torch.zeros(gaps, dtype=torch.float64)
        nudge[k] = 1e-6
        there = torch.tensor(spacing.moved(nudge).levels, dtype=torch.float64).log()
        torch.testing.assert_close(
            ((there - here) / 1e-6)[1 : gaps if floor is None else None],
            spacing.jacobian()[:, k], rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_the_last_level_is_fitted_where_usual_ones_end_high() -> None:
    """The report is held against the exact solution to 0. Catches: a fine solution that takes the
    same long step from the last level to 0, and so calls its error none."""
    options: dict[str, Any] = {
        "evaluations": 6, "solver": Modal(2), "trials": 20, "sigma_min": 3.0, "sigma_max": 80.0,
        "denoise_to_zero": True,
    }  # fmt: skip
    found = fit(MIXTURE, start(64), **options, floor=0.002)
    x = start(64)[32:]
    exact = erk_guid.sample(MIXTURE, x, karras_sigmas(600), solver="heun")

    def error(sigmas: Tensor) -> float:
        end = erk_guid.sample(MIXTURE, x, sigmas, solver=found.solver)
        return float((end - exact).norm(dim=1).mean())

    assert len(found.sigmas) == 7
    assert 0.002 < float(found.sigmas[-2]) < 2
    assert found.after.mean == pytest.approx(error(found.sigmas), rel=0.05)
    usual = [*make_sigmas("polynomial", 6, 3.0, 80.0, 7)[:-1].tolist(), 0.0]
    assert found.usual["polynomial"] == pytest.approx(error(torch.tensor(usual)), rel=0.05)
    assert found.after.mean < 0.5 * min(found.usual.values())
    blind = fit(MIXTURE, start(64), **options)
    assert float(blind.sigmas[-2]) == 3.0
    assert blind.after.mean < 0.5 * error(blind.sigmas)  # what it says is of another question


@pytest.mark.parametrize("solver", [Modal(), UniPC(2), Heun()])
def test_runs_that_share_their_beginnings_are_separate_runs(solver: Solver) -> None:
    """Catches: a state reused after the first step that differs; memory of another run."""
    x, ends = start(6), torch.zeros(6, 8, dtype=torch.float64)
    levels = karras_sigmas(6)[:-1].tolist()
    counted = Counted()
    trials = Trials(Task(counted, x, None, torch.tensor(levels), 4), ends)
    method = Method(solver)
    moved = [
        [*levels[:i], levels[i] * math.exp(DIFFERENCE), *levels[i + 1 :]] for i in (1, 2, 3, 4)
    ]
    changed = [Changed(method.plan(m, False), DIFFERENCE) for m in moved]
    slope = trials.slope(method.plan(levels, False), changed)

    def run(levels: list[float]) -> Tensor:
        sigmas = torch.tensor(levels, dtype=torch.float64)
        return erk_guid.sample(MIXTURE, x, sigmas, solver=solver)

    base = run(levels)
    torch.testing.assert_close(slope.errors, base.norm(dim=1), rtol=1e-12, atol=0)
    ways = torch.stack([(run(m) - base) / DIFFERENCE for m in moved], dim=1)
    weights = 1 / (slope.errors + 0.1 * slope.errors.median())
    weights = weights / weights.sum()
    torch.testing.assert_close(
        slope.gradient, torch.einsum("n,npv,nv->p", weights, ways, base), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(
        slope.curvature, torch.einsum("n,npv,nqv->pq", weights, ways, ways), rtol=1e-8, atol=1e-8
    )
    stages = 2 if solver.two_stages else 1
    assert counted.rows < 6 * stages * 5 * (1 + len(moved)) * 0.75


@pytest.mark.parametrize(("evaluations", "sigma_max"), [(6, 1.1), (40, 2.0)])
def test_levels_that_are_nearer_than_the_difference_of_a_derivative(
    evaluations: int, sigma_max: float
) -> None:
    """Catches: a level that is moved past the one above it to measure a derivative."""
    found = fit(
        MIXTURE, start(16), evaluations=evaluations, solver="unipc", trials=2, sigma_min=1.0,
        sigma_max=sigma_max,
    )  # fmt: skip
    gaps = -found.sigmas.log().diff()
    assert gaps.min() > 0
    assert gaps.max() < 0.03 * 2


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(MIXTURE, start(96), evaluations=8, solver="modal", trials=40)


def test_fitted_levels_are_better_on_samples_that_nobody_saw(fitted: Fitted) -> None:
    """The fit's own report is checked against the mixture's exact solution, from outside."""
    x = start(200, seed=1)
    exact = erk_guid.sample(MIXTURE, x, karras_sigmas(600)[:-1], solver="heun")

    def error(sigmas: Tensor, solver: Solver) -> float:
        counted = Counted()
        found = erk_guid.sample(counted, x, sigmas, solver=solver)
        assert counted.calls == 8
        return float((found - exact).norm(dim=1).mean())

    usual = min(
        error(make_sigmas(name, 9, 0.002, 80, 7)[:-1], Modal()) for name in ("polynomial", "logsnr")
    )
    ours = error(fitted.sigmas, fitted.solver)
    assert fitted.found
    assert fitted.evaluations == 8
    assert ours < 0.8 * usual
    assert ours == pytest.approx(fitted.after.mean, rel=0.5)
    assert fitted.ratio.low <= fitted.ratio.mean <= fitted.ratio.high < 1
    assert fitted.reference_error < 0.05
    assert str(fitted).count("times") == 1


def test_what_a_fit_says_of_its_cost_is_what_it_called() -> None:
    counted = Counted()
    found = fit(counted, start(64), evaluations=6, solver="unipc", trials=12)
    assert counted.rows == found.cost.search + found.cost.reference
    # The search, and the runs for choice and report.
    assert found.cost.search <= 6 * (1.6 * 12 * 16 + 8 * 16 + 4 * 32)
    assert found.samples == (16, 16, 32)


@pytest.mark.slow
def test_it_says_so_where_nothing_is_better() -> None:
    """Where D does not depend on x every spacing is exact: any 'gain' is rounding."""
    found = fit(lambda x, sigma: torch.ones_like(x), start(32), evaluations=6, solver="unipc")
    assert not found.found
    assert found.spacing in ("polynomial", "logsnr")
    assert found.ratio == (1.0, 1.0, 1.0)
    assert "nothing is significantly better" in str(found)
    usual = make_sigmas(found.spacing, 7, 0.002, 80, 7)[:-1]
    torch.testing.assert_close(found.sigmas, usual, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", [RectifiedFlow(), VP()])
def test_levels_of_a_process_are_its_times(process: Process) -> None:
    x = torch.randn(48, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        level = process.level(float(t), largest=1e4)
        return MIXTURE(x / level.alpha, x.new_full((), level.sigma))

    found = fit(denoiser, x, evaluations=6, solver="modal", process=process, trials=15)
    assert found.sigmas[0] == process.last
    calls = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return denoiser(x, t)

    end = erk_guid.sample(counting, x, found.sigmas, solver=found.solver, process=process)
    assert len(calls) == 6
    assert end.isfinite().all()
    assert found.ratio.mean <= 1


@pytest.mark.parametrize(
    ("solver", "guidance", "to_zero", "calls"),
    [
        (Heun(), None, False, 8),
        (Heun(), ERKGuidance(0.5, 0.5), True, 7),
        (Heun(), ParameterFreeGuidance(), False, 8),
        (DPM2(), None, True, 7),
        (Modal(3), None, True, 8),
    ],
)
def test_every_kind_of_method_spends_no_more_than_asked(
    solver: Solver, guidance: Any, to_zero: bool, calls: int
) -> None:
    found = fit(
        MIXTURE, start(16), evaluations=8, solver=solver, guidance=guidance, trials=8,
        denoise_to_zero=to_zero,
    )  # fmt: skip
    counted = Counted()
    erk_guid.sample(counted, start(2), found.sigmas, solver=found.solver, guidance=found.guidance)
    assert counted.calls == calls == found.evaluations
    assert (found.sigmas[-1] == 0) == to_zero


def test_progress_ends_with_all_of_it() -> None:
    seen: list[tuple[int, int]] = []
    fit(
        MIXTURE, start(16), evaluations=6, solver=Modal(2), trials=3,
        progress=lambda done, expected: seen.append((done, expected)),
    )  # fmt: skip
    assert seen == sorted(seen, key=lambda pair: pair[0])
    assert seen[-1][0] == seen[-1][1]


def test_best_chooses_a_solver() -> None:
    found = fit(MIXTURE, start(48), evaluations=6, trials=40)
    named = fit(MIXTURE, start(48), evaluations=6, solver="dpmpp", trials=40)
    assert found.after.mean <= named.after.mean
    assert len({str(tried.method) for tried in found.tried}) >= 2


def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    """Catches: a search that takes another way because what it remembers cost nothing."""
    options: dict[str, Any] = {"evaluations": [5, 6], "solver": "modal", "trials": 12}
    x = start(24)
    whole = fit_each(MIXTURE, x, **options)
    total = Counted()
    fit_each(total, x, **options)
    with pytest.raises(KeyboardInterrupt):
        fit_each(Counted(stop_after=total.calls // 2), x, **options, journal=tmp_path)
    with open(tmp_path / "trials.jsonl", "a") as file:
        file.write('{"key": "half a li')
    rest = Counted()
    found = fit_each(rest, x, **options, journal=tmp_path)
    assert rest.calls < 0.7 * total.calls
    again = Counted()
    fit_each(again, x, **options, journal=tmp_path)
    assert again.calls == 5 + 16 * 3  # to see that it is the same model, and answers twice alike
    for a, b in zip(whole, found, strict=True):
        assert torch.equal(a.sigmas, b.sigmas)
        assert a.after == b.after
        assert a.cost.search == b.cost.search
    with pytest.raises(ErkGuidError, match="another search"):
        fit_each(MIXTURE, x + 1, **options, journal=tmp_path)


def test_a_journal_of_another_network_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"evaluations": [4], "solver": "unipc", "trials": 1}
    fit_each(MIXTURE, start(16), **options, journal=tmp_path, journal_of="a")
    with pytest.raises(ErkGuidError, match="another search"):
        fit_each(MIXTURE, start(16), **options, journal=tmp_path, journal_of="b")


def test_a_journal_of_another_denoiser_is_refused(tmp_path: Path) -> None:
    """Catches: a fit in Python that answers for another model from the first one's journal."""
    options: dict[str, Any] = {"evaluations": 4, "solver": "unipc", "trials": 1}
    first = fit(MIXTURE, start(16), **options, journal=tmp_path)

    def rounded(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return MIXTURE(x, sigma).bfloat16().to(x.dtype)  # another machine may round otherwise

    assert torch.equal(fit(rounded, start(16), **options, journal=tmp_path).sigmas, first.sigmas)

    def other(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return MIXTURE(x, sigma) * 0.9

    def late(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return MIXTURE(x, sigma) * (0.9 if float(sigma) < 0.05 else 1)

    with pytest.raises(ErkGuidError, match="measured with another model"):
        fit(late, start(16), **options, journal=tmp_path)
    for missing in (None, "trials.jsonl"):
        if missing is not None:
            (tmp_path / missing).unlink()  # the fine solution is still the first one's
        with pytest.raises(ErkGuidError, match="measured with another model"):
            fit(other, start(16), **options, journal=tmp_path)
    labels = torch.zeros(16, 1)
    with pytest.raises(ErkGuidError, match="another search"):
        fit(lambda x, s, _: MIXTURE(x, s), start(16), **options, labels=labels, journal=tmp_path)
    to_zero = {**options, "denoise_to_zero": True}
    fit(MIXTURE, start(16), **to_zero, journal=tmp_path / "b")
    with pytest.raises(ErkGuidError, match="another search"):
        fit(MIXTURE, start(16), **to_zero, floor=0.001, journal=tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 1}, "no noise level to choose"),
        ({"evaluations": "8"}, "evaluations must be whole numbers, got '8'"),
        ({"evaluations": 8.5}, "evaluations must be whole numbers, got 8.5"),
        ({"evaluations": 3, "solver": "heun"}, "no noise level to choose"),
        ({"evaluations": 8, "guidance": ERKGuidance(0.5)}, "name the solver"),
        ({"evaluations": 8, "solver": "nosuch"}, "unknown solver"),
        ({"evaluations": 8, "trials": 0}, "trials must be"),
        ({"evaluations": 8, "batch": 7.5}, "batch must be a whole number"),
        ({"evaluations": 8, "sigma_min": 90}, "must be above 0 and below"),
        ({"evaluations": 8, "floor": 0.001}, "floor 0.001 must be above 0 and below sigma_min"),
        (
            {"evaluations": 8, "floor": 0.01, "sigma_min": 90, "denoise_to_zero": True},
            "sigma_min 90 must be below sigma_max 80",
        ),
        ({"evaluations": 8, "floor": 0.01, "denoise_to_zero": True}, "floor 0.01 must be above 0"),
        ({"evaluations": 8, "labels": torch.zeros(3)}, "3 labels for 16"),
        ({"evaluations": 8, "solver": Modal(response=(0.5,))}, "the response is fitted"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(MIXTURE, start(16), **options)
    with pytest.raises(ValueError, match="at least 16"):
        fit(MIXTURE, start(8), evaluations=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": None}, "solver must be a name"), ({"solver": Modal}, "make one: Modal"),
        ({"guidance": "auto", "solver": "heun"}, "guidance must be an object"),
        ({"labels": [1] * 16}, "labels must be a tensor"),
        ({"x": [1.0]}, "x must be a tensor"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fit(MIXTURE, **{"x": start(16), "evaluations": 8, **options})


def test_a_denoiser_without_finite_solutions_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit(lambda x, sigma: x * torch.nan, start(16), evaluations=6, solver="unipc")


def test_settings_of_a_fit_come_back(tmp_path: Path, fitted: Fitted) -> None:
    settings_of_fit(fitted, {"net": "digits"}).write(tmp_path / "s.json")
    made_for = read_settings(tmp_path / "s.json").made_for
    assert made_for["solver"] == "modal"
    assert made_for["denoise_to_zero"] is False
    assert made_for["schedule"] == tuple(fitted.sigmas.tolist())
    line = next(line for line in to_paste(fitted).splitlines() if line.startswith("x = "))
    solver = eval(line.partition("solver=")[2].removesuffix(")"))
    assert solver == fitted.solver
    # k-diffusion's lines give the same samples.
    levels, call = re.findall(
        r"^(sigmas = .*\]\)|x = sample_modal.*)$", to_paste(fitted), re.MULTILINE
    )
    names: dict[str, Any] = {
        "torch": torch, "noise": start(4) / 80, "sample_modal": partial(sample_modal, disable=True),
        "model": lambda x, sigma: MIXTURE(x, sigma[0]),
    }  # fmt: skip
    exec(f"{levels}\n{call}", names)
    sigmas = names["sigmas"].double()
    expected = erk_guid.sample(MIXTURE, sigmas[0] * names["noise"], sigmas, solver=fitted.solver)
    torch.testing.assert_close(names["x"], expected, rtol=1e-5, atol=1e-6)


def test_modal_takes_one_response_for_each_corrected_step() -> None:
    sigmas = karras_sigmas(6)[:-1]
    usual = tuple(prior_response(level) for level in sigmas.tolist()[1:-1])
    x = start(3)
    same = erk_guid.sample(MIXTURE, x, sigmas, solver=Modal(response=usual))
    assert torch.equal(same, erk_guid.sample(MIXTURE, x, sigmas, solver="modal"))
    other = erk_guid.sample(MIXTURE, x, sigmas, solver=Modal(response=(0, 0, 0, 0)))
    assert not torch.equal(same, other)
    with pytest.raises(ValueError, match=r"response has 3 numbers, but 6 noise levels"):
        Modal(response=(0.5, 0.5, 0.5)).plan(sigmas)
    for bad in ("half", (math.nan,), ("a",)):
        with pytest.raises(ValueError, match="finite numbers"):
            Modal(response=bad)  # type: ignore[arg-type]


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    """Paired log-normal errors with a true ratio of 0.8: 95 % of intervals should hold it."""
    generator = torch.Generator().manual_seed(5)
    held = 0
    for _ in range(100):
        before = torch.randn(64, dtype=torch.float64, generator=generator).mul(0.5).exp()
        noise = torch.randn(64, dtype=torch.float64, generator=generator).mul(0.2).exp()
        after = 0.8 * before * noise / math.exp(0.02)
        interval = bootstrap_ratio(after, before)
        held += interval.low <= 0.8 <= interval.high
    assert 88 <= held <= 99
