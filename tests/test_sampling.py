"""The loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import Counting
from support.problems import gaussian, reusing
from torch import Tensor

import erk_guid
from erk_guid import ERKGuidance, Guided, sample
from erk_guid.models.networks.edm2 import Precond
from erk_guid.solvers import SOLVERS, EulerStep, Heun, HeunStep, Step, StepResult, make_solver


def nonlinear(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser whose ODE is dx/dsigma = x^2 cos(sigma), solved by 1 / (c - sin sigma)."""
    return x - sigma * x**2 * torch.cos(sigma)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    # Catches: Heun's average taken at one end (order 1), a step from the wrong level.
    c = torch.tensor([[1.9, 2.4, -3.0]], dtype=torch.float64)
    begin, end = 2.0, 0.5
    exact = 1 / (c - math.sin(end))
    errors = []
    counts = [40, 80, 160]
    for n in counts:
        sigmas = torch.linspace(begin, end, n + 1, dtype=torch.float64)
        x = erk_guid.sample(nonlinear, 1 / (c - math.sin(begin)), sigmas, solver=solver)
        errors.append(float((x - exact).abs().max()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.15)


def test_the_gaussian_is_solved() -> None:
    # An outside check of the ODE itself: |x| scales as the standard deviation of the noisy data.
    sigmas = erk_guid.karras_sigmas(256)[:-1]
    x = torch.randn(4, 3, dtype=torch.float64) * 80
    end = erk_guid.sample(gaussian, x, sigmas)
    factor = math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2))
    torch.testing.assert_close(end, x * factor, rtol=1e-3, atol=0)


def plain_heun(denoiser: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """EDM's deterministic sampler, written out."""
    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        d = (x - denoiser(x, s)) / s
        x_next = x + (t - s) * d
        if i < len(sigmas) - 2:
            d_prime = (x_next - denoiser(x_next, t)) / t
            x_next = x + (t - s) * (0.5 * d + 0.5 * d_prime)
        x = x_next
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guidance", [None, ERKGuidance(0.0, 0.0)])
def test_without_guidance_bitwise_plain_heun(
    cond: Precond, dtype: torch.dtype, guidance: ERKGuidance | None
) -> None:
    sigmas = erk_guid.karras_sigmas(6).to(dtype)
    x = torch.randn(2, 3, 16, 16, dtype=dtype) * sigmas[0]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return cond(x, sigma).to(dtype)

    ours = erk_guid.sample(denoiser, x, sigmas, guidance=guidance)
    assert torch.equal(ours, plain_heun(denoiser, x, sigmas))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("w_stiff", [0.0, 0.5])
def test_evaluations_are_2n_minus_1(num_steps: int, w_stiff: float) -> None:
    denoiser = Counting(gaussian)
    infos: list[erk_guid.StepInfo] = []
    sigmas = erk_guid.karras_sigmas(num_steps)
    erk_guid.sample(
        denoiser,
        torch.randn(2, 4) * 80,
        sigmas,
        guidance=ERKGuidance(w_stiff, 0.0),
        callback=infos.append,
    )
    assert len(denoiser.sigmas) == 2 * num_steps - 1 == infos[-1].nfe
    assert len(infos) == num_steps
    # Never at sigma = 0, where the drift has no value.
    assert min(denoiser.sigmas) > 0


def test_guidance_acts_from_the_second_step_and_never_on_the_last() -> None:
    infos: list[erk_guid.StepInfo] = []
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64) * 80
    erk_guid.sample(
        gaussian,
        x,
        erk_guid.karras_sigmas(6),
        guidance=ERKGuidance(0.5, 0.0),
        callback=infos.append,
    )
    with_pair = [info.stiffness is not None for info in infos]
    assert with_pair == [False, True, True, True, True, False]
    for info in infos[1:-1]:
        # One mode: the Jacobian of the drift is sigma / (0.25 + sigma^2) exactly.
        lam = info.sigma / (0.25 + info.sigma**2)
        torch.testing.assert_close(
            info.stiffness, torch.full([3], lam, dtype=torch.float64), rtol=1e-5, atol=0
        )
        assert info.correction_size is not None
        assert (info.correction_size > 0).all()


def test_correction_size_is_the_distance_guidance_moves() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64) * 80
    sigmas = erk_guid.karras_sigmas(6)[:3]
    infos: list[erk_guid.StepInfo] = []
    guided = erk_guid.sample(
        gaussian, x, sigmas, guidance=ERKGuidance(0.9, 0.0), callback=infos.append
    )
    plain = erk_guid.sample(gaussian, x, sigmas)
    moved = (guided - plain).norm(dim=1)
    torch.testing.assert_close(infos[-1].correction_size, moved, rtol=1e-9, atol=1e-12)


