"""Weights of multistep methods."""

from __future__ import annotations

import math

import numpy as np
import pytest

from erk_guid.quadrature import MODE_DENSITY, lagrange_integrals, modal_weights


def test_weights_integrate_polynomials_exactly() -> None:
    nodes, (a, b) = [0.7, 1.1, 2.5, 3.0], (0.7, 0.2)
    for degree in range(4):
        weights = lagrange_integrals(nodes, a, b)
        exact = (b ** (degree + 1) - a ** (degree + 1)) / (degree + 1)
        got = sum(w * n**degree for w, n in zip(weights, nodes, strict=True))
        assert got == pytest.approx(exact, rel=1e-12)
    # With a density: the integral of t^2 exp(t).
    weights = lagrange_integrals(nodes, 0, 1, math.exp)
    got = sum(w * n**2 for w, n in zip(weights, nodes, strict=True))
    assert got == pytest.approx(math.e - 2, rel=1e-12)


@pytest.mark.parametrize(
    ("nodes", "sigma", "sigma_next"),
    [([5.0, 8, 12, 20], 5.0, 2.0), ([2.0, 5, 8], 5.0, 2.0), ([0.02, 0.5], 0.5, 0.02)],
)
def test_modal_weights_are_the_least_squares_of_the_modes(
    nodes: list[float], sigma: float, sigma_next: float
) -> None:
    # Naively, with NumPy: every mode's exact step, the constraint on the sum put in by weight.
    s = np.exp(np.linspace(math.log(1e-3), math.log(1e3), 4001)) * sigma
    r, share = sigma_next / sigma, (s / sigma) ** (-MODE_DENSITY / 2)
    wanted = np.sqrt(s**2 + sigma_next**2) - r * np.sqrt(s**2 + sigma**2)
    values = np.stack([s**2 / np.sqrt(s**2 + node**2) for node in nodes], axis=1)
    rows = np.concatenate([values * share[:, None], np.full((1, len(nodes)), 1e8)])
    right = np.concatenate([wanted * share, [1e8 * (1 - r)]])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0]
    found = modal_weights(nodes, sigma, sigma_next)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sum(found) == pytest.approx(1 - r, rel=1e-12)
    again = modal_weights([7 * node for node in nodes], 7 * sigma, 7 * sigma_next)
    assert again == pytest.approx(found, rel=1e-9)


def test_modal_weights_of_fine_steps_are_those_of_polynomials() -> None:
    # The limit of any good family, to be reached without loss of digits.
    for h, near in ((1e-2, 0.05), (1e-3, 5e-3), (1e-4, 5e-4)):
        levels = [math.exp(-h * i) for i in range(5)]
        nodes, sigma, sigma_next = levels[3::-1], levels[3], levels[4]
        found = modal_weights(nodes, sigma, sigma_next)
        unit = lagrange_integrals(nodes, sigma, sigma_next, lambda q: -1 / q**2)
        expected = [sigma_next * weight for weight in unit]
        assert found == pytest.approx(expected, rel=near)
