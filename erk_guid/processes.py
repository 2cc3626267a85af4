"""What x is: how clean data and noise are mixed at a time t, and the way to sigma and back.

A process keeps ``x = alpha(t) clean + sigma(t) noise``. Divided by alpha that is clean data plus
sigma / alpha times noise, which is what solvers and guidance are written in. So a process is a
change of variables, and no solver needs to know of it:

    x = erk_guid.sample(denoiser, x, times, process=erk_guid.RectifiedFlow())

`VE` is EDM's (the change does nothing), `RectifiedFlow` that of SD3 and FLUX, `VP` the
variance-preserving SDE, `UnitVariance` any variance-preserving process with noise over signal for
its time.

Integration in t itself needs no process. With t for sigma the drift (x - D) / t has the same form,
and Euler, Heun and DPM-Solver-2 can be run so; diffusers and ComfyUI do. That is another choice of
the variable of integration. What supposes Gaussian modes (`ParameterFreeGuidance`, `Modal`) must go
through the process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser, LevelDenoiser
from erk_guid.schedules import vp_time
from erk_guid.solvers.base import Evaluation, check_levels

LARGEST_SIGMA = 1e4
"""Stands for the infinite noise over signal with which some processes begin."""


class Level(NamedTuple):
    """A time of a process as solvers see it.

    Attributes:
        sigma: noise over signal, EDM's sigma.
        alpha: share of clean data; x / alpha is clean data plus sigma noise.
    """

    sigma: float
    alpha: float


class Process(ABC):
    """A mixture of clean data and noise: ``x = alpha(t) clean + sigma(t) noise``.

    A process of your own has `alpha` and `sigma`. With `time`, the inverse in closed form, it is
    faster.

    Attributes:
        last: the time at which all is noise; times run from there down to 0.
    """

    last: ClassVar[float] = 1.0

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Return the share of clean data at time t, 1 at t = 0."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Return the standard deviation of the noise at time t, 0 at t = 0."""

    def level(self, t: float, largest: float = LARGEST_SIGMA) -> Level:
        """Return noise over signal and share of clean data at time t.

        Where there is only noise (t = 1 of `RectifiedFlow`) noise over signal is taken to be
        `largest`, and x to be that much noise: x / alpha is ``largest / sigma(t)`` times x.

        Raises:
            ValueError: t is not among the times of the process.
        """
        if not 0 <= t <= self.last * (1 + 1e-4):  # some callers' 1 is rounded
            raise ValueError(
                f"times of {type(self).__name__} run from {self.last:g} (noise) down to 0 (data), "
                f"got {t:g}"
            )
        t = min(t, self.last)
        sigma, alpha = self.sigma(t), self.alpha(t)
        if alpha <= 0 and math.isinf(largest):
            raise ValueError(f"at time {t:g} of {type(self).__name__} there is only noise")
        if alpha <= 0 or sigma > largest * alpha:
            return Level(largest, sigma / largest)
        return Level(sigma / alpha, alpha)

    def at(self, sigma: float) -> Level:
        """Return the level at which noise over signal is `sigma`."""
        return Level(sigma, self.alpha(self.time(sigma)))

    def time(self, sigma: float) -> float:
        """Return the time at which noise over signal is `sigma`; by root finding, to rounding."""
        from scipy.optimize import brentq  # here, so that the rest needs torch alone

        if sigma == 0:
            return 0.0

        def excess(t: float) -> float:
            return self.sigma(t) - sigma * self.alpha(t)

        high = self.last if math.isfinite(self.last) else 1.0
        while math.isinf(self.last) and excess(high) < 0:
            high *= 2
        if excess(high) < 0:
            return math.inf  # more noise than the process has
        return float(brentq(excess, 0.0, high, xtol=1e-300, rtol=1e-15))


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding, EDM's: x = clean + t noise, and t is sigma (Karras et al. 2022)."""

    last = math.inf

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

    def level(self, t: float, largest: float = LARGEST_SIGMA) -> Level:
        return Level(t, 1.0)

    def time(self, sigma: float) -> float:
        return sigma


@dataclass(frozen=True)
class UnitVariance(Process):
    """Variance preserving, t being noise over signal: x = (clean + t noise) / sqrt(1 + t^2)."""

    last = math.inf

    def alpha(self, t: float) -> float:
        return 1 / math.sqrt(1 + t**2)

    def sigma(self, t: float) -> float:
        return t / math.sqrt(1 + t**2)

    def time(self, sigma: float) -> float:
        return sigma


