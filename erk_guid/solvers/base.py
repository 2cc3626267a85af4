"""The protocol of solvers: what a step returns, remembers and is planned by.

A `Solver` is a frozen set of options. ``solver.plan(sigmas)`` returns one `Step` for each interval,
with all weights computed on the host. A step knows its own interval. It is called as
``result, memory = step(denoiser, x, memory)`` and changes nothing but what it returns. A loop of
your own, with guidance, is

    memory = None
    for step in erk_guid.solvers.Heun().plan(sigmas):
        result, memory = step(denoiser, x, memory)
        x = guidance(result).x

Steps take the denoiser, not the drift, because solvers in data-prediction form need the denoised
x itself. Everything is written in sigma, for x that is the clean image plus sigma times noise;
`erk_guid.processes` turns other processes into this one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser, LevelDenoiser, check_output


class Evaluation(NamedTuple):
    """One call of the denoiser.

    Attributes:
        x: the point, [N, ...].
        sigma: the noise level.
        denoised: D(x; sigma), like x.
        drift: dx/dsigma = (x - D) / sigma, like x.
    """

    x: Tensor
    sigma: float
    denoised: Tensor
    drift: Tensor


class Pair(NamedTuple):
    """Two points whose drifts are compared: what guidance measures stiffness on.

    Which two points these are is the solver's knowledge.

    Attributes:
        x_high, x_low: the points, [N, ...]; solutions of different order where the solver is an
            embedded Runge-Kutta method.
        f_high, f_low: the drifts there, like x.
        h: length of the step that is corrected, sigma - sigma_next > 0: a number or [N].
        sign: 1, or -1 where the published program adds the correction that it subtracts elsewhere
            (DEIS).
        one_level: whether both points lie at one noise level (Heun), or at two (DPM-Solver-2,
            DEIS).
    """

    x_high: Tensor
    x_low: Tensor
    f_high: Tensor
    f_low: Tensor
    h: Tensor | float
    sign: int = 1
    one_level: bool = True


class Memory(NamedTuple):
    """What a solver remembers from one step to the next.

    Attributes:
        x: a past point, [N, ...].
        values: drifts or denoised images, each like x; the newest first.
        trust: how far the last step may rely on its past, per sample, [N]; None where nothing
            measured that.
    """

    x: Tensor
    values: tuple[Tensor, ...]
    trust: Tensor | None = None

    def rows(self, chosen: Tensor) -> Memory:
        """Return what is remembered of some of the samples."""
        return Memory(
            self.x[chosen],
            tuple(value[chosen] for value in self.values),
            None if self.trust is None else self.trust[chosen],
        )


@dataclass(frozen=True)
class StepResult:
    """What one step of a solver found.

    Attributes:
        x: the solution at `sigma_next`, without guidance, [N, ...].
        sigma, sigma_next: the interval.
        stages: the evaluations that the step was made of. The first is at the beginning of the
            step (a predictor-corrector gives the value that it kept for that point).
        nfe: calls of the denoiser spent.
        weights: of the stages' drifts, for steps of Runge-Kutta form
            ``x = stages[0].x + (sigma_next - sigma) sum_k weights[k] stages[k].drift``; empty for
            others.
        pair: the points that guidance compares; None where there are none.
        x_error: computes x minus the embedded solution of lower order, like x; None where there
            is none.
    """

    x: Tensor
    sigma: float
    sigma_next: float
    stages: tuple[Evaluation, ...]
    nfe: int
    weights: tuple[float, ...] = ()
    pair: Pair | None = None
    x_error: Callable[[], Tensor] | None = None

    @property
    def denoised(self) -> Tensor:
        """D(x; sigma) at the beginning of the step."""
        return self.stages[0].denoised


@runtime_checkable
class Step(Protocol):
    """One step over a fixed interval."""

    @property
    def sigma(self) -> float:
        """Noise level where the step begins."""

    @property
    def sigma_next(self) -> float:
        """Noise level where it ends."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, Memory | None]:
        """Solve the ODE from `sigma` to `sigma_next`.

        Args:
            denoiser: see `Denoiser`.
            x: [N, ...] at noise level `sigma`.
            memory: what the step before returned; None at the first step.
        """
        ...


