"""DEIS and iPNDM: coefficients, and another program's end points."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erk_guid
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import DEIS, make_solver
from erk_guid.studies.accuracy import make_problem
from erk_guid.studies.accuracy.methods import OutsideMethod


@pytest.mark.parametrize("number", range(8, 12))
def test_golden_deis_coefficients(golden_solvers: dict[str, Any], number: int) -> None:
    case = golden_solvers["cases"][number]
    levels = make_sigmas("polynomial", case["num_steps"], 0.002, 80, 7)[:-1].tolist()
    steps = DEIS(case["max_order"], case["deis_mode"]).plan(levels)
    for i, expected in enumerate(golden_solvers[f"deis_coeffs_{number}"]):
        if not expected:
            continue  # the published program takes Euler's step here
        found = steps[i].weights  # type: ignore[attr-defined]
        # rhoab's are exact in both; the published quadrature of tab's is coarse in small ones.
        tolerance = 2e-3 if case["deis_mode"] == "tab" else 1e-5
        scale = max(map(abs, expected))
        assert found == pytest.approx(expected, abs=tolerance * scale)


def test_equal_steps_have_the_textbooks_weights() -> None:
    for order, expected in (
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ):
        steps = make_solver("ipndm", order=order).plan([5.0, 4.0, 3.0, 2.0, 1.0])
        found = [-w for w in steps[-1].weights]  # type: ignore[attr-defined]
        assert found == pytest.approx(expected)
        deis = make_solver("deis", order=order, deis_mode="rhoab").plan([5.0, 4.0, 3.0, 2.0, 1.0])
        assert [-w for w in deis[-1].weights] == pytest.approx(expected)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_in_log_sigma_is_diffusers(order: int) -> None:
    pytest.importorskip("diffusers")
    problem = make_problem("tree80", 20)
    for steps in (1, 2, 5, 9):
        sigmas = erk_guid.karras_sigmas(steps + 1)[:-1]
        method = OutsideMethod(
            name="", scheduler="DEISMultistepScheduler",
            options={"solver_order": order, "lower_order_final": False},
        )  # fmt: skip
        theirs = method.run(problem.denoiser, problem.start, sigmas)
        ours = erk_guid.sample(problem.denoiser, problem.start, sigmas, solver=DEIS(order, "log"))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
