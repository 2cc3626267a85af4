"""Noise levels: which sigmas a sampler visits."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80, rho: float = 7
) -> Tensor:
    """EDM's noise levels (Karras et al. 2022, arXiv 2206.00364, eq. 5) and a trailing 0.

    Computed in float64 on the CPU, whatever the device sampled on (MPS has no float64);
    `sample` casts them to the dtype and device of its x.

    Args:
        num_steps: how many levels before the 0, at least 1; a single one is `sigma_max`.
        sigma_min: the last level before the 0, positive.
        sigma_max: the first level, above `sigma_min`.
        rho: positive; larger values put more levels near `sigma_min`.

    Returns:
        float64 [num_steps + 1], strictly decreasing, on the CPU.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("rho", rho)):
        if not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min {sigma_min} must be below sigma_max {sigma_max}")

    ramp = torch.linspace(0, 1, int(num_steps), dtype=torch.float64)
    try:
        a, b = float(sigma_max) ** (1 / rho), float(sigma_min) ** (1 / rho)
        sigmas = (a + ramp * (b - a)) ** rho
    except OverflowError:
        sigmas = torch.full_like(ramp, torch.inf)
    if num_steps > 1:
        sigmas[-1] = sigma_min  # the ends are what was asked for, not what the powers round to
    sigmas[0] = sigma_max
    if not torch.isfinite(sigmas).all() or (sigmas.diff() >= 0).any():
        raise ValueError(
            f"{num_steps} levels from sigma_max {sigma_max} to sigma_min {sigma_min} with rho "
            f"{rho} cannot be told apart in double precision; EDM's rho is 7"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)])
