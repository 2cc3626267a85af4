"""Processes: sampling in a process's own time is sampling in sigma."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import oracle
from torch import Tensor

import erk_guid
from erk_guid import VE, VP, Churn, ERKGuidance, ParameterFreeGuidance, RectifiedFlow, UnitVariance
from erk_guid.processes import LARGEST_SIGMA, Process
from erk_guid.solvers import SOLVERS, make_solver

TREE = oracle("tree5")[0]


@dataclass(frozen=True)
class Cosine(Process):
    """Nichol and Dhariwal's, without a formula for its inverse here."""

    def alpha(self, t: float) -> float:
        return math.cos(math.pi / 2 * t)

    def sigma(self, t: float) -> float:
        return math.sin(math.pi / 2 * t)


PROCESSES: dict[str, tuple[Process, list[float]]] = {
    "flow": (RectifiedFlow(), [0.95, 0.8, 0.6, 0.4, 0.2, 0.05]),
    "flow from pure noise": (RectifiedFlow(), [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]),
    "flow nearly from there": (RectifiedFlow(), [0.99999, 0.9999, 0.5, 0.1, 0.02]),
    "vp": (VP(), [1.0, 0.8, 0.6, 0.4, 0.2, 0.01]),
    "unit variance": (UnitVariance(), [80.0, 20.0, 5.0, 1.0, 0.2, 0.0]),
    "cosine": (Cosine(), [0.99, 0.8, 0.5, 0.2, 0.0]),
    "ve": (VE(), [80.0, 20.0, 5.0, 1.0, 0.2, 0.0]),
}


def ratio(process: Process, t: float) -> float:
    """Noise over signal, as the papers define the processes."""
    return process.sigma(t) / process.alpha(t)


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 2, dtype=torch.float64, generator=generator).to(dtype)


