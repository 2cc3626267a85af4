r"""Parameter-free guidance: combine the evaluations of a two-stage step as Gaussian modes need.

.. math::
    y = x_{low} + \Delta + w J (y - x_{low}), \qquad
    \Delta = w\,(D(x_{low}; \sigma') - D(x; \sigma)) = w\,\sigma' (f - f_{low})

Our own form, built on the paper's idea; no published method. On data of standard deviation s about
a centre, the denoiser answers a displacement of x with mu = s^2 / (s^2 + sigma^2) of it, between 0
(it does not move) and 1 (it follows), and the solution of the ODE is known in closed form. The
published guidance measures stiffness, (1 - mu) / sigma, and corrects by a power of it, with a
strength and a threshold to be tuned. Here the response mu is measured, and what follows from it is
computed. The equation above is that of a step whose second evaluation is at its end (Heun's). Two
things are corrected separately:

- The integral of the denoised image over the step, from its values at both ends. The weight w,
  fitted to Gaussian modes of all sizes (`erk_guid.quadrature.modal_weights`), replaces the
  trapezoid's.
- The value at the far end, which was taken at Euler's solution x_low and not at the step's own.
  J, the denoiser's Jacobian at sigma', is estimated from the pair: along the pair it is what the
  pair shows, elsewhere a multiple of the identity by the pair's response. Both are carried from
  sigma to sigma' as on a Gaussian mode. Two terms of the Neumann series of the equation are taken.

A step with its second evaluation inside (DPM-Solver-2) measures mu on its own two drifts. Its
solution and Euler's are blended with the weight that makes the step exact on that mode:
:math:`x' = x_{low} + \omega (x_{high} - x_{low})`, see `blend_weight`.

Neither costs an evaluation. `docs/accuracy.md` shows what this gains, and what was tried and lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from erk_guid.guidance.base import Guided
from erk_guid.guidance.erk import stiffness
from erk_guid.norms import inner, norm, per_sample, projection, scaled
from erk_guid.quadrature import modal_weights, prior_response
from erk_guid.solvers import name_of, names_of_solvers
from erk_guid.solvers.base import Pair, Solver, StepResult

_Q = TypeVar("_Q", float, Tensor)

LARGEST_RESPONSE = 2.0
"""Limit of the response that is extrapolated from one pair. Between the modes of the data the
denoiser can answer with more than the displacement, without limit."""


@dataclass(frozen=True)
class ParameterFreeGuidance:
    """Guidance without settings, for solvers with two stages (Heun, DPM-Solver-2).

    The first step is guided, too. The step to sigma = 0 is not.
    """

    @property
    def active(self) -> bool:
        """Always true."""
        return True

    def check(self, solver: Solver) -> None:
        """Refuse a solver whose steps do not have two stages.

        Raises:
            ValueError: naming the solvers whose steps have.
        """
        if not solver.two_stages:
            raise ValueError(
                f"the solver {name_of(solver)!r} has no parameter-free form; solvers that have "
                f"one: {', '.join(names_of_solvers(two_stages=True))}"
            )

    def __call__(self, result: StepResult) -> Guided:
        """Return the corrected solution of a step; the gate is None, for there is none."""
        pair = result.pair
        rho = None if pair is None else stiffness(*pair[:4])
        if len(result.weights) != 2:
            return Guided(result.x, rho)
        # A pair within the step is DPM-Solver-2's, whose second evaluation may be at the end.
        inside = pair is not None and not pair.one_level
        inside = inside or result.stages[1].sigma > result.sigma_next
        x = _blended(result) if inside else _answered(result)
        return Guided(x, rho, None, norm(x - result.x))


def _answered(result: StepResult) -> Tensor:
    """Return the solution of a step with its second evaluation at its end, at Euler's solution."""
    sigma, sigma_next = result.sigma, result.sigma_next
    first, second = result.stages
    prior = prior_response(sigma_next)
    w = modal_weights((sigma_next, sigma), sigma, sigma_next)[0]
    # Euler takes D for constant; D at x_low minus D at x is sigma_next (f - f_low).
    change = (first.drift - second.drift) * (w * sigma_next)
    pair = result.pair
    if pair is None or not pair.one_level:
        return second.x + change * _series(w * prior)
    return _with_pair(second.x, change, pair, w, prior, sigma, sigma_next)


