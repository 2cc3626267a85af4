"""The search for settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from support.tree import SIGMAS, TREE, starts
from torch import Tensor

import erk_guid
from erk_guid import (
    ERKGuidance,
    Guidance,
    ParameterFreeGuidance,
    RectifiedFlow,
    calibrate,
    karras_sigmas,
    sample,
)
from erk_guid.generation.images import draw
from erk_guid.generation.seeds import SeededNoise
from erk_guid.solvers import DEIS, Heun, Modal
from erk_guid.studies.accuracy.problems import high_dimensional_mixture, solve_finely
from erk_guid.studies.fitting import calibration as search
from erk_guid.studies.fitting.calibration import PLAIN


class Judge:
    """Errors of the end points, by separate runs and another fine solution."""

    def __init__(self, x: Tensor) -> None:
        fine = karras_sigmas(200, sigma_max=5.0)[:-1]
        self.x = x
        self.end = sample(TREE, x, fine, solver=DEIS(4, "rhoab"))

    def __call__(self, guidance: Guidance, solver: str = "heun") -> Tensor:
        found = sample(TREE, self.x, SIGMAS[:-1], solver=solver, guidance=guidance)
        return (found - self.end).norm(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["heun", "dpm2", "deis"])
def test_what_it_says_of_its_settings_is_so(solver: str) -> None:
    """Every number in the table, by runs of their own."""
    calls = 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x)
        return TREE(x, sigma)

    x = starts(40, 0)
    found = calibrate(counted, x, SIGMAS, solver=solver)
    assert found.nfe == calls
    full = [trial for trial in found.trials if trial.samples == len(x)]
    assert len(full) >= 6
    error = Judge(x)
    plain = error(ERKGuidance(), solver)
    for trial in full:
        alone = error(trial.guidance, solver)
        # The fine solutions differ by a little.
        assert trial.error == pytest.approx(float(alone.mean()), abs=2e-3 * float(plain.mean()))
        assert trial.ratio == pytest.approx(float(alone.mean() / plain.mean()), abs=2e-3)
    scores = [trial.score for trial in full]
    assert scores == sorted(scores)
    assert found.chosen.score in (scores[0], 1.0)
    assert any(t.guidance == ParameterFreeGuidance() for t in full) == (solver != "deis")
    assert found.reference_error < 0.02
    assert f"| {found.plain.error:.4g}" in found.table().replace("**", "")


def test_how_far_it_is() -> None:
    # Catches: a limit that is passed before the end, or that does not come down; trials that are
    # kept at the end only, so that an interrupted search leaves nothing.
    said: list[tuple[int, int]] = []
    kept: list[tuple[search.Trial, ...]] = []
    found = calibrate(
        TREE, starts(40, 0), SIGMAS, batch=16,
        progress=lambda done, most: said.append((done, most)),
        note=lambda trials: kept.append(tuple(trials)),
    )  # fmt: skip
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1][0] == found.nfe
    assert all(done <= most for done, most in said)
    assert said[0][1] > said[-1][1] >= found.nfe
    assert said[0][1] < 4 * found.nfe  # an estimate, and not any large number
    assert len(kept) > 4
    assert [len(trials) for trials in kept] == sorted(map(len, kept))
    assert repr(kept[-1]) == repr(found.trials)  # NaN equals nothing
    assert PLAIN in [trial.guidance for trial in kept[0]]


def test_the_standard_error_is_that_of_the_ratio() -> None:
    """Over draws of the samples, the ratio scatters as the one number says; the error of the
    guided mean alone would be three times that."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, 50, dtype=torch.float64, generator=generator)
    plain = (0.5 * noise[0]).exp()
    guided = plain * (0.8 + 0.15 * noise[1])
    ratios = guided.mean(1) / plain.mean(1)
    setting = ERKGuidance(0.5, 0.5)
    trials = search._Trials(None, (), torch.empty(0), "end")  # type: ignore[arg-type]
    spreads = []
    for k in range(len(plain)):
        trials.values = {ERKGuidance(): plain[k], setting: guided[k]}
        spreads.append(trials.trial(setting).ratio_error)
    assert np.mean(spreads) == pytest.approx(float(ratios.std()), rel=0.1)


def test_luck_and_scatter_are_charged() -> None:
    """The setting with the lesser mean, which one sample in ten ruins, does not come first."""
    plain = torch.ones(50, dtype=torch.float64)
    lucky = torch.where(torch.arange(50) % 10 == 0, 3.0, 0.5).double()
    task = search.Task(TREE, torch.empty(50, 1), None, SIGMAS, 8)
    trials = search._Trials(task, (), torch.empty(0), "end")
    trials.values = {ERKGuidance(): plain, ERKGuidance(1.0): lucky, ERKGuidance(0.5): 0.8 * plain}
    assert float(lucky.mean()) < 0.8
    # 0.8, then 0.75 + 2 * 0.107, then 1.
    assert [t.guidance.w_stiff for t in trials.all_of()] == [0.5, 1.0, 0.0]


