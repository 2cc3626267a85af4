"""Every solver: golden end points, order of convergence, counting, batches and dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import Counting
from support.problems import Mixture, error_after

import erk_guid
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import SOLVERS, make_solver


def test_the_golden_problem_is_ours(golden_solvers: dict[str, Any]) -> None:
    x = golden_solvers["latents"] * 3
    found = Mixture(golden_solvers)(x, torch.tensor(1.3, dtype=torch.float64))
    assert torch.allclose(found, golden_solvers["denoised_at_sigma_1p3_x3"], rtol=1e-12)


@pytest.mark.parametrize("number", range(19))
def test_golden_end_points(golden_solvers: dict[str, Any], number: int) -> None:
    case = dict(golden_solvers["cases"][number])
    name = {"dpm": "dpm2"}.get(case["solver"], case["solver"])
    levels = make_sigmas("polynomial", case["num_steps"], 0.002, 80, 7)[:-1]
    options = {
        k: case[k]
        for k in ("r", "deis_mode", "predict_x0", "variant", "lower_order_final")
        if k in case
    }
    if "max_order" in case:
        options["order"] = case["max_order"]
    guidance = erk_guid.ERKGuidance(case.get("w_stiff", 0.0), case.get("w_con", 0.0))
    levels = levels.float().double()  # the published time steps are float32 values
    found = erk_guid.sample(
        Mixture(golden_solvers), golden_solvers["latents"] * levels[0], levels,
        solver=make_solver(name, **options), guidance=guidance, afs=case.get("afs", False),
    )  # fmt: skip
    key = f"case{number}_f64" if f"case{number}_f64" in golden_solvers else f"case{number}"
    apart = (found - golden_solvers[key]).abs().max() / golden_solvers[key].abs().max()
    # 'tab' coefficients are the published sums of 10,000 left points; ours are exact.
    assert apart < (2e-3 if case.get("deis_mode") == "tab" else 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1),
        ("heun", {}, 2),  # catches: the second drift taken at sigma (order 1)
        ("dpm2", {}, 2),  # catches: r and 1 - r exchanged in the weights at r != 1/2
        ("dpm2", {"r": 0.7}, 2),
        ("deis", {"order": 2, "deis_mode": "rhoab"}, 2),  # catches: equal steps' weights
        ("deis", {"order": 3, "deis_mode": "rhoab"}, 3),
        ("deis", {"order": 4, "deis_mode": "rhoab"}, 4),
        ("deis", {"order": 2, "deis_mode": "tab"}, 2),
        ("deis", {"order": 3, "deis_mode": "tab"}, 3),  # catches: the density left out
        ("deis", {"order": 4, "deis_mode": "tab"}, 4),
        ("deis", {"order": 2, "deis_mode": "log"}, 2),
        ("deis", {"order": 3, "deis_mode": "log"}, 3),
        ("deis", {"order": 4, "deis_mode": "log"}, 4),
        ("res", {"order": 1}, 1),
        ("res", {"order": 2}, 2),  # catches: the exponential's sign
        ("res", {"order": 3}, 3),
        ("res", {"order": 4}, 4),
        ("ipndm_v", {"order": 2}, 2),
        ("dpmpp", {"order": 2, "lower_order_final": False}, 2),
        ("dpmpp", {"order": 2, "predict_x0": False, "lower_order_final": False}, 2),
        ("modal", {"order": 2}, 2),
        ("modal", {"order": 3}, 3),  # catches: the corrector given the predictor's nodes
        ("modal", {"order": 4}, 4),
        ("unipc", {"order": 2, "lower_order_final": False}, 3),
        ("unipc", {"order": 2, "predict_x0": False, "lower_order_final": False}, 3),
        ("unipc", {"order": 3, "lower_order_final": False}, 4),
        ("unipc", {"order": 3, "variant": "bh1", "predict_x0": False,
                   "lower_order_final": False}, 4),
    ],
)  # fmt: skip
def test_order_of_convergence(name: str, options: dict[str, Any], order: int) -> None:
    # The third-order corrector's leading error is small at first: slopes fall from 3.9 to 3.04.
    steps = 768 if name == "modal" and options["order"] == 3 else 192 if name == "modal" else 96
    coarse, fine = (error_after(n, name, options) for n in (steps, 2 * steps))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25), (coarse, fine)


def test_runs_with_fewer_points_than_the_order() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    # Where it ends is held to published numbers in test_diff_sampler.py.
    for name in ("deis", "ipndm", "ipndm_v", "dpmpp", "unipc", "res", "modal"):
        for count in (1, 2, 3):
            sigmas = erk_guid.karras_sigmas(count)
            found = erk_guid.sample(lambda x, s: x / (1 + s * s), 80 * x, sigmas, solver=name)
            assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("euler", 8), ("heun", 15), ("dpm2", 15), ("deis", 8), ("ipndm", 8), ("ipndm_v", 8),
     ("dpmpp", 8), ("unipc", 8), ("res", 8), ("modal", 8)],
)  # fmt: skip
@pytest.mark.parametrize("afs", [False, True])
def test_evaluations_are_counted(name: str, evaluations: int, afs: bool) -> None:
    counting = Counting(lambda x, s: x / (1 + s * s))
    infos: list[erk_guid.StepInfo] = []
    x = 80 * torch.randn(2, 3, dtype=torch.float64)
    sigmas = erk_guid.karras_sigmas(8)
    erk_guid.sample(counting, x, sigmas, solver=name, afs=afs, callback=infos.append)
    assert len(counting.sigmas) == infos[-1].nfe == evaluations - afs
    assert (80 in counting.sigmas) != afs


def test_afs_takes_the_first_drift_for_standard_normal_data() -> None:
    # Catches: a drift of x / sigma, or of x / (1 + sigma^2): for standard normal data the exact
    # one is sigma x / (1 + sigma^2), of which x / sqrt(1 + sigma^2) is off by 1 / (2 sigma^2).
    x = 80 * torch.randn(4, 3, dtype=torch.float64)
    levels = torch.tensor([80.0, 20.0], dtype=torch.float64)
    denoiser = Counting(lambda x, s: x / (1 + s * s))
    saved = erk_guid.sample(denoiser, x, levels, solver="euler", afs=True)
    assert denoiser.sigmas == []
    plain = erk_guid.sample(denoiser, x, levels, solver="euler")
    drift, exact = (x - saved) / 60, (x - plain) / 60
    torch.testing.assert_close(
        drift / exact, torch.full_like(x, 1 + 1 / (2 * 80**2)), rtol=1e-7, atol=0
    )


def test_guidance_goes_with_the_solvers_that_have_a_pair() -> None:
    x = 80 * torch.randn(2, 3, dtype=torch.float64)
    sigmas = erk_guid.karras_sigmas(8)
    guidance = erk_guid.ERKGuidance(0.3, 0.0)
    for name in SOLVERS:

        def run(g: erk_guid.Guidance | None, name: str = name) -> torch.Tensor:
            return erk_guid.sample(lambda x, s: x / (1 + s * s), x, sigmas, solver=name, guidance=g)

        assert torch.equal(run(None), run(erk_guid.ERKGuidance(0.0)))
        if name in ("heun", "dpm2", "deis"):
            assert not torch.equal(run(None), run(guidance))
        else:
            with pytest.raises(ValueError, match="solvers that have one: deis, dpm2, heun"):
                run(guidance)


def test_batches_and_dtypes() -> None:
    # A sample does not depend on its neighbours, and float32 follows float64.
    x = 80 * torch.randn(6, 3, dtype=torch.float64)
    sigmas = erk_guid.karras_sigmas(9)

    def tanh(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / (1 + sigma**2))

    for name in SOLVERS:
        whole = erk_guid.sample(tanh, x, sigmas, solver=name)
        parts = [erk_guid.sample(tanh, x[i : i + 2], sigmas, solver=name) for i in (0, 2, 4)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=1e-12)
        single = erk_guid.sample(tanh, x.float(), sigmas, solver=name)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_weights_give_the_step(golden_solvers: dict[str, Any], name: str) -> None:
    # What StepResult promises, and guidance of others may use: ours uses the last weight alone.
    net = Mixture(golden_solvers)
    y, memory = golden_solvers["latents"] * 80, None
    for step in make_solver(name).plan(make_sigmas("polynomial", 5, 0.002, 80, 7)):
        result, memory = step(net, y, memory)
        drift = sum(w * s.drift for w, s in zip(result.weights, result.stages, strict=True))
        again = result.stages[0].x + (result.sigma_next - result.sigma) * drift
        torch.testing.assert_close(again, result.x, rtol=1e-12, atol=1e-12)
        assert sum(result.weights) == pytest.approx(1)
        y = result.x
