"""The bound on the published correction."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from conftest import oracle

import erk_guid
from erk_guid.guidance import Guidance, Pair
from erk_guid.solvers import make_solver
from erk_guid.studies.calibration.sweep import Task, distances


def test_a_bound_limits_the_correction_and_nothing_else() -> None:
    torch.manual_seed(0)
    x, dx, f, df = torch.randn(4, 5, 7, dtype=torch.float64)
    pair = Pair(x, x - dx, f, f - df, 0.7)
    free = erk_guid.correction(*pair, Guidance(1.0, 0.0))
    size = free.norm(dim=1)
    spread = size * torch.tensor([0.5, 1, 4, 6, 100.0])  # a bound of 0.2 reaches the first three
    held = erk_guid.correction(*pair, Guidance(1.0, 0.0, bound=0.2), spread)
    assert held.norm(dim=1) == pytest.approx((size * torch.tensor([0.1, 0.2, 0.8, 1, 1])).numpy())
    torch.testing.assert_close(held / held.norm(dim=1)[:, None], free / size[:, None])
    assert torch.equal(held[3:], free[3:])
    nothing = erk_guid.correction(*pair, Guidance(1.0, 0.0, bound=0.2), 0 * spread)
    assert (nothing == 0).all()
    with pytest.raises(ValueError, match="a bound is a multiple of spread"):
        erk_guid.correction(*pair, Guidance(1.0, 0.0, bound=0.2))
    # A correction that overflowed is held like any other, and gradients pass.
    huge = erk_guid.correction(*pair, Guidance(1e200, 0.0, bound=0.2), spread)
    torch.testing.assert_close(huge.norm(dim=1), 0.2 * spread)
    start = x.clone().requires_grad_()
    gated = Guidance(0.5, 1e3, bound=0.2)  # shut for all: 0 over 0, were it a quotient
    erk_guid.correction(start, *pair[1:], gated, spread).sum().backward()
    assert start.grad is not None
    assert start.grad.isfinite().all()
    with pytest.raises(ValueError, match="bound must not be negative, got -1"):
        Guidance(1.0, bound=-1)


def test_the_spread_is_the_distance_to_the_lower_order() -> None:
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / (1 + sigma**2))

    x = 5 * torch.randn(3, 4, dtype=torch.float64)
    levels = [5.0, 3.0, 1.5, 0.7]

    def ends(name: str, **options: object) -> list[torch.Tensor]:
        """Where each step leads from the same points, those of the first solver called."""
        state, y, found = None, x, []
        for i, step in enumerate(make_solver(name, **options).plan(levels)):
            s, t = (torch.tensor(v, dtype=torch.float64) for v in levels[i : i + 2])
            result, state = step(denoise, y, s, t, state)
            found.append(result)
            y = result.x
        return found

    heun = ends("heun")
    euler = x + (3 - 5) * (x - denoise(x, torch.tensor(5.0))) / 5
    torch.testing.assert_close(heun[0].spread(), (heun[0].x - euler).norm(dim=1))
    # The same history, weights of order 3 and 2 at the last step.
    third = ends("deis", order=3)
    weights = make_solver("deis", order=2).plan(levels)[2].weights
    drifts = [result.drift for result in third[::-1]]
    before = third[1].x
    lower = before + weights[0] * drifts[0] + weights[1] * drifts[1]
    torch.testing.assert_close(third[2].spread(), (third[2].x - lower).norm(dim=1))
    assert third[0].spread is None


def test_a_step_without_a_spread_cannot_be_bounded() -> None:
    class Bare:
        has_pair = True

        def __call__(self, *args: Any) -> Any:
            result, state = erk_guid.HeunStep()(*args)
            return dataclasses.replace(result, spread=None), state

    x, sigmas = torch.randn(2, 3), torch.tensor([3.0, 2, 1])
    with pytest.raises(ValueError, match="a bound is a multiple of spread"):
        erk_guid.sample(
            lambda x, s: x / 2, x, sigmas, solver=Bare(), guidance=Guidance(1, 0, bound=0.2)
        )
    task = Task(lambda x, s: x / 2, x, None, sigmas, 2)
    with pytest.raises(ValueError, match="a bound is a multiple of spread"):
        distances(task, [Bare()] * 2, [Guidance(1, 0, bound=0.2)], x)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["tree5", "tree80", "gauss"])
def test_bounded_deis_is_never_twice_as_bad(problem: str) -> None:
    # Unbounded, half of such runs are, up to a hundred thousand times.
    denoiser, start, end = oracle(problem)

    def error(evaluations: int, guidance: Guidance, **options: Any) -> float:
        sigma_max = 5 if problem == "tree5" else 80
        sigmas = erk_guid.karras_sigmas(evaluations + 1, sigma_max=sigma_max)[:-1]
        found = erk_guid.sample(
            denoiser, start, sigmas, solver="deis", guidance=guidance, **options
        )
        return float((found - end).norm(dim=1).mean())

    for order, mode, evaluations in product((1, 2, 3, 4), ("tab", "rhoab"), (6, 20)):
        options = {"order": order, "deis_mode": mode}
        plain = error(evaluations, Guidance(), **options)
        for w_stiff, w_con in product((0.1, 2.0), (0.0, 0.5)):
            held = error(evaluations, Guidance(w_stiff, w_con, bound=0.2), **options)
            assert held < 1.05 * plain, (order, mode, evaluations, w_stiff, w_con)
        if problem == "tree5" and evaluations == 20:
            assert error(evaluations, Guidance(2.0, 0.0), **options) > 2 * plain
