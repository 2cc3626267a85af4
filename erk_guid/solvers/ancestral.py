"""Noise in the steps: go lower than the next noise level, then add noise up to it.

With `eta` a step from sigma to sigma' goes to

    sigma_down = sigma' sqrt(1 - eta^2 (1 - sigma'^2 / sigma^2))

and then adds noise of standard deviation sqrt(sigma'^2 - sigma_down^2) (k-diffusion's "ancestral"
steps, after Song et al. 2021, arXiv 2010.02502, equation 16). If the step itself is exact, x has
the right distribution at sigma' for any eta. eta = 0 is the ODE, eta = 1 the reverse SDE.

The values of past steps hold noise that is not in the future: extrapolated as far as the ODE goes,
to sigma_down, they make the variance too large. As far as sigma' is right: an Adams method of
second order has the variance of the SDE to second order. So a step's weights are those of the step
to sigma', scaled to have the sum of the step to sigma_down (`weights_to`). For
DPM-Solver++ 2 this is DPM-Solver++ 2M SDE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from torch import Tensor

from erk_guid.denoisers import Denoiser
from erk_guid.solvers.base import Memory, Step, StepResult


def check_eta(eta: float) -> None:
    """Raise ValueError unless `eta` is a number from 0 to 1."""
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number from 0 (no noise) to 1, got {eta!r}")


@dataclass(frozen=True)
class Descent:
    """Where a step with noise goes.

    Attributes:
        sigma, sigma_next: the interval.
        down: the noise level that the step goes to before noise is added.
        spread: standard deviation of that noise; 0 without any.
    """

    sigma: float
    sigma_next: float
    down: float
    spread: float

    @classmethod
    def of(cls, sigma: float, sigma_next: float, eta: float) -> Descent:
        """Return the descent from sigma to sigma_next < sigma with `eta` from 0 to 1."""
        share = eta**2 * (1 - (sigma_next / sigma) ** 2)
        return cls(
            sigma, sigma_next, sigma_next * math.sqrt(1 - share), sigma_next * math.sqrt(share)
        )

    @property
    def scale(self) -> float:
        """What x counts for in a step by denoised images: down / sigma."""
        return self.down / self.sigma

    def weights_to(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return the weights of denoised images to `down`, given those of the step to sigma_next.

        Their sum is 1 - down / sigma. Without noise they are the same.
        """
        if self.spread == 0:
            return tuple(weights)
        further = (1 - self.scale) / (1 - self.sigma_next / self.sigma)
        return tuple(weight * further for weight in weights)


@dataclass(frozen=True)
class RaisedStep:
    """A step to a lower noise level, and noise on top of it.

    Args:
        lower: the step; it ends at `Descent.down`.
        sigma_next: the noise level with the noise.
        spread: standard deviation of the noise.
    """

    lower: Step
    sigma_next: float
    spread: float

    @property
    def sigma(self) -> float:
        """Noise level where the step begins."""
        return self.lower.sigma

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        memory: Memory | None = None,
        noise: Tensor | None = None,
    ) -> tuple[StepResult, Memory | None]:
        result, memory = self.lower(denoiser, x, memory)
        raised = result.x + noise_of(self.spread, noise, x)
        # Weights and pairs are those of a step without noise.
        return replace(result, x=raised, sigma_next=self.sigma_next, weights=()), memory


def raised(descent: Descent, lower: Step) -> Step:
    """Return the step that adds a descent's noise to a step that goes to its `down`."""
    if descent.spread == 0:
        return lower
    return RaisedStep(lower, descent.sigma_next, descent.spread)


def noise_of(spread: float, noise: Tensor | None, x: Tensor) -> Tensor:
    """Return the noise that a step adds: `spread` times standard normal noise, like x.

    Raises:
        ValueError: the step was called without noise, or with noise of another shape.
    """
    if noise is None:
        raise ValueError(
            "this step adds noise (eta or churn): pass standard normal noise shaped like x"
        )
    if noise.shape != x.shape:
        raise ValueError(f"noise must be shaped like x {list(x.shape)}, got {list(noise.shape)}")
    return spread * noise.to(x.dtype)
