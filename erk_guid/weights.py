"""Weights of multistep methods: integrals of the Lagrange basis, on the host, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch


def lagrange_integrals(
    nodes: Sequence[float],
    begin: float,
    end: float,
    density: Callable[[float], float] | None = None,
) -> list[float]:
    """What the values at `nodes` weigh in the integral over [begin, end] of their interpolant.

    The integrals of the Lagrange basis polynomials (1 at their own node, 0 at the others),
    times a density if one is given. With the last few noise levels as nodes and the next step as
    interval these are the Adams-Bashforth weights for that spacing.

    Args:
        nodes: distinct places, at most 8.
        begin, end: the interval; reversed, the weights change sign.
        density: smooth on the interval; then the quadrature is good to about 1e-12.
    """
    length = end - begin
    # In the interval's own measure, powers of small or large differences stay sane.
    places = [(node - begin) / length for node in nodes]
    weights = [0.0] * len(nodes)
    for u, w in _gauss_legendre(8 if density is None else 64):
        mass = w * length * (1.0 if density is None else density(begin + u * length))
        for j, place in enumerate(places):
            others = places[:j] + places[j + 1 :]
            weights[j] += mass * math.prod((u - p) / (place - p) for p in others)
    return weights


@cache
def _gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Places in [0, 1] and weights, exact for polynomials of degree below 2 * points.

    Golub and Welsch 1969: eigenvalues of the Jacobi matrix of the Legendre polynomials.
    """
    k = torch.arange(1, points, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(((places + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))