def test_a_coarse_reference_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "REFERENCE_EVALUATIONS", 1)
    monkeypatch.setattr(search, "REFERENCE_SUBSTEPS", 1)
    x = starts(8, 0)
    refined = calibrate(TREE, x, SIGMAS, auto=False)
    monkeypatch.setattr(search, "REFINEMENTS", 0)
    coarse = calibrate(TREE, x, SIGMAS, auto=False)
    assert coarse.reference_error > search.REFERENCE_ERROR
    assert refined.reference_error < coarse.reference_error / 3
    # What it says of itself is so.
    error = Judge(x)
    monkeypatch.setattr(search, "FEWEST", 8)
    task = search.Task(TREE, x, None, SIGMAS[:-1], 8)
    path, said = search._reference(task, Heun().plan(SIGMAS[:-1].tolist()), Modal())
    true = float((path[-1] - error.end).norm(dim=1).mean() / error(ERKGuidance()).mean())
    assert said == pytest.approx(true, rel=0.5)


@pytest.mark.slow
def test_it_beats_a_grid_on_other_points() -> None:
    """On a mixture in 24 dimensions, where no few points decide: at most 3 % above the best of 12
    by 8 settings, on points not searched on, or within the standard error."""
    mixture = high_dimensional_mixture(24, 8)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        clean = mixture.sample(count, generator)
        return clean + 80 * torch.randn(clean.shape, dtype=torch.float64, generator=generator)

    sigmas = karras_sigmas(8)
    found = calibrate(mixture, drawn(64), sigmas, auto=False)
    held = drawn(300)
    end = solve_finely(mixture, held, 0.002, 80, 121)

    def error(guidance: Guidance) -> Tensor:
        return (sample(mixture, held, sigmas[:-1], guidance=guidance) - end).norm(dim=1)

    grid = {
        (w_stiff, w_con): error(ERKGuidance(w_stiff, w_con)).mean()
        for w_stiff in (0.2, 0.3, 0.408, 0.5, 0.6, 0.75, 0.9, 1, 1.25, 1.5, 2, 2.5)
        for w_con in (0, 0.1, 0.3, 0.5, 1, 2, 5, 20)
    }
    ours = error(found.guidance)
    best = min(grid, key=lambda setting: grid[setting])
    apart = ours - error(ERKGuidance(*best))
    tie = float(apart.std()) / len(ours) ** 0.5
    assert float(apart.mean()) <= max(0.03 * float(grid[best]), tie)
    assert ours.mean() < error(ERKGuidance()).mean()
    assert found.nfe < 96 * 256 * 14 / 20


def test_labels_go_with_their_rows() -> None:
    """Rows are split and reordered: a label that went astray would move its sample."""
    x = starts(12, 0)
    shifts = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = calibrate(TREE, x, SIGMAS, batch=5)
    moved = calibrate(
        lambda x, sigma, labels: TREE(x - labels, sigma) + labels,
        x + shifts, SIGMAS, labels=shifts, batch=5,
    )  # fmt: skip
    assert moved.guidance == alone.guidance
    assert moved.chosen.error == pytest.approx(alone.chosen.error, rel=1e-9)