@runtime_checkable
class NoisyStep(Step, Protocol):
    """A step that adds noise at its end."""

    @property
    def spread(self) -> float:
        """Standard deviation of the noise in x; 0 adds none, and then needs none."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        memory: Memory | None = None,
        noise: Tensor | None = None,
    ) -> tuple[StepResult, Memory | None]:
        """Solve the ODE from `sigma` to below `sigma_next`, and add noise up to there.

        Args:
            denoiser, x, memory: as of `Step`.
            noise: standard normal, shaped like x.
        """
        ...


class Solver(ABC):
    """A method of integration: options, and a step for each interval.

    Subclasses are frozen dataclasses. Their fields are the solver's options, and the command
    line's. They say by class attributes what their steps offer.

    Attributes:
        has_pair: whether steps (from the second on, at least) carry a pair to guide with.
        two_stages: whether steps combine the drifts of two evaluations (`StepResult.weights`).
        one_step: whether the solution depends on nothing that was before the step. Noise may then
            be added between steps, see `erk_guid.Churn`.
    """

    has_pair: ClassVar[bool] = False
    two_stages: ClassVar[bool] = False
    one_step: ClassVar[bool] = False

    @property
    def noisy(self) -> bool:
        """Whether steps add noise; the result is then no solution of the ODE."""
        return False

    def plan(self, sigmas: Tensor | Sequence[float]) -> list[Step]:
        """Return a step for each interval between the noise levels.

        Args:
            sigmas: [M >= 2], falling strictly. A trailing 0 is reached by an Euler step, because
                no solver can evaluate the drift there.

        Raises:
            ValueError: sigmas that do not fall, or are not finite; or a solver that does not give
                a step for each interval.
        """
        levels = check_levels(sigmas)
        last = [EulerStep(levels[-2], 0.0)] if levels[-1] == 0 else []
        above = [level for level in levels if level > 0]
        steps = self.steps(above)
        if len(steps) != len(above) - 1:
            raise ValueError(
                f"{type(self).__name__}.steps must return a step for each of the {len(above) - 1} "
                f"intervals between its levels, and returned {len(steps)}"
            )
        return [*steps, *last]

    @abstractmethod
    def steps(self, levels: Sequence[float]) -> Sequence[Step]:
        """Return the steps between these noise levels, which fall strictly and stay above 0."""


def check_levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    """Return the noise levels as numbers.

    Raises:
        ValueError: they are not falling strictly, finite and 0 or more.
    """
    if isinstance(sigmas, Tensor):
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(
                "sigmas must be a 1-D tensor of at least two noise levels, got shape "
                f"{list(sigmas.shape)}"
            )
        levels: list[float] = sigmas.tolist()
    else:
        levels = [float(level) for level in sigmas]
        if len(levels) < 2:
            raise ValueError(f"sigmas must be at least two noise levels, got {levels}")
    for i, level in enumerate(levels):
        if not math.isfinite(level) or level < 0:
            raise ValueError(f"sigmas[{i}] is {level}; noise levels are finite and not negative")
        if i and level >= levels[i - 1]:
            raise ValueError(
                f"sigmas must fall strictly, but sigmas[{i}] = {level} follows {levels[i - 1]}"
            )
    return levels


@dataclass(frozen=True)
class AnalyticFirst:
    """A denoiser that is not called at one noise level (AFS, Dockhorn et al. 2022).

    There the drift is taken to be x / sqrt(1 + sigma^2), which is that of standard normal data.

    Args:
        denoiser: called at all other noise levels.
        first: that noise level.
    """

    denoiser: Denoiser
    first: float

    def at_first(self, x: Tensor) -> Evaluation:
        """Return what stands for an evaluation at `first`."""
        # The drift itself: computed from the denoised x it would be rounded once more.
        first = _level(x, self.first)
        drift = x / _level(x, math.hypot(1, self.first))
        return Evaluation(x, self.first, x - first * drift, drift)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        return self.denoiser(x, sigma)


def evaluate(denoiser: Denoiser, x: Tensor, sigma: float) -> Evaluation:
    """Call the denoiser at (x, sigma > 0) and turn its output into the drift.

    The output is copied. A denoiser may return the same tensor each time (CUDA graphs do, and
    ``torch.compile(mode="reduce-overhead")``), and what it returned before is still needed.

    Raises:
        TypeError: the output is not a tensor of floating-point numbers.
        ValueError: the output is not shaped like x, the denoiser edited its x or sigma, x is not
            floating, or its dtype does not hold sigma.
    """
    check_floating(x)
    if isinstance(denoiser, AnalyticFirst):
        if sigma == denoiser.first:
            return denoiser.at_first(x)
        return evaluate(denoiser.denoiser, x, sigma)
    level = _level(x, sigma)
    denoised = (
        denoiser.at(x, sigma)
        if isinstance(denoiser, LevelDenoiser)
        else _call(denoiser, x, level)
    )  # fmt: skip
    check_output(denoised, x)
    denoised = denoised.to(x.dtype, copy=True)
    return Evaluation(x, sigma, denoised, (x - denoised) / level)


def check_floating(x: Tensor) -> None:
    """Raise ValueError unless x has a floating dtype, in which noise levels can be told apart."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a floating tensor [N, ...], got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(
            f"x must be a floating tensor [N, ...], got {x.dtype} {list(x.shape)}; x.float() is one"
        )