def written_by_hand(
    process: Process, times: list[float], x: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The end by sampling in sigma, and the end by `process=`, both as the process has x."""
    pure = process.alpha(times[0]) < 1e-12
    sigmas = [ratio(process, t) for t in times[1:]]
    # From pure noise: that much noise, in place of infinitely much.
    largest = max(LARGEST_SIGMA, 2 * sigmas[0])
    limited = pure or ratio(process, times[0]) > LARGEST_SIGMA
    first = largest if limited else ratio(process, times[0])
    start = x / process.sigma(times[0]) * first
    levels = torch.tensor([first, *sigmas], dtype=torch.float64)
    end = erk_guid.sample(TREE, start, levels, **options) * process.alpha(times[-1])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        # The tree is written for x / alpha and sigma; at pure noise it is asked at `first`.
        time = float(t)
        if limited and time == times[0]:
            return TREE(x / process.sigma(time) * first, torch.tensor(first))
        alpha = process.alpha(time)
        return TREE(x / alpha, torch.tensor(process.sigma(time) / alpha, dtype=torch.float64))

    given = torch.tensor(times, dtype=torch.float64)
    return end, erk_guid.sample(denoiser, x, given, process=process, **options)


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_sampling_in_t_is_sampling_in_sigma(solver: str, name: str) -> None:
    # Catches: x scaled by the wrong level, a solver that looks at t, rounding near t = 1.
    process, times = PROCESSES[name]
    x = noise() * process.sigma(times[0])
    end, found = written_by_hand(process, times, x, solver=solver)
    torch.testing.assert_close(found, end, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(PROCESSES))
@pytest.mark.parametrize("solver", ["heun", "dpm2", "deis"])
@pytest.mark.parametrize(
    "guidance", [ERKGuidance(0.4, 0.0, bound=0.3), ERKGuidance(0.4, 0.01, gate="step"),
                 ParameterFreeGuidance()]
)  # fmt: skip
def test_guidance_in_t_is_guidance_in_sigma(
    solver: str, name: str, guidance: erk_guid.Guidance
) -> None:
    process, times = PROCESSES[name]
    if isinstance(guidance, ParameterFreeGuidance) and not make_solver(solver).two_stages:
        return
    x = noise() * process.sigma(times[0])
    end, found = written_by_hand(process, times, x, solver=solver, guidance=guidance)
    # Where sigma begins at 1e5, guidance magnifies rounding.
    tolerance = 1e-6 if name == "flow nearly from there" else 1e-9
    torch.testing.assert_close(found, end, rtol=tolerance, atol=tolerance)
    plain, _ = written_by_hand(process, times, x, solver=solver)
    if solver != "deis":  # whose pair shows hardly any stiffness in so large steps
        assert (found - plain).abs().max() > 1e-6


@pytest.mark.parametrize("size", [0.3, 2.0])
@pytest.mark.parametrize("name", ["flow from pure noise", "vp", "unit variance", "cosine"])
def test_a_gaussian_is_solved(name: str, size: float) -> None:
    # From outside: along a solution a Gaussian's quantiles are kept, so that x goes as its
    # standard deviation sqrt(alpha^2 size^2 + sigma^2). Catches alpha and sigma exchanged.
    process, times = PROCESSES[name]
    first = times[0]
    fine = torch.tensor(
        [process.time(math.exp(s)) for s in torch.linspace(6, -7, 300).tolist()]
        if first == 1 else
        [process.time(ratio(process, first) * 0.97**k) for k in range(400)]
    )  # fmt: skip
    moments = [first, *[t for t in fine.tolist() if t < first * 0.9999], 0.0]

    def deviation(t: float) -> float:
        return math.sqrt((process.alpha(t) * size) ** 2 + process.sigma(t) ** 2)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha(float(t)), process.sigma(float(t))
        return alpha * size**2 / ((alpha * size) ** 2 + sigma**2) * x

    x = noise() * deviation(first)
    found = erk_guid.sample(denoiser, x, torch.tensor(moments).double(), process=process)
    torch.testing.assert_close(found, noise() * size, rtol=3e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_time_of_a_level_is_that_time(name: str) -> None:
    process, times = PROCESSES[name]
    for t in (*times[1:], 0.0):
        level = process.level(t, math.inf)
        assert process.time(level.sigma) == pytest.approx(t, rel=1e-9, abs=1e-12)
        assert process.alpha(t) ** 2 * (1 + level.sigma**2) == pytest.approx(
            process.alpha(t) ** 2 + process.sigma(t) ** 2, rel=1e-9
        )


def test_variance_preserving_means_that() -> None:
    for process, times in ((VP(), [0.01, 0.5, 1.0]), (UnitVariance(), [0.1, 3.0, 80.0])):
        for t in times:
            assert process.alpha(t) ** 2 + process.sigma(t) ** 2 == pytest.approx(1, rel=1e-12)
    # Song et al. 2021, appendix C: alpha^2 at t = 1 is exp(-(20 - 0.1) / 2 - 0.1).
    assert VP().alpha(1.0) ** 2 == pytest.approx(math.exp(-10.05), rel=1e-12)


def test_the_denoiser_and_the_callback_see_the_process() -> None:
    times = torch.tensor([1.0, 0.7, 0.3, 0.0])
    asked: list[tuple[float, torch.dtype]] = []
    told: list[erk_guid.StepInfo] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        asked.append((t.item(), x.dtype))
        return x * 0.1

    for dtype in (torch.float32, torch.float16):
        asked.clear()
        told.clear()
        x = noise(dtype)
        end = erk_guid.sample(
            denoiser, x, times, process=RectifiedFlow(), solver="euler", callback=told.append
        )
        # The times are the caller's, to the bit of the dtype.
        assert asked == [(t.to(dtype).item(), dtype) for t in times[:-1]]
        assert [i.sigma for i in told] == times[:-1].tolist()
        assert told[-1].sigma_next == 0
        assert end.dtype == dtype
        torch.testing.assert_close(told[0].x_before.to(dtype), x)
        torch.testing.assert_close(told[-1].x.to(dtype), end)
        # Euler in t, by hand, is the same point.
        by_hand = x + (0.7 - 1.0) * (x - 0.1 * x)
        torch.testing.assert_close(told[0].x.to(dtype), by_hand, rtol=2e-3, atol=2e-3)


def test_noise_may_be_added_in_a_process() -> None:
    # In sigma it is what EDM does; the same draws, by hand.
    process, times = PROCESSES["flow"]
    x = noise() * process.sigma(times[0])

    churn = Churn(
        5.0, randn_like=lambda x: torch.cos(torch.arange(x.numel())).reshape(x.shape).to(x)
    )
    end, found = written_by_hand(process, times, x, churn=churn)
    torch.testing.assert_close(found, end, rtol=1e-9, atol=1e-9)
    plain, _ = written_by_hand(process, times, x)
    assert (found - plain).abs().max() > 1e-3


def test_times_that_a_process_does_not_have() -> None:
    x = noise()
    for process, times, message in (
        (RectifiedFlow(), [5.0, 0.1], r"RectifiedFlow run from 1 \(noise\) down to 0 .*, got 5"),
        (VP(), [1.5, 0.1], "times of VP run from 1"),
        (RectifiedFlow(), [0.5, 0.5], "must fall strictly"),
    ):
        with pytest.raises(ValueError, match=message):
            erk_guid.sample(lambda x, t: x, x, torch.tensor(times), process=process)
    # Some callers' 1 is rounded.
    erk_guid.sample(lambda x, t: x, x, torch.tensor([1.00001, 0.5]), process=RectifiedFlow())


def test_the_default_solver_suits_the_process() -> None:
    # Plain Heun from pure noise would end far off: its first step goes from sigma 10,000 to 9.
    times = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2) * x

    def run(**options: Any) -> Tensor:
        return erk_guid.sample(denoiser, noise(), times, **options)

    flow = {"process": RectifiedFlow()}
    assert torch.equal(run(**flow), run(**flow, solver="modal"))
    guidance = ParameterFreeGuidance()
    assert torch.equal(
        run(**flow, guidance=guidance), run(**flow, guidance=guidance, solver="heun")
    )
    assert torch.equal(run(), run(solver="heun"))
    exact = 0.5 * noise()
    assert (run(**flow) - exact).norm() < 0.1 * exact.norm()


def test_a_step_from_pure_noise_to_the_end_keeps_its_digits() -> None:
    # Catches: x of size 10,000 subtracted from itself in float32 (2.8e-3 off).
    x = torch.randn(1000, 4)
    for solver in ("euler", "heun", "modal"):
        found = erk_guid.sample(
            lambda x, t: torch.full_like(x, 0.37), x, torch.tensor([1.0, 0.0]),
            process=RectifiedFlow(), solver=solver,
        )  # fmt: skip
        torch.testing.assert_close(found, torch.full_like(x, 0.37), rtol=1e-6, atol=0)


def test_more_noise_than_a_process_has_is_refused() -> None:
    times = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)

    @dataclass(frozen=True)
    class Own(Process):
        def alpha(self, t: float) -> float:
            return VP().alpha(t)

        def sigma(self, t: float) -> float:
            return VP().sigma(t)

    for process in (VP(), Own()):
        with pytest.raises(ValueError, match=r"lies beyond the last time 1 .* set S_max below"):
            erk_guid.sample(
                lambda x, t: x, noise(), times, process=process, churn=Churn(5.0), solver="heun"
            )


def test_callbacks_see_half_precision() -> None:
    told: list[erk_guid.StepInfo] = []
    erk_guid.sample(lambda x, t: x * 0.1, noise(torch.float16), torch.tensor([1.0, 0.5, 0.0]),
                    process=RectifiedFlow(), callback=told.append)  # fmt: skip
    for info in told:
        assert info.x.dtype == info.x_before.dtype == info.denoised.dtype == torch.float16


def test_edms_process_has_no_largest_level() -> None:
    # diffusers' zero terminal SNR begins beyond 1e4.
    assert VE().level(65536.0) == (65536.0, 1.0)


@pytest.mark.parametrize("value", [RectifiedFlow, "flow"])
def test_what_is_no_process_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"process must be an object such as RectifiedFlow\(\)"):
        erk_guid.sample(lambda x, t: x, noise(), torch.tensor([1.0, 0.5]), process=value)
