"""Frechet distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATA
from support.features import statistics

from erk_guid.metrics import (
    frechet_distance,
)


@pytest.fixture(scope="module")
def golden_features() -> dict[str, np.ndarray]:
    with np.load(DATA / "frechet.npz") as data:
        return dict(data)


def test_golden_distances(golden_features: dict[str, np.ndarray]) -> None:
    # Catches: n instead of n - 1 in the covariance (1e-3), the mean term left out or not squared,
    # and in the second case a Cholesky factor of a singular matrix (fails, or is far off).
    a, b = golden_features["features_a"], golden_features["features_b"]
    whole = frechet_distance(*statistics(a), *statistics(b))
    assert whole == pytest.approx(golden_features["fd_ab"], rel=1e-8)
    few = frechet_distance(*statistics(a[:10]), *statistics(b))
    assert few == pytest.approx(golden_features["fd_a10_b"], rel=1e-4)
    swapped = frechet_distance(*statistics(b), *statistics(a[:10]))
    assert swapped == pytest.approx(few, rel=1e-9)


def test_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b = np.exp(rng.standard_normal((2, 40)) * 3)
    a[:15] = 0  # rank-deficient, in the same basis
    b[10:20] = 0
    for first, second in ((a + 1e-3, b + 1e-3), (a, b + 1e-3), (a + 1e-3, b), (a, b)):
        exact = ((first**0.5 - second**0.5) ** 2).sum()
        got = frechet_distance(
            np.zeros(40), (basis * first) @ basis.T, np.zeros(40), (basis * second) @ basis.T
        )
        assert got == pytest.approx(exact, rel=1e-6)


def test_distances_of_small_cases() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, eye, torch.ones(3), 4 * eye) == pytest.approx(6)
    # Two single points: only the means count.
    assert frechet_distance(zero, 0 * eye, torch.ones(3), 0 * eye) == pytest.approx(3)
    assert frechet_distance([0.0], [[4.0]], [1.0], [[9.0]]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "2 against 3 dimensions"),
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "sigma1"),
        ((np.zeros(2), np.full((2, 2), np.nan), np.zeros(2), np.eye(2)), "not finite"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, 2], [0, 1.0]])), "not symmetric"),
        ((np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "negative"),
        ((np.zeros(2), np.array([[1, 3], [3, 1.0]]), np.zeros(2), np.eye(2)), "negative"),
    ],
)
def test_what_is_no_covariance_is_refused(arguments: tuple[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)