def _with_pair(
    x_low: Tensor,
    change: Tensor,
    pair: Pair,
    w: float,
    prior: float,
    sigma: float,
    sigma_next: float,
) -> Tensor:
    """Return two terms of the Neumann series, with J from the pair.

    The series stays bounded where an exact solve of the equation would not.
    """
    dx = pair.x_high - pair.x_low
    dd = dx - sigma * (pair.f_high - pair.f_low)
    # Only their ratio and their directions count: no number below is a scale squared.
    dx, dx_unit = scaled(dx)
    dd, dd_unit = scaled(dd)
    ratio = dd_unit / dx_unit
    size = inner(dx, dx)
    tiny = torch.finfo(size.dtype).tiny
    safe = size.clamp_min(tiny)
    relative = (inner(dd, dd) / safe).clamp_min(tiny).sqrt()
    measured = ratio * relative
    # dd is what is left of a difference of large numbers; below their rounding it says nothing,
    # and the step does without the pair.
    large = norm(pair.x_high) + sigma * norm(pair.f_high)
    noise = 4 * torch.finfo(dx.dtype).eps * (large / dx_unit) / safe.sqrt()
    known = (size > 0) & (measured > noise)
    mu = measured.clamp(max=1)
    # J = mu' + (gain dd - mu' dx) dx^T / |dx|^2 with dx and dd as they are here.
    shrinking = mu + (1 - mu) * (sigma_next / sigma) ** 2
    mu_next = torch.where(known, mu / shrinking, prior)
    gain = torch.minimum(ratio / shrinking, LARGEST_RESPONSE / relative)
    gain = torch.where(known, gain, torch.zeros_like(gain))
    along = inner(change, dx) / safe
    extra = w * along * (1 + w * (mu_next + gain * inner(dd, dx) / safe))
    y = x_low + change * per_sample(_series(w * mu_next), change)
    y = torch.addcmul(y, per_sample(extra * gain, y), dd)
    return torch.addcmul(y, per_sample(-extra * mu_next, y), dx)


def _series(q: _Q) -> _Q:
    return 1 + q + q * q


def _blended(result: StepResult) -> Tensor:
    """Return the solution of a step with its second evaluation inside, on Euler's line."""
    first, second = result.stages
    node, ratio = second.sigma / result.sigma, result.sigma_next / result.sigma
    x_low = first.x + (result.sigma_next - result.sigma) * first.drift
    mu = response_in_step(first.drift, second.drift, node)
    weight = blend_weight(mu, ratio, node, result.weights[1])
    return torch.addcmul(x_low, per_sample(weight, x_low), result.x - x_low)


def response_in_step(f: Tensor, f_node: Tensor, node: float) -> Tensor:
    """Return the denoiser's response mu from one step's two drifts, [N], clipped to [0, 1].

    On a Gaussian mode with response mu at sigma, the drift at the node is q times that at sigma,
    q = node (mu + (1 - mu) node) / (mu + (1 - mu) node^2), wherever the mode is centred: a
    linear equation for mu. It is measured along the drift itself.

    Args:
        f, f_node: drifts at sigma and at the node, [N, ...].
        node: noise level of the second evaluation over sigma, above 0 and below 1.
    """
    q = projection(f_node, f).clamp(node, 1.0)
    return (node**2 * (1 - q) / (q * (1 - node**2) - node * (1 - node))).clamp(0, 1)


def blend_weight(
    mu: Tensor, ratio: float, node: float | None = None, weight_node: float = 0.5
) -> Tensor:
    """Return how much of the high-order solution makes a step exact on a Gaussian mode, [N].

    On a mode whose response at sigma is `mu`, an exact step multiplies by
    E = sqrt(mu + (1 - mu) ratio^2) and Euler's by A = mu + (1 - mu) ratio. The two-stage
    solution's factor H lies so that (E - A) / (H - A) has no 0/0 left in it. For Heun it is
    2 E^2 / (E + A), which rises from `ratio` (mu = 0: Heun in data-prediction form) to 1. So the
    blend is a convex combination of the two solutions and cannot run away.

    Args:
        mu: [N], from 0 to 1.
        ratio: sigma_next / sigma, above 0 and below 1.
        node: noise level of the second evaluation over sigma; by default `ratio`, as Heun's.
        weight_node: what the high-order slope takes of that evaluation.
    """
    node = ratio if node is None else node
    exact = (mu + (1 - mu) * ratio**2).sqrt()
    euler = mu + (1 - mu) * ratio
    at_node = mu + (1 - mu) * node**2
    return (1 - ratio) / (1 - node) * at_node / (weight_node * (exact + euler))
