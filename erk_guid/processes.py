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
from typing import ClassVar

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser, LevelDenoiser
from erk_guid.schedules import vp_sigma, vp_time
from erk_guid.solvers.base import Evaluation, check_levels

LARGEST_SIGMA = 1e4
"""Stands for the infinite noise over signal with which some processes begin."""


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

    def noise_to_signal(self, t: float) -> float:
        """Return sigma / alpha, which is EDM's sigma; infinity where there is only noise.

        Raises:
            ValueError: t is not among the times of the process.
        """
        if not 0 <= t <= self.last * (1 + 1e-4):  # some callers' 1 is rounded
            raise ValueError(
                f"times of {type(self).__name__} run from {self.last:g} (noise) down to 0 (data), "
                f"got {t:g}"
            )
        alpha = self.alpha(min(t, self.last))
        return self.sigma(min(t, self.last)) / alpha if alpha > 0 else math.inf

    def time(self, sigma: float) -> float:
        """Return the time at which noise over signal is `sigma`; by bisection, to rounding."""
        low, high = 0.0, self.last if math.isfinite(self.last) else 1.0
        while math.isinf(self.last) and self.noise_to_signal(high) < sigma:
            low, high = high, 2 * high
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self.noise_to_signal(middle) < sigma else (low, middle)
        return high


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding, EDM's: x = clean + t noise, and t is sigma (Karras et al. 2022)."""

    last = math.inf

    def alpha(self, t: float) -> float:
        return 1.0

    def sigma(self, t: float) -> float:
        return t

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

    def noise_to_signal(self, t: float) -> float:
        super().noise_to_signal(t)  # raises where t is not one of its times
        return vp_sigma(t, (self.beta_d, self.beta_min))

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

    def at(self, x: Tensor, sigma: float) -> Tensor:
        t = self.times[sigma] if sigma in self.times else self.process.time(sigma)
        given = (x * alpha_at(self.process, sigma)).to(self.dtype)
        return self.denoiser(given, given.new_full((), t))


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
        return x * alpha_at(self.process, sigma)


def in_sigma(denoiser: Denoiser, x: Tensor, times: Tensor, process: Process) -> InSigma:
    """Write a problem of some process in sigma.

    Args:
        denoiser: called as ``denoiser(x, t)`` with x as the process has it; returns clean data.
        x: where to start, [N, ...], as the process has it.
        times: falling strictly, [M >= 2]. From a first time without any signal (t = 1 of
            `RectifiedFlow`) the noise level is taken to be `LARGEST_SIGMA`.
        process: the process.

    Half precision is widened to float32, because x / alpha would overflow; the denoiser still
    sees the dtype of x.

    Raises:
        ValueError: times that do not fall, or that the process does not have.
    """
    moments = check_levels(times)
    sigmas = [process.noise_to_signal(t) for t in moments]
    if sigmas[0] > LARGEST_SIGMA:
        sigmas[0] = max(LARGEST_SIGMA, 2 * sigmas[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    return InSigma(
        _InSigma(denoiser, process, x.dtype, dict(zip(sigmas, moments, strict=True))),
        x.to(wide) / alpha_at(process, sigmas[0]),
        torch.tensor(sigmas, dtype=torch.float64),
        process,
    )


def alpha_at(process: Process, sigma: float) -> float:
    """Return alpha where noise over signal is `sigma`."""
    return process.alpha(process.time(sigma))


def evaluation_in_sigma(x: Tensor, denoised: Tensor, sigma: float, process: Process) -> Evaluation:
    """Return an evaluation in sigma from x as the process has it.

    Args:
        x: [N, ...], at noise over signal `sigma`.
        denoised: D there, like x.
        sigma: noise over signal.
        process: the process.
    """
    scaled = x / alpha_at(process, sigma)
    return Evaluation(scaled, sigma, denoised, (scaled - denoised) / sigma)


def sigmas_of(process: Process, times: Sequence[float]) -> list[float]:
    """Return noise over signal at each time, `LARGEST_SIGMA` in place of infinity."""
    return [min(process.noise_to_signal(t), LARGEST_SIGMA) for t in times]
