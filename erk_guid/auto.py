"""Parameter-free guidance: what a step computes anyway, put together as Gaussian modes want it.

On data of standard deviation s about a centre, the denoiser answers a displacement of x with
mu = s^2 / (s^2 + sigma^2) of it, between 0 (it does not move) and 1 (it follows), and the solution
of the ODE is known in closed form. The published guidance measures stiffness, (1 - mu) / sigma,
and corrects by a power of it, with a strength and a threshold to be tuned. Here the response mu is
measured, and what follows from it is computed. Not the paper's method, but built on its idea.

**DPM-Solver-2** (`Blend`) has its pair inside the step. The two solutions are blended with the
weight that makes the step exact on the mode that was measured.

**Heun** (`Answer`) has a second pair, from the step before, at one noise level. Its step is made of
two things that can go wrong separately:

- The integral of the denoised image over the step, from its values at both ends. Weights fitted
  to Gaussian modes of all sizes (`erk_guid.quadrature.modal_weights`) replace the trapezoid.
- The value at the far end, which was taken at Euler's solution and not at the step's own. The
  denoiser's answer to the difference is estimated from the pair: along the pair it is what the
  pair shows, elsewhere a multiple of the difference by the pair's response, and both are carried
  from sigma to sigma_next as on a Gaussian mode.

Neither costs an evaluation. See `docs/accuracy.md` for what this gains, and for what was tried
and lost.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from erk_guid.guidance import Pair, inner, norm, per_sample

_Q = TypeVar("_Q", float, Tensor)

PRIOR_RESPONSE = 0.5
"""Assumed where none was measured: the mean over modes of all sizes, and the middle of [0, 1]."""

LARGEST_RESPONSE = 2.0
"""Between the modes of the data the denoiser can answer with more than the displacement, without
limit; what is extrapolated from one pair is cut off here."""


class Embedded(Protocol):
    """What a step offers the parameter-free form."""

    def solution(self) -> Tensor:
        """The step's solution in the parameter-free form, like x."""


class Blend(NamedTuple):
    """A two-stage step from sigma to sigma_next with its second evaluation at ``node * sigma``."""

    x_high: Tensor
    """The step's own solution."""
    x_low: Tensor
    """Euler's."""
    f: Tensor
    """The drift at sigma."""
    f_node: Tensor
    """The drift at the node, a point of Euler's line."""
    ratio: Tensor
    """sigma_next / sigma."""
    node: Tensor
    weight_node: float
    """What the high-order slope takes of f_node; it takes 1 - this of f."""

    def solution(self) -> Tensor:
        mu = response_in_step(self.f, self.f_node, self.node)
        weight = blend_weight(mu, self.ratio, self.node, self.weight_node)
        return torch.addcmul(self.x_low, per_sample(weight, self.x_high), self.x_high - self.x_low)