def test_step_info_is_frozen_and_chained() -> None:
    infos: list[erk_guid.StepInfo] = []
    x = torch.randn(2, 4) * 80
    end = erk_guid.sample(gaussian, x, erk_guid.karras_sigmas(3), callback=infos.append)
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos[0].step = 7  # type: ignore[misc]
    assert torch.equal(infos[0].x_before, x)
    assert torch.equal(infos[-1].x, end)
    assert torch.equal(infos[0].x, infos[1].x_before)
    assert [i.sigma_next for i in infos] == [*[i.sigma for i in infos[1:]], 0.0]


def test_a_callback_changes_nothing() -> None:
    x = torch.randn(2, 4) * 80
    for guidance in (None, ERKGuidance(0.5, 0.1)):
        watched = erk_guid.sample(
            gaussian, x, erk_guid.karras_sigmas(5), guidance=guidance, callback=lambda info: None
        )
        alone = erk_guid.sample(gaussian, x, erk_guid.karras_sigmas(5), guidance=guidance)
        assert torch.equal(watched, alone)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize(
    "guidance", [ERKGuidance(0.0), ERKGuidance(0.5, 0.0), erk_guid.ParameterFreeGuidance()]
)
def test_a_loop_of_ones_own_equals_sample(name: str, guidance: erk_guid.Guidance) -> None:
    # The loop of the documentation, for every solver and form of guidance.
    solver = make_solver(name)
    sigmas = erk_guid.karras_sigmas(7)
    x = start = torch.randn(3, 4, dtype=torch.float64) * sigmas[0]
    # Named here, not asked of the code: a check that refuses everything must fail this test.
    takes = {"heun", "dpm2"} if isinstance(guidance, erk_guid.ParameterFreeGuidance) else {
        "heun", "dpm2", "deis"
    }  # fmt: skip
    if guidance.active and name not in takes:
        with pytest.raises(ValueError, match=name):
            erk_guid.sample(gaussian, start, sigmas, solver=solver, guidance=guidance)
        return
    memory = None
    for step in solver.plan(sigmas):
        result, memory = step(gaussian, x, memory)
        x = guidance(result).x
    whole = erk_guid.sample(gaussian, start, sigmas, solver=solver, guidance=guidance)
    assert torch.equal(x, whole)


def test_a_solver_object_in_place_of_a_name() -> None:
    x = torch.randn(2, 4) * 80
    sigmas = erk_guid.karras_sigmas(4)
    for name in SOLVERS:
        by_name = erk_guid.sample(gaussian, x, sigmas, solver=name)
        assert torch.equal(by_name, erk_guid.sample(gaussian, x, sigmas, solver=make_solver(name)))


