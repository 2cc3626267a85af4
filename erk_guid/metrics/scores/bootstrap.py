"""Bootstrap estimate of how a Frechet distance scatters over other images of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from erk_guid.metrics.scores.frechet import frechet_distance
from erk_guid.metrics.statistics.moments import Statistics

ROWS = 4096


def bootstrap_distances(
    features: Sequence[np.ndarray], reference: Statistics, resamples: int, seed: int = 0
) -> np.ndarray:
    """Compute the distances of resampled sets of images to one reference.

    All sets are resampled in the same way. If row i of each comes from the same seed, the
    difference between two columns scatters like the difference between the two samplers.

    Args:
        features: one or more sets, each [n, d] with the same n.
        reference: held fixed.
        resamples: how many times n images are drawn from the n with replacement.

    Returns:
        [resamples, sets]. A column's standard deviation estimates that distance's standard
        error. Resampled distances are larger than the distance itself (fewer distinct images),
        so their mean does not estimate it.

    Raises:
        ValueError: sets of different lengths, or fewer than 2 resamples.
    """
    n = len(features[0])
    if any(len(f) != n for f in features):
        raise ValueError(f"sets of {[len(f) for f in features]} images cannot be paired")
    if resamples < 2:
        raise ValueError(f"a standard error needs at least 2 resamples, got {resamples}")
    rng = np.random.default_rng(seed)
    distances = np.empty([resamples, len(features)])
    for row in distances:
        weights = rng.multinomial(n, np.full(n, 1 / n))[:, None].astype(np.float64)
        for k, x in enumerate(features):
            one = _weighted(x, weights)
            row[k] = frechet_distance(one.mu, one.sigma, reference.mu, reference.sigma)
    return distances


def _weighted(x: np.ndarray, weights: np.ndarray) -> Statistics:
    """Return the statistics of weighted rows; convert only a few thousand rows at a time."""
    n = weights.sum()
    parts = range(0, len(x), ROWS)
    mu = sum((weights[i : i + ROWS] * x[i : i + ROWS]).sum(0) for i in parts) / n
    sigma = np.zeros([x.shape[1]] * 2)
    for i in parts:
        centred = x[i : i + ROWS] - mu
        sigma += centred.T @ (weights[i : i + ROWS] * centred)
    return Statistics(mu, sigma / (n - 1), len(x))