def _level(x: Tensor, sigma: float) -> Tensor:
    """Return a noise level as a tensor without dimensions, like x.

    Raises:
        ValueError: in the dtype of x it is 0 or infinite.
    """
    limits = torch.finfo(x.dtype)
    if not limits.tiny * limits.eps <= sigma <= limits.max:
        raise ValueError(
            f"{x.dtype} does not hold the noise level {sigma:g}; give x in a dtype that does "
            "(float32 from 1e-44 to 3e38), or scale the data and the noise levels"
        )
    return x.new_full((), sigma)


def _call(denoiser: Denoiser, x: Tensor, level: Tensor) -> Tensor:
    """Call the denoiser, and raise if it edited what it was given."""
    if torch.compiler.is_compiling():
        return denoiser(x, level)  # a traced graph has no edits to count
    # Inference tensors count no edits: the denoiser gets copies of those.
    given, sigma = (t.clone() if t.is_inference() else t for t in (x, level))
    before = [None if t.is_inference() else t._version for t in (given, sigma)]
    denoised = denoiser(given, sigma)
    for name, tensor, edits in zip(("x", "sigma"), (given, sigma), before, strict=True):
        if edits is not None and tensor._version != edits:
            raise ValueError(
                f"the denoiser edited its {name} in place, which the sampler still needs; let it "
                f"work on a copy ({name}.clone())"
            )
    return denoised


@lru_cache(maxsize=4096)
def rounded(value: float, dtype: torch.dtype) -> float:
    """Round a number to `dtype`."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def difference(sigma_next: float, sigma: float, dtype: torch.dtype) -> float:
    """Return ``sigma_next - sigma`` as arithmetic in `dtype` gives it.

    Published programs keep noise levels in the dtype of x. With the same rounding the results are
    theirs, bit for bit.
    """
    return rounded(rounded(sigma_next, dtype) - rounded(sigma, dtype), dtype)


NEARLY_PURE = 1e3
"""Noise level above which a step to 0 returns the denoised x itself. EDM's lie far below."""


@dataclass(frozen=True)
class EulerStep:
    """Order 1, one evaluation. The only step that may end at sigma = 0.

    ``x' = x + (sigma_next - sigma) f(x, sigma)``.
    """

    sigma: float
    sigma_next: float

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, None]:
        found = evaluate(denoiser, x, self.sigma)
        if self.sigma_next == 0 and self.sigma > NEARLY_PURE:
            # x is nearly all noise: subtracting it would leave the denoised x with few digits.
            x_next = found.denoised.clone()
            return StepResult(x_next, self.sigma, 0.0, (found,), 1, (1.0,)), None
        x_next = x + difference(self.sigma_next, self.sigma, x.dtype) * found.drift
        return StepResult(x_next, self.sigma, self.sigma_next, (found,), 1, (1.0,)), None