@dataclass(frozen=True)
class VP(Process):
    """The variance-preserving SDE with linear beta (Song et al. 2021, arXiv 2011.13456).

    alpha(t) = exp(-(beta_d t^2 / 2 + beta_min t) / 2), sigma(t) = sqrt(1 - alpha(t)^2).

    Args:
        beta_d, beta_min: beta(t) = beta_min + beta_d t.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def alpha(self, t: float) -> float:
        return math.exp(-(self.beta_d * t**2 / 2 + self.beta_min * t) / 2)

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(-(self.beta_d * t**2 / 2 + self.beta_min * t)))

    def time(self, sigma: float) -> float:
        return vp_time(sigma, (self.beta_d, self.beta_min))


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Flow matching on straight lines: x = (1 - t) clean + t noise (SD3, FLUX)."""

    def alpha(self, t: float) -> float:
        return 1 - t

    def sigma(self, t: float) -> float:
        return t

    def time(self, sigma: float) -> float:
        return sigma / (1 + sigma)


@dataclass(frozen=True)
class _InSigma(LevelDenoiser):
    denoiser: Denoiser
    process: Process
    dtype: torch.dtype
    times: dict[float, float] = field(repr=False)
    """Noise level to the caller's own time, which the network should see unrounded."""
    alphas: dict[float, float] = field(repr=False)

    def at(self, x: Tensor, sigma: float) -> Tensor:
        t = self.times[sigma] if sigma in self.times else self.process.time(sigma)
        if t > self.process.last * (1 + 1e-4):
            raise ValueError(
                f"noise over signal of {sigma:.4g} lies beyond the last time {self.process.last:g} "
                f"of {type(self.process).__name__}; if churn added it, set S_max below "
                f"{self.process.level(self.process.last).sigma / math.sqrt(2):.4g}"
            )
        given = (x * self.alpha(sigma)).to(self.dtype)
        return self.denoiser(given, given.new_full((), t))

    def alpha(self, sigma: float) -> float:
        """Return the share of clean data at noise level `sigma`."""
        return self.alphas[sigma] if sigma in self.alphas else self.process.at(sigma).alpha


@dataclass(frozen=True)
class InSigma:
    """A problem of some process, written in sigma. `in_sigma` makes it.

    Attributes:
        denoiser: to be called with x / alpha and sigma.
        x: where to start, divided by alpha.
        sigmas: noise levels, one for each of the times, float64 on the CPU.
        process: the process.
    """

    denoiser: _InSigma
    x: Tensor
    sigmas: Tensor
    process: Process

    def with_denoiser(self, denoiser: Denoiser) -> Denoiser:
        """Return another denoiser of the same process, written in sigma."""
        return replace(self.denoiser, denoiser=denoiser)

    def restored(self, x: Tensor, sigma: float) -> Tensor:
        """Return x at noise level `sigma` as the process has it: multiplied by alpha."""
        return x * self.denoiser.alpha(sigma)


def levels_of(process: Process, times: Sequence[float]) -> list[Level]:
    """Return the level at each of some times that fall strictly, but for a last one repeated.

    Only the first may be without signal, see `Process.level`. If the second one is nearly so, the
    first is taken to lie at twice its noise over signal, so that levels fall as the times do.

    Raises:
        ValueError: times that the process does not have.
    """
    process.level(times[0])  # raises where it is not one of its times
    later = [process.level(t, math.inf) for t in times[1:]]
    largest = max(LARGEST_SIGMA, 2 * later[0].sigma) if later else LARGEST_SIGMA
    return [process.level(times[0], largest), *later]


def in_sigma(denoiser: Denoiser, x: Tensor, times: Tensor, process: Process) -> InSigma:
    """Write a problem of some process in sigma.

    Args:
        denoiser: called as ``denoiser(x, t)`` with x as the process has it; returns clean data.
        x: where to start, [N, ...], as the process has it.
        times: falling strictly, [M >= 2]. For a first time without any signal see
            `Process.level`.
        process: the process.

    Half precision is widened to float32, because x / alpha would overflow; the denoiser still
    sees the dtype of x.

    Raises:
        ValueError: times that do not fall, or that the process does not have.
    """
    moments = check_levels(times)
    levels = levels_of(process, moments)
    sigmas = [level.sigma for level in levels]
    wide = torch.promote_types(x.dtype, torch.float32)
    return InSigma(
        _InSigma(
            denoiser,
            process,
            x.dtype,
            times=dict(zip(sigmas, moments, strict=True)),
            alphas={level.sigma: level.alpha for level in levels},
        ),
        x.to(wide) / levels[0].alpha,
        torch.tensor(sigmas, dtype=torch.float64),
        process,
    )


def evaluation_in_sigma(x: Tensor, denoised: Tensor, level: Level) -> Evaluation:
    """Return an evaluation in sigma from x as the process has it.

    Args:
        x: [N, ...].
        denoised: D there, like x.
        level: where that is.
    """
    scaled = x / level.alpha
    return Evaluation(scaled, level.sigma, denoised, (scaled - denoised) / level.sigma)