class Answer(NamedTuple):
    """A Heun step, and the pair at its beginning if the step before left one."""

    x_low: Tensor
    """Euler's solution at sigma_next."""
    f: Tensor
    """The drift at sigma."""
    f_low: Tensor
    """The drift at (x_low, sigma_next)."""
    sigma: Tensor
    sigma_next: Tensor
    quadrature: float
    """Of the denoised image at sigma_next: `modal_weights` for the nodes sigma_next, sigma."""
    pair: Pair | None
    prior: float = PRIOR_RESPONSE
    """The denoiser's response at sigma_next where there is no pair to measure it."""

    def solution(self) -> Tensor:
        w = self.quadrature
        # Euler takes D for constant; D at x_low minus D at x is sigma_next (f - f_low).
        change = (self.f - self.f_low) * (w * self.sigma_next)
        if self.pair is None:
            return self.x_low + change * _series(w * self.prior)
        # The solution y obeys y = x_low + change + w J (y - x_low) with J the denoiser's Jacobian
        # at sigma_next; two terms of its Neumann series, which stay bounded where an exact solve
        # would not.
        dx = self.pair.x_high - self.pair.x_low
        dd = dx - self.sigma * (self.pair.f_high - self.pair.f_low)
        size = inner(dx, dx)
        tiny = torch.finfo(size.dtype).tiny
        safe = size.clamp_min(tiny)
        measured = (inner(dd, dd) / safe).clamp_min(tiny).sqrt()
        # dd is what is left of a difference of large numbers; below their rounding it says nothing,
        # and the step does without the pair.
        large = norm(self.pair.x_high) + self.sigma.to(size) * norm(self.pair.f_high)
        noise = 4 * torch.finfo(dx.dtype).eps * large / safe.sqrt()
        known = (size > 0) & (measured > noise)
        mu = measured.clamp(max=1)
        ratio = (self.sigma_next / self.sigma).to(mu)
        # J = mu' + (gain dd - mu' dx) dx^T / |dx|^2.
        shrinking = mu + (1 - mu) * ratio**2
        mu_next = torch.where(known, mu / shrinking, self.prior)
        gain = torch.minimum(1 / shrinking, LARGEST_RESPONSE / measured.clamp_min(1e-30))
        gain = torch.where(known, gain, torch.zeros_like(gain))
        along = inner(change, dx) / safe
        extra = w * along * (1 + w * (mu_next + gain * inner(dd, dx) / safe))
        y = self.x_low + change * per_sample(_series(w * mu_next), change)
        y = torch.addcmul(y, per_sample(extra * gain, y), dd)
        return torch.addcmul(y, per_sample(-extra * mu_next, y), dx)


def _series(q: _Q) -> _Q:
    return 1 + q + q * q


def response_in_step(f: Tensor, f_node: Tensor, node: Tensor) -> Tensor:
    """How the denoiser answers, from one step's two drifts, [N], clipped to [0, 1].

    On a Gaussian mode with response mu at sigma, the drift at the node is q times that at sigma,
    q = node (mu + (1 - mu) node) / (mu + (1 - mu) node^2), wherever the mode is centred: a
    linear equation for mu. Measured along the drift itself.
    """
    size = inner(f, f)
    node = node.to(size)
    q = torch.where(size > 0, inner(f_node, f) / size.clamp_min(torch.finfo(size.dtype).tiny), 1)
    q = torch.minimum(torch.maximum(q, node), torch.ones_like(q))
    return (node**2 * (1 - q) / (q * (1 - node**2) - node * (1 - node))).clamp(0, 1)


def blend_weight(
    mu: Tensor, ratio: Tensor, node: Tensor | None = None, weight_node: float = 0.5
) -> Tensor:
    """How much of the high-order solution makes a step exact on a Gaussian mode, [N].

    On a mode whose response at sigma is `mu`, an exact step multiplies by
    E = sqrt(mu + (1 - mu) ratio^2) and Euler's by A = mu + (1 - mu) ratio. The two-stage
    solution's factor H lies so that (E - A) / (H - A) has no 0/0 left in it; for Heun it is
    2 E^2 / (E + A), which rises from `ratio` (mu = 0: Heun in data-prediction form) to 1, so the
    blend is a convex combination of the two solutions and cannot run away.

    Args:
        mu: [N], from 0 to 1.
        ratio: sigma_next / sigma, above 0 and below 1.
        node: noise level of the second evaluation over sigma; by default `ratio`, as Heun's.
        weight_node: what the high-order slope takes of that evaluation.
    """
    ratio = ratio.to(mu)
    node = ratio if node is None else node.to(mu)
    exact = (mu + (1 - mu) * ratio**2).sqrt()
    euler = mu + (1 - mu) * ratio
    at_node = mu + (1 - mu) * node**2
    return (1 - ratio) / (1 - node) * at_node / (weight_node * (exact + euler))


def improve(x: Tensor, embedded: Embedded) -> tuple[Tensor, Tensor]:
    """The parameter-free form of a step's solution `x`, and the size of the change, [N]."""
    improved = embedded.solution()
    return improved, norm(improved - x)
