"""Noise levels: which sigmas a sampler visits."""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80, 7
"""EDM's noise levels: the last one above 0, the first one, and the exponent of their spacing."""
MOST_STEPS = 100_000
"""Largest number of levels. A run holds each of its steps in memory before it begins."""

__all__ = ["edm_sigmas", "karras_sigmas", "logsnr_sigmas", "make_sigmas", "time_uniform_sigmas"]


def karras_sigmas(
    num_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Return EDM's noise levels (Karras et al. 2022, arXiv 2206.00364, eq. 5) and a trailing 0.

    Computed in float64 on the CPU, whatever the device sampled on (MPS has no float64);
    `sample` casts them to the dtype and device of its x.

    Args:
        num_steps: how many levels before the 0, from 1 to `MOST_STEPS`; a single one is
            `sigma_max`.
        sigma_min: the last level before the 0, positive.
        sigma_max: the first level, above `sigma_min`.
        rho: positive; larger values put more levels near `sigma_min`.

    Returns:
        float64 [num_steps + 1], strictly decreasing, on the CPU.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    _check_range(num_steps, sigma_min, sigma_max)
    _check_rho(rho)
    ramp = torch.linspace(0, 1, int(num_steps), dtype=torch.float64)
    try:
        a, b = float(sigma_max) ** (1 / rho), float(sigma_min) ** (1 / rho)
        sigmas = (a + ramp * (b - a)) ** rho
    except OverflowError:
        sigmas = torch.full_like(ramp, torch.inf)
    return _finished(sigmas, sigma_min, sigma_max, f"rho {rho}")


def edm_sigmas(
    num_steps: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the levels of `karras_sigmas` as EDM2's sampler does: in the loop's own dtype.

    In float32 the two differ by up to 1e-6 of a level, by which about one pixel in 12,000 rounds
    to the neighbouring value. The ends are what the powers give, not quite the numbers asked for.

    Args:
        dtype: of the computation and of the result.
        device: likewise; powers are rounded differently on different kinds of devices.

    Other arguments, returns and raises as `karras_sigmas`; one level alone is `sigma_max`, where
    EDM2's expression divides 0 by 0.
    """
    karras_sigmas(num_steps, sigma_min, sigma_max, rho)  # raises where they cannot be told apart
    a, b = float(sigma_max) ** (1 / rho), float(sigma_min) ** (1 / rho)
    k = torch.arange(int(num_steps), dtype=dtype, device=device)
    sigmas = (a + k / max(num_steps - 1, 1) * (b - a)) ** rho
    if num_steps == 1:
        sigmas = torch.full_like(k, sigma_max)
    levels = [*sigmas.tolist(), 0.0]
    if not math.isfinite(levels[0]) or any(s <= t for s, t in pairwise(levels)):
        raise ValueError(
            f"{num_steps} levels from sigma_max {sigma_max} to sigma_min {sigma_min} with rho "
            f"{rho} cannot be told apart in {str(dtype).removeprefix('torch.')}; take fewer, a "
            "larger sigma_min, or a rho nearer to EDM's 7"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check_rho(rho: float) -> None:
    if not isinstance(rho, Real) or not math.isfinite(rho) or rho <= 0:
        raise ValueError(f"rho must be a positive, finite number, got {rho!r}")


def _check_range(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    if num_steps > MOST_STEPS:
        raise ValueError(f"num_steps can be {MOST_STEPS} at most, got {num_steps}")
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min {sigma_min} must be below sigma_max {sigma_max}")


def _finished(sigmas: Tensor, sigma_min: float, sigma_max: float, spacing: str) -> Tensor:
    if len(sigmas) > 1:
        sigmas[-1] = sigma_min  # the ends are what was asked for, not what the powers round to
    sigmas[0] = sigma_max
    if not torch.isfinite(sigmas).all() or (sigmas.diff() >= 0).any():
        raise ValueError(
            f"{len(sigmas)} levels from sigma_max {sigma_max} to sigma_min {sigma_min} with "
            f"{spacing} cannot be told apart in double precision; EDM's rho is 7"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)])


VP_EPSILON = 1e-3
"""Time at which the variance-preserving SDE has the noise level `SIGMA_MIN`."""


def vp_betas(
    sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, epsilon: float = VP_EPSILON
) -> tuple[float, float]:
    """Return (beta_d, beta_min) of the variance-preserving SDE whose sigma is `sigma_min` at time
    `epsilon` and `sigma_max` at time 1 (Song et al. 2021, in the notation of Karras et al. 2022).
    """
    low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    return beta_d, high - beta_d / 2


def vp_sigma(time: float, betas: tuple[float, float] | None = None) -> float:
    """Return the noise level at a time of the variance-preserving SDE."""
    beta_d, beta_min = betas or vp_betas()
    return math.sqrt(math.expm1(beta_d * time**2 / 2 + beta_min * time))


def vp_time(sigma: float, betas: tuple[float, float] | None = None) -> float:
    """Return the time at which `vp_sigma` reaches a noise level."""
    beta_d, beta_min = betas or vp_betas()
    exponent = math.log1p(sigma**2)
    # The root that vanishes with sigma, without subtracting nearly equal numbers.
    return 2 * exponent / (math.sqrt(beta_min**2 + 2 * beta_d * exponent) + beta_min)


def vp_sigma_slope(time: float) -> float:
    """Return d sigma / d time of `vp_sigma`."""
    beta_d, beta_min = vp_betas()
    sigma = vp_sigma(time)
    return (beta_d * time + beta_min) * (sigma**2 + 1) / (2 * sigma)


def logsnr_sigmas(
    num_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> Tensor:
    """Return noise levels at equal distances in log sigma, and a trailing 0.

    Args, returns and raises as `karras_sigmas`.
    """
    _check_range(num_steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, int(num_steps), dtype=torch.float64)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _finished((high + ramp * (low - high)).exp(), sigma_min, sigma_max, "logsnr")


def time_uniform_sigmas(
    num_steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 1
) -> Tensor:
    """Return noise levels at times of the variance-preserving SDE, from 1 to 1e-3, and a 0.

    Args:
        rho: 1 spaces the times equally, 2 quadratically (more of them near the end).

    Other arguments, returns and raises as `karras_sigmas`.
    """
    _check_range(num_steps, sigma_min, sigma_max)
    _check_rho(rho)
    ramp = torch.linspace(0, 1, int(num_steps), dtype=torch.float64)
    times = (1 + ramp * (VP_EPSILON ** (1 / rho) - 1)) ** rho
    try:
        betas = vp_betas(sigma_min, sigma_max)
        sigmas = torch.tensor([vp_sigma(t, betas) for t in times.tolist()], dtype=torch.float64)
    except (OverflowError, ValueError):  # of an exponential, of a root
        sigmas = torch.full_like(ramp, torch.inf)
    return _finished(sigmas, sigma_min, sigma_max, "time_uniform")


SCHEDULES = ("polynomial", "logsnr", "time_uniform")


def make_sigmas(
    schedule: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """Return noise levels by the name of their schedule, and a trailing 0.

    Args:
        schedule: 'polynomial' (`karras_sigmas`), 'logsnr' (`rho` plays no part) or
            'time_uniform'.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    if schedule == "polynomial":
        return karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    if schedule == "logsnr":
        return logsnr_sigmas(num_steps, sigma_min, sigma_max)
    if schedule == "time_uniform":
        return time_uniform_sigmas(num_steps, sigma_min, sigma_max, rho)
    raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
