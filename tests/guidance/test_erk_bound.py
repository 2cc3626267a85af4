"""The bound on the published correction."""

from __future__ import annotations

import dataclasses
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from conftest import oracle

import erk_guid
from erk_guid.guidance import ERKGuidance
from erk_guid.solvers import Heun, HeunStep, Memory, Pair, StepResult, make_solver
from erk_guid.studies.fitting.sweep import Task, distances


def test_a_bound_limits_the_correction_and_nothing_else() -> None:
    torch.manual_seed(0)
    x, dx, f, df = torch.randn(4, 5, 7, dtype=torch.float64)
    pair = Pair(x, x - dx, f, f - df, 0.7)
    free = ERKGuidance(1.0, 0.0).correction(pair)
    size = free.norm(dim=1)
    far = size * torch.tensor([0.5, 1, 4, 6, 100.0])  # a bound of 0.2 reaches the first three
    x_error = far[:, None] * torch.nn.functional.normalize(torch.randn(5, 7).double())
    bounded = ERKGuidance(1.0, 0.0, bound=0.2)
    held = bounded.correction(pair, x_error)
    assert held.norm(dim=1) == pytest.approx((size * torch.tensor([0.1, 0.2, 0.8, 1, 1])).numpy())
    torch.testing.assert_close(held / held.norm(dim=1)[:, None], free / size[:, None])
    assert torch.equal(held[3:], free[3:])
    nothing = bounded.correction(pair, 0 * x_error)
    assert (nothing == 0).all()
    with pytest.raises(ValueError, match=r"bound 0\.2 is a multiple of the distance"):
        bounded.correction(pair)
    # A correction that overflowed is held like any other, and gradients pass.
    huge = ERKGuidance(1e200, 0.0, bound=0.2).correction(pair, x_error)
    torch.testing.assert_close(huge.norm(dim=1), 0.2 * far)
    start = x.clone().requires_grad_()
    gated = ERKGuidance(0.5, 1e3, bound=0.2)  # shut for all: 0 over 0, were it a quotient
    gated.correction(pair._replace(x_high=start), x_error).sum().backward()
    assert start.grad is not None
    assert start.grad.isfinite().all()
    with pytest.raises(ValueError, match="bound must not be negative, got -1"):
        ERKGuidance(1.0, bound=-1)


def test_the_error_is_the_difference_to_the_lower_order() -> None:
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / (1 + sigma**2))

    x = 5 * torch.randn(3, 4, dtype=torch.float64)
    levels = [5.0, 3.0, 1.5, 0.7]

    def ends(name: str, **options: object) -> list[StepResult]:
        """Where each step leads from the same points, those of the first solver called."""
        memory, y, found = None, x, []
        for step in make_solver(name, **options).plan(levels):
            result, memory = step(denoise, y, memory)
            found.append(result)
            y = result.x
        return found

    heun = ends("heun")
    euler = x + (3 - 5) * (x - denoise(x, torch.tensor(5.0))) / 5
    assert heun[0].x_error is not None
    torch.testing.assert_close(heun[0].x_error(), heun[0].x - euler)
    # The same history, weights of order 3 and 2 at the last step.
    third = ends("deis", order=3)
    weights = make_solver("deis", order=2).plan(levels)[2].weights
    drifts = [result.stages[0].drift for result in third[::-1]]
    before = third[1].x
    lower = before + weights[0] * drifts[0] + weights[1] * drifts[1]
    assert third[2].x_error is not None
    torch.testing.assert_close(third[2].x_error(), third[2].x - lower)
    assert third[0].x_error is None


def test_a_step_without_an_error_cannot_be_bounded() -> None:
    class Bare(HeunStep):
        def __call__(self, *args: Any) -> tuple[StepResult, Memory]:
            result, memory = super().__call__(*args)
            return dataclasses.replace(result, x_error=None), memory

    class BareSolver(Heun):
        def steps(self, levels: Any) -> list[HeunStep]:
            return [Bare(s, t) for s, t in pairwise(levels)]

    x, sigmas = torch.randn(2, 3), torch.tensor([3.0, 2, 1])
    with pytest.raises(ValueError, match=r"bound 0\.2 is a multiple of the distance"):
        erk_guid.sample(
            lambda x, s: x / 2,
            x,
            sigmas,
            solver=BareSolver(),
            guidance=ERKGuidance(1, 0, bound=0.2),
        )
    task = Task(lambda x, s: x / 2, x, None, sigmas, 2)
    with pytest.raises(ValueError, match=r"bound 0\.2 is a multiple of the distance"):
        distances(task, BareSolver().plan(sigmas), [ERKGuidance(1, 0, bound=0.2)], x)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["tree5", "tree80", "gauss"])
def test_bounded_deis_is_never_twice_as_bad(problem: str) -> None:
    # Unbounded, half of such runs are, up to a hundred thousand times.
    denoiser, start, end = oracle(problem)

    def error(evaluations: int, guidance: ERKGuidance, **options: Any) -> float:
        sigma_max = 5 if problem == "tree5" else 80
        sigmas = erk_guid.karras_sigmas(evaluations + 1, sigma_max=sigma_max)[:-1]
        found = erk_guid.sample(
            denoiser, start, sigmas, solver=make_solver("deis", **options), guidance=guidance
        )
        return float((found - end).norm(dim=1).mean())

    for order, mode, evaluations in product((1, 2, 3, 4), ("tab", "rhoab"), (6, 20)):
        options = {"order": order, "deis_mode": mode}
        plain = error(evaluations, ERKGuidance(), **options)
        for w_stiff, w_con in product((0.1, 2.0), (0.0, 0.5)):
            held = error(evaluations, ERKGuidance(w_stiff, w_con, bound=0.2), **options)
            assert held < 1.05 * plain, (order, mode, evaluations, w_stiff, w_con)
        if problem == "tree5" and evaluations == 20:
            assert error(evaluations, ERKGuidance(2.0, 0.0), **options) > 2 * plain
