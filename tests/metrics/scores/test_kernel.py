"""Kernel distance."""

from __future__ import annotations

import numpy as np
import pytest

from erk_guid.metrics import (
    kernel_distance,
)


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the paper (Binkowski et al. 2018, eq. 4), pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_the_kernel_distance_is_the_papers() -> None:
    # One subset with all images: catches a biased estimate, another kernel, a swapped sign.
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (30, 5)), rng.normal(0.4, 1.3, (30, 5))
    mean, spread = kernel_distance(x, y, subsets=3, subset_size=30)
    assert mean == pytest.approx(mmd_by_loops(x, y), rel=1e-5)
    assert spread == pytest.approx(0, abs=1e-6)
    # Of sets of one kind it is 0 on the average, whatever their number.
    same = [
        kernel_distance(rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (40, 5)), 1, 40)[0]
        for _ in range(300)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5


def test_the_kernel_distance_names_what_is_wrong() -> None:
    x = np.zeros((20, 3))
    for real, made, message in (
        (x, np.zeros((20, 4)), "real features have 3 dimensions, generated ones 4"),
        (x, np.full((20, 3), np.nan), "generated features have values that are not finite"),
        (x[:5], x, "subsets of 10 images need at least as many real ones, got 5"),
        (x.astype(int), x, "must be floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(real, made, subset_size=10)
    for numbers in ({"subsets": 0}, {"subset_size": 1}):  # before: NaN, with a warning of numpy's
        with pytest.raises(ValueError, match="subsets must be at least 1 and subset_size 2"):
            kernel_distance(x, x, **numbers)
