"""One-step methods: Euler, Heun, DPM-Solver-2.

Heun: Karras et al. 2022 (arXiv 2206.00364), algorithm 1. DPM-Solver-2: Lu et al. 2022
(arXiv 2206.00927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from torch import Tensor

from erk_guid.denoisers import Denoiser
from erk_guid.solvers.ancestral import Descent, check_eta, raised
from erk_guid.solvers.base import (
    EulerStep,
    Memory,
    Pair,
    Solver,
    Step,
    StepResult,
    difference,
    evaluate,
)


@dataclass(frozen=True)
class Euler(Solver):
    """Order 1, one evaluation a step, no pair.

    Args:
        eta: noise in each step, from 0 (none, the ODE) to 1 (the reverse SDE); with it this is
            the sampler called Euler ancestral.
    """

    eta: float = 0.0

    one_step = True

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def noisy(self) -> bool:
        return self.eta > 0

    def steps(self, levels: Sequence[float]) -> list[Step]:
        descents = [Descent.of(s, t, self.eta) for s, t in pairwise(levels)]
        return [raised(d, EulerStep(d.sigma, d.down)) for d in descents]


@dataclass(frozen=True)
class HeunStep:
    """Order 2, two evaluations, Euler embedded.

    ``x_low = x + h f(x, sigma)``, ``x' = x + h (f(x, sigma) + f(x_low, sigma_next)) / 2`` with
    h = sigma_next - sigma.

    The step leaves x_low and its drift in memory. The next step evaluates the drift at the same
    noise level: the two are the embedded pair.
    """

    sigma: float
    sigma_next: float

    def __post_init__(self) -> None:
        if not self.sigma_next > 0:
            raise ValueError(
                f"Heun evaluates the drift at sigma_next, which must be above 0, got "
                f"{self.sigma_next}; take EulerStep (or the denoised x) for the step to 0"
            )

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, Memory]:
        h = difference(self.sigma_next, self.sigma, x.dtype)
        first = evaluate(denoiser, x, self.sigma)
        x_low = x + h * first.drift
        second = evaluate(denoiser, x_low, self.sigma_next)
        x_high = x + h * (0.5 * first.drift + 0.5 * second.drift)
        pair = None
        if memory is not None:
            pair = Pair(x, memory.x, first.drift, memory.values[0], -h)
        result = StepResult(
            x_high, self.sigma, self.sigma_next, (first, second), 2, (0.5, 0.5), pair,
            lambda: x_high - x_low,
        )  # fmt: skip
        return result, Memory(x_low, (second.drift,))


@dataclass(frozen=True)
class Heun(Solver):
    """Order 2, two evaluations a step; the pair comes from the step before."""

    has_pair = True
    two_stages = True
    one_step = True

    def steps(self, levels: Sequence[float]) -> list[HeunStep]:
        return [HeunStep(s, t) for s, t in pairwise(levels)]


@dataclass(frozen=True)
class DPM2Step:
    """Order 2: a second evaluation at `midpoint`, on Euler's line.

    ``x' = x + h ((1 - w) f(x, sigma) + w f(x_mid, midpoint))`` with w = 1 / (2 r).

    The pair is inside the step. Its two points lie at two noise levels.
    """

    sigma: float
    sigma_next: float
    midpoint: float
    r: float

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, None]:
        h = difference(self.sigma_next, self.sigma, x.dtype)
        first = evaluate(denoiser, x, self.sigma)
        x_mid = x + difference(self.midpoint, self.sigma, x.dtype) * first.drift
        second = evaluate(denoiser, x_mid, self.midpoint)
        weights = (1 - 1 / (2 * self.r), 1 / (2 * self.r))
        x_high = x + h * (second.drift * weights[1] + first.drift * weights[0])
        result = StepResult(
            x_high, self.sigma, self.sigma_next, (first, second), 2, weights,
            Pair(x, x_mid, first.drift, second.drift, -h, one_level=False),
            lambda: x_high - (x + h * first.drift),
        )  # fmt: skip
        return result, None


@dataclass(frozen=True)
class DPM2(Solver):
    """DPM-Solver-2: order 2, two evaluations a step, a pair in each step.

    Args:
        r: place of the midpoint, sigma_next^r sigma^(1 - r), above 0 and at most 1.
    """

    r: float = 0.5

    has_pair = True
    two_stages = True
    one_step = True

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, Real) or not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and at most 1, got {self.r!r}")

    def steps(self, levels: Sequence[float]) -> list[DPM2Step]:
        return [DPM2Step(s, t, t**self.r * s ** (1 - self.r), self.r) for s, t in pairwise(levels)]