def test_a_flow_matching_model() -> None:
    # The same trajectories in a flow's terms: what is gained is measured against the same end.
    times = torch.tensor([0.95, 0.85, 0.7, 0.5, 0.25, 0.05, 0.01], dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return TREE(x / (1 - t), t / (1 - t))

    x = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = calibrate(denoiser, x, times, process=RectifiedFlow())
    end = 0.99 * sample(
        TREE, x / 0.05, karras_sigmas(200, sigma_min=0.01 / 0.99, sigma_max=19.0)[:-1],
        solver=DEIS(4, "rhoab"),
    )  # fmt: skip
    for trial in found.trials[:4]:
        made = sample(denoiser, x, times, process=RectifiedFlow(), guidance=trial.guidance)
        # Errors are those in sigma, of x / (1 - t).
        error = float((made - end).norm(dim=1).mean()) / 0.99
        assert trial.error == pytest.approx(error, rel=0.02)
    assert found.guidance == ParameterFreeGuidance()
    with pytest.raises(
        ValueError, match=r"times of RectifiedFlow run from 1 .* down to 0 .*, got 5"
    ):
        calibrate(TREE, x, SIGMAS, process=RectifiedFlow())


def test_no_guidance_where_there_is_nothing_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    # All data at one point: the solution is a straight line, and the plain solver exact.
    point = calibrate(lambda x, sigma: torch.zeros_like(x), starts(8, 0), SIGMAS)
    assert point.guidance == ERKGuidance()
    assert point.plain.error < 1e-12
    # And where the gain may be chance: nothing is so good as to be a million standard errors off.
    monkeypatch.setattr(search, "CERTAINTY", 1e6)
    assert calibrate(TREE, starts(8, 0), SIGMAS).guidance == ERKGuidance()


@pytest.mark.slow
def test_the_other_objective_and_the_candidates_form() -> None:
    x = starts(24, 0)
    end = calibrate(TREE, x, SIGMAS, auto=False, guidance=ERKGuidance(gate="step", bound=0.3))
    steps = calibrate(TREE, x, SIGMAS, auto=False, objective="steps")
    for trial in end.trials:
        assert isinstance(trial.guidance, ERKGuidance)
        if trial.guidance.active:
            assert (trial.guidance.gate, trial.guidance.bound) == ("step", 0.3)
    # The objective is what the column of the other says of the same setting.
    assert steps.chosen.ratio == pytest.approx(steps.chosen.step_ratio, rel=1e-9)
    assert steps.chosen.ratio <= 1
    assert steps.chosen.guidance != calibrate(TREE, x, SIGMAS, auto=False).guidance


def test_the_vertex_of_a_parabola() -> None:
    def of(w: float) -> float:
        return 0.8 + math.log(w / 0.7) ** 2

    valley = search._valley({w: of(w) for w in search.LADDER}, 1.5)
    assert valley.inside
    assert valley.place == pytest.approx(0.7)
    assert search._valley({0.2: 1.0, 0.3: 1.1}, 1.5).place == pytest.approx(0.2 / 1.5)
    assert search._valley({0.2: 1.0, 0.3: 0.9}, 1.5).place == pytest.approx(0.45)
    # Beyond the best everything may have overflowed.
    assert search._valley({0.2: 1.0, 0.3: 0.9, 0.45: math.inf}, 1.5) == (0.3, 0.9, True)


def test_thresholds_lie_between_the_steps() -> None:
    assert search._thresholds([0.04, 0.25, 1.0]) == [0.0, 0.1, 0.5]
    assert search._thresholds([0.3, 0.3]) == [0.0]
    many = search._thresholds([2.0**k for k in range(30)])
    assert len(many) == search.THRESHOLDS
    assert many[1] == 1.4  # the ends are kept
    assert many[-1] == search._rounded(2**28.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2)}, "at least 4 samples"),
        ({"x": torch.zeros(8, 2, dtype=torch.int64)}, "floating tensor"),
        ({"labels": torch.zeros(3, 2)}, "3 labels for 8 samples"),
        ({"objective": "fid"}, "objective must be end or steps, got 'fid'"),
        ({"solver": "modal"}, "no embedded pair"),
        ({"solver": "huen"}, "unknown solver 'huen'"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"sigmas": SIGMAS.flip(0)}, "sigmas must fall strictly"),
        ({"sigmas": SIGMAS[-3:]}, "2 noise levels above 0 .* Heun needs three"),
        ({"sigmas": SIGMAS[-2:]}, "1 noise level above 0"),
        ({"denoiser": lambda x, s: x * torch.nan}, "does not end at finite values"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"denoiser": TREE, "x": starts(8, 0), "sigmas": SIGMAS, **change}
    with pytest.raises(ValueError, match=message):
        calibrate(call.pop("denoiser"), call.pop("x"), call.pop("sigmas"), **call)


SEARCHED = list(range(50000, 50032))
"""Half of what the command takes by default, to be quick."""


def test_a_sample_that_overflows_is_said() -> None:
    x = starts(12, 0)
    x[9] = math.nan  # not among the few that are tried first
    with pytest.raises(ValueError, match="does not end at finite values"):
        calibrate(TREE, x, SIGMAS)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6, 8, 12])
def test_the_shipped_model_against_an_exhaustive_grid(steps: int) -> None:
    """Fidelity on 256 images that were not searched on, against the best of 96 settings there.

    The grid, the plain solver's errors and the end points were made by
    benchmarks/calibration.py, the latter with 256 evaluations of DEIS.
    """
    with np.load(DATA / "calibration.npz") as arrays:
        ends = torch.from_numpy(arrays["ends"]).float()
        plain, best = (torch.from_numpy(arrays[f"{name}_{steps}"]) for name in ("plain", "best"))
        seeds = arrays["seeds"].tolist()
    net = erk_guid.load("digits").net
    sigmas = karras_sigmas(steps)

    def drawn(seeds: list[int]) -> tuple[Tensor, Tensor]:
        noise, labels = draw(net, SeededNoise(seeds, torch.device("cpu")), None)
        assert labels is not None
        return 80 * noise, labels

    x, labels = drawn(SEARCHED)
    found = calibrate(net, x, sigmas, labels=labels, auto=False)
    assert found.nfe < 96 * 256 * (2 * steps - 2) / 20
    assert not set(seeds) & set(SEARCHED)
    ours = []
    for i in range(0, len(seeds), 32):
        x, labels = drawn(seeds[i : i + 32])
        end = sample(
            lambda x, sigma, labels=labels: net(x, sigma, labels), x, sigmas[:-1],
            guidance=found.guidance,
        )  # fmt: skip
        ours.append((end - ends[i : i + 32]).flatten(1).norm(dim=1))
    apart = torch.cat(ours).double() - best
    tie = float(apart.std()) / len(seeds) ** 0.5
    assert float(apart.mean()) <= max(0.03 * float(best.mean()), tie)
    assert float(torch.cat(ours).mean()) < float(plain.mean())
