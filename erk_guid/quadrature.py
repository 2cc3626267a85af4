"""Weights of multistep methods, on the host, in float64.

`lagrange_integrals` are those of polynomial interpolation, `modal_weights` those fitted to Gaussian
modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch


def lagrange_integrals(
    nodes: Sequence[float],
    begin: float,
    end: float,
    density: Callable[[float], float] | None = None,
) -> list[float]:
    """Return the weights of the values at `nodes` in the integral of their interpolant.

    These are the integrals over [begin, end] of the Lagrange basis polynomials (1 at their own
    node, 0 at the others), times a density if one is given. With the last few noise levels as nodes
    and the next step as interval they are the Adams-Bashforth weights for that spacing.

    Args:
        nodes: distinct places, at most 8.
        begin, end: the interval; reversed, the weights change sign.
        density: smooth on the interval; then the quadrature is good to about 1e-12.
    """
    return list(_lagrange_integrals(tuple(nodes), begin, end, density))


@lru_cache(maxsize=4096)
def _lagrange_integrals(
    nodes: tuple[float, ...],
    begin: float,
    end: float,
    density: Callable[[float], float] | None,
) -> tuple[float, ...]:
    length = end - begin
    # In the interval's own measure, powers of small or large differences stay sane.
    places = [(node - begin) / length for node in nodes]
    weights = [0.0] * len(nodes)
    for u, w in _gauss_legendre(8 if density is None else 64):
        mass = w * length * (1.0 if density is None else density(begin + u * length))
        for j, place in enumerate(places):
            others = places[:j] + places[j + 1 :]
            weights[j] += mass * math.prod((u - p) / (place - p) for p in others)
    return tuple(weights)


@cache
def _gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Return places in [0, 1] and weights, exact for polynomials of degree below 2 * points."""
    from scipy.special import roots_legendre  # here, so that the rest needs torch alone

    places, weights = roots_legendre(points)
    return list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


MODE_DENSITY = 0.5
"""How modes are weighed against each other in `modal_weights`: by s^-MODE_DENSITY, over evenly
spaced log s. The one constant in it; 0 to 0.5 fit the tree and the shipped model about equally
well (docs/accuracy.md)."""


ALL_NOISE = 100.0
"""Above this noise level every mode that data has is small against the noise. EDM's noise levels
end below it, flow matching begins above. Data are taken to be scaled to about 1, as EDM's are."""

MOSTLY_NOISE = 10.0
"""Above this noise level a denoiser hardly answers a displacement: by a hundredth of it, for data
of size 1."""

PRIOR_RESPONSE = 0.5
"""Response of a denoiser that was not measured: the mean over modes of all sizes."""


def prior_response(sigma: float) -> float:
    """Return how a denoiser answers a displacement at `sigma`, where that was not measured."""
    return 0.0 if sigma > MOSTLY_NOISE else PRIOR_RESPONSE


def modal_weights(nodes: Sequence[float], sigma: float, sigma_next: float) -> list[float]:
    """Return the weights of denoised images at the noise levels `nodes` in a step.

    They are fitted to Gaussian modes.

    Along a solution of the ODE, data of standard deviation s has x = m + z e(sigma) and
    D = m + z s^2 / e(sigma) with e(sigma) = sqrt(s^2 + sigma^2). The weights of
    ``x' = r x + sum_j w_j D(nodes_j)``, r = sigma_next / sigma, are exact for the mean m (they sum
    to 1 - r), and have the least mean squared error over modes of all sizes s, log s spread
    evenly and weighed by `MODE_DENSITY`. They depend on the ratios of the noise levels alone.

    A step that begins above `ALL_NOISE` is an exception: modes of all sizes would be mostly modes
    that no data has. D of those that it has goes as 1 / sigma there, in which the step's integral
    is exact by the trapezoid.

    Args:
        nodes: distinct noise levels above 0; `sigma` itself first, or, to correct a step,
            `sigma_next` first and `sigma` second.
        sigma, sigma_next: the step.
    """
    return list(_modal_weights(tuple(nodes), sigma, sigma_next))


@lru_cache(maxsize=4096)
def _modal_weights(nodes: tuple[float, ...], sigma: float, sigma_next: float) -> tuple[float, ...]:
    r = sigma_next / sigma
    if sigma > ALL_NOISE:
        whole = [(1 - r) / 2, (1 - r) / 2] if nodes[0] == sigma_next else [1 - r]
        return (*whole, *[0.0] * (len(nodes) - len(whole)))
    if len(nodes) == 1:
        return (1 - r,)
    # Beyond a thousandth and a thousand times sigma the modes say next to nothing: D is 0, or x.
    s = torch.logspace(-3, 3, 121, dtype=torch.float64) * sigma

    def deviation(level: float) -> torch.Tensor:
        return (s**2 + level**2).sqrt()

    # Everything relative to the first node, whose weight the sum decides, and with no difference
    # of nearly equal numbers left, so that fine steps keep their digits.
    first = nodes[0]
    at_first, at_sigma, at_next = deviation(first), deviation(sigma), deviation(sigma_next)

    def apart(level: float) -> torch.Tensor:
        """D at `level` minus D at the first node."""
        at = deviation(level)
        return s**2 * (first**2 - level**2) / (at * at_first * (at + at_first))

    wanted = (
        (1 - r) * sigma * s**2 * (sigma**2 - sigma_next**2)
        / (at_sigma * (at_sigma + at_next) * (sigma * at_next + sigma_next * at_sigma))
    )  # fmt: skip
    wanted = wanted + (1 - r) * apart(sigma)
    columns = torch.stack([apart(node) for node in nodes[1:]], dim=1)
    share = (s / sigma) ** (-MODE_DENSITY / 2)
    columns, wanted = columns * share[:, None], wanted * share
    size = columns.norm(dim=0)
    solved = torch.linalg.lstsq(columns / size, wanted[:, None]).solution[:, 0] / size
    later: list[float] = solved.tolist()
    return (1 - r - sum(later), *later)