@pytest.mark.parametrize("shape", [(8, 2), (8, 3, 4, 4), (8, 2, 3, 4, 4)])
def test_a_batch_equals_its_parts(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 80
    sigmas = erk_guid.karras_sigmas(6)
    guidance = ERKGuidance(0.8, 0.05)
    whole = erk_guid.sample(gaussian, x, sigmas, guidance=guidance)
    parts = [erk_guid.sample(gaussian, part, sigmas, guidance=guidance) for part in x.split(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=0)


def test_a_schedule_that_ends_above_zero_has_no_euler_step() -> None:
    denoiser = Counting(gaussian)
    sigmas = torch.tensor([4.0, 2.0, 1.0])
    erk_guid.sample(denoiser, torch.randn(1, 2), sigmas)
    assert denoiser.sigmas == [4, 2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_its_own_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 8) * 80).to(dtype)
    end = erk_guid.sample(gaussian, x, erk_guid.karras_sigmas(6), guidance=ERKGuidance(0.5, 0.1))
    assert end.dtype == dtype
    assert torch.isfinite(end).all()


def test_a_number_as_guidance_names_the_wrapper() -> None:
    with pytest.raises(TypeError, match="ModelGuidance"):
        erk_guid.sample(gaussian, torch.zeros(1, 2), erk_guid.karras_sigmas(2), guidance=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least two"),
        ([1.0, 2.0], r"sigmas\[1\] = 2.0 follows 1.0"),
        ([1.0, 1.0, 0.0], r"sigmas\[1\] = 1.0 follows 1.0"),
        ([1.0, float("nan")], r"sigmas\[1\] is nan"),
        ([float("inf"), 1.0], r"sigmas\[0\] is inf"),
        ([1.0, -1.0], r"sigmas\[1\] is -1.0"),
    ],
)
def test_unusable_sigmas(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        erk_guid.sample(gaussian, torch.zeros(1, 2), torch.tensor(sigmas))


def test_other_errors_name_what_is_wrong() -> None:
    x, sigmas = torch.zeros(1, 2), erk_guid.karras_sigmas(2)
    with pytest.raises(ValueError, match="unknown solver 'rk45'; known: deis, dpm2"):
        erk_guid.sample(gaussian, x, sigmas, solver="rk45")
    with pytest.raises(ValueError, match=r"'euler' has no embedded pair.*0\.5.*heun"):
        erk_guid.sample(gaussian, x, sigmas, solver="euler", guidance=ERKGuidance(0.5))
    erk_guid.sample(gaussian, x, sigmas, solver="euler", guidance=ERKGuidance(0.0))
    with pytest.raises(ValueError, match=r"returned \[1, 3\] for an x of \[1, 2\]"):
        erk_guid.sample(lambda x, sigma: torch.zeros(1, 3), x, sigmas)
    with pytest.raises(ValueError, match="floating tensor"):
        erk_guid.sample(gaussian, torch.zeros(1, 2, dtype=torch.int64), sigmas)
    with pytest.raises(ValueError, match="EulerStep"):
        HeunStep(1.0, 0.0)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_denoiser_may_return_the_same_tensor_each_time(solver: str) -> None:
    # Catches: a history of references to the output (dpmpp 37 %, unipc 35 % off).
    x, sigmas = 80 * torch.randn(3, 4, dtype=torch.float64), erk_guid.karras_sigmas(8)
    told: dict[bool, list[Tensor]] = {False: [], True: []}
    found = [
        erk_guid.sample(
            reusing(gaussian) if again else gaussian, x, sigmas, solver=solver,
            callback=lambda info, again=again: told[again].append(info.denoised),
        )
        for again in (False, True)
    ]  # fmt: skip
    assert torch.equal(*found)
    assert torch.equal(torch.stack(told[False]), torch.stack(told[True]))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_denoiser_that_edits_its_x(solver: str) -> None:
    x, sigmas = 80 * torch.randn(3, 4), erk_guid.karras_sigmas(5).float()
    plain = erk_guid.sample(gaussian, x, sigmas, solver=solver)

    def editing(x: Tensor, sigma: Tensor) -> Tensor:
        return x.mul_(0.25 / (0.25 + sigma**2))

    def editing_sigma(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian(x, sigma.mul_(2))

    levels = sigmas.clone()
    with pytest.raises(ValueError, match=r"edited its sigma in place.*sigma\.clone"):
        erk_guid.sample(editing_sigma, x, sigmas, solver=solver)
    assert torch.equal(levels, sigmas)
    with pytest.raises(ValueError, match=r"edited its x in place.*work on a copy"):
        erk_guid.sample(editing, x.clone(), sigmas, solver=solver)
    with torch.inference_mode():
        # Edits are not counted here: the denoiser has a copy, and nothing else sees them.
        start = x.clone()
        found = erk_guid.sample(editing, start, sigmas, solver=solver)
        torch.testing.assert_close(found, plain)
        assert torch.equal(start, x)


def test_what_is_no_guidance_and_no_churn_is_named() -> None:
    x, sigmas = torch.randn(2, 3), erk_guid.karras_sigmas(3)
    for guidance in (erk_guid.ParameterFreeGuidance, ERKGuidance, "auto"):
        with pytest.raises(TypeError, match=r"guidance must be an erk_guid\.ERKGuidance"):
            erk_guid.sample(gaussian, x, sigmas, guidance=guidance)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="churn must be an object"):
        erk_guid.sample(gaussian, x, sigmas, churn=10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callback must be a function"):
        erk_guid.sample(gaussian, x, sigmas, callback=3)  # type: ignore[arg-type]
    for dtype in (torch.int32, "float32"):
        with pytest.raises(ValueError, match="dtype must be a floating one"):
            erk_guid.edm_sampler(gaussian, x, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="afs must be True or False, got 'no'"):
        erk_guid.sample(gaussian, x, sigmas, afs="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be a floating tensor .*, got ndarray"):
        erk_guid.sample(gaussian, x.numpy(), sigmas)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"erk=ParameterFreeGuidance\(\)"):
        erk_guid.edm_sampler(gaussian, x, w_stiff="auto")  # type: ignore[arg-type]


def test_what_is_no_solver_is_named() -> None:
    x, sigmas = torch.randn(2, 3), erk_guid.karras_sigmas(3)
    for solver, message in (
        (object(), "solver must be a name or an erk_guid.solvers.Solver, got object"),
        (lambda *args: None, "got function"),
        (EulerStep(1.0, 0.5), "got EulerStep"),
        (Heun, r"solver is the class Heun; make one: Heun\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            erk_guid.sample(gaussian, x, sigmas, solver=solver)  # type: ignore[arg-type]


def test_a_solver_or_guidance_that_breaks_its_contract() -> None:
    # Catches: a solver that ends above the last level, whose x is returned as the result; samples
    # of another shape, which broadcast.
    class Short(Heun):
        def steps(self, levels: Sequence[float]) -> Sequence[Step]:
            return super().steps(levels)[:-1]

    class Narrow(ERKGuidance):
        def __call__(self, result: StepResult) -> Guided:
            return Guided(result.x[:1])

    x, sigmas = torch.randn(4, 2), erk_guid.karras_sigmas(6)
    with pytest.raises(ValueError, match=r"Short\.steps must return a step for each of the 5"):
        sample(lambda x, sigma: x / (1 + sigma**2), x, sigmas, solver=Short())
    with pytest.raises(ValueError, match=r"step 0 of Heun.*shape \[4, 2\] into \[1, 2\]"):
        sample(lambda x, sigma: x / (1 + sigma**2), x, sigmas, guidance=Narrow(0.5))
