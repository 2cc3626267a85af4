"""Standard errors of Frechet distances."""

from __future__ import annotations

import numpy as np
import pytest
from support.features import statistics

from erk_guid.metrics import (
    bootstrap_distances,
    frechet_distance,
)
from erk_guid.metrics.statistics import Statistics


def test_bootstrap_errors_are_those_of_new_samples() -> None:
    # The true scatter is had by drawing anew; the bootstrap sees one sample only.
    rng = np.random.default_rng(5)
    reference = Statistics(np.zeros(4), np.eye(4))
    fresh = []
    for _ in range(300):
        x = 1.5 * rng.standard_normal((400, 4))
        fresh.append(frechet_distance(*statistics(x), reference.mu, reference.sigma))
    estimate = bootstrap_distances([x], reference, 300)[:, 0].std(ddof=1)
    assert estimate == pytest.approx(np.std(fresh), rel=0.25)


def test_paired_differences_scatter_less() -> None:
    rng = np.random.default_rng(6)
    reference = Statistics(np.zeros(4), np.eye(4))
    x = rng.standard_normal((300, 4)) + 0.3
    y = x + 0.02
    distances = bootstrap_distances([x, y], reference, 100)
    apart = (distances[:, 1] - distances[:, 0]).std()
    assert apart < 0.2 * distances[:, 0].std()
    assert np.array_equal(distances, bootstrap_distances([x, y], reference, 100))  # seeded
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_distances([x, y[1:]], reference, 100)
    with pytest.raises(ValueError, match="at least 2 resamples"):
        bootstrap_distances([x], reference, 1)
