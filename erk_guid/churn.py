"""Churn: EDM's stochastic sampler, noise added before a step (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from erk_guid.solvers.ancestral import noise_of

__all__ = ["Churn"]

NUMBERS = ("S_churn", "S_min", "S_max", "S_noise")
"""The settings, under EDM's names."""

LARGEST_GAMMA = math.sqrt(2) - 1
"""Limit of gamma, so that no more noise is added than there is."""


@dataclass(frozen=True)
class Churn:
    """Add noise before a step, which then starts from a higher noise level.

    ``gamma = min(S_churn / steps, sqrt(2) - 1)``, ``sigma_hat = sigma + gamma sigma``,
    ``x_hat = x + sqrt(sigma_hat^2 - sigma^2) S_noise randn_like(x)``, at noise levels from
    `S_min` to `S_max` (both included). Elsewhere no noise is asked for.

    Args:
        S_churn: how much noise is added in all, 0 or more. 0 adds none.
        S_min, S_max: the range of sigma where it is added.
        S_noise: standard deviation of the noise; above 1 makes up for detail that is lost.
        randn_like: returns standard normal noise shaped like its argument.

    Raises:
        ValueError: a number out of range; the message names it.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}")
            if name != "S_max" and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")

    @property
    def active(self) -> bool:
        """True if any noise is added at all."""
        return self.S_churn > 0

    @property
    def numbers(self) -> dict[str, float]:
        """The settings by name; empty if no noise is added."""
        return {name: getattr(self, name) for name in NUMBERS} if self.active else {}

    def gamma(self, sigma: float, steps: int, dtype: torch.dtype = torch.float64) -> float | None:
        """Return how far above `sigma` a step of a run of `steps` begins; None adds no noise.

        The range is compared in the `dtype` of the noise levels: a float32 level of 0.1 is not
        above an `S_max` of 0.1.
        """
        low, high = (torch.tensor(float(s), dtype=dtype).item() for s in (self.S_min, self.S_max))
        if not self.active or not low <= sigma <= high:
            return None
        return min(self.S_churn / steps, LARGEST_GAMMA)

    def add(self, x: Tensor, sigma: float, gamma: float) -> tuple[Tensor, float]:
        """Return ``(x_hat, sigma_hat)`` for x at noise level sigma, computed in the dtype of x."""
        level = torch.tensor(sigma, dtype=x.dtype)
        raised = level + gamma * level
        spread = (raised**2 - level**2).sqrt() * self.S_noise
        return x + noise_of(spread.item(), self.randn_like(x), x), raised.item()
