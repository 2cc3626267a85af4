"""Running statistics."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.features import PEAK, linux

from erk_guid.metrics import (
    Moments,
)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_moments_are_numpys_whatever_the_batch(batch: int) -> None:
    # The mean is a million deviations away: sums of squares, subtracted at the end, would lose
    # twelve digits (and fail here), merged scatters lose none.
    features = np.random.default_rng(1).standard_normal((300, 5)) + 1e6
    moments = Moments(5)
    for start in range(0, 300, batch):
        moments.add(torch.from_numpy(features[start : start + batch]))
    found = moments.statistics()
    assert found.count == 300
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_refuse_what_they_cannot_use() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\[n, 3\], got \[2, 4\]"):
        moments.add(torch.zeros(2, 4))
    moments.add(torch.zeros(0, 3))
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.statistics()


MEMORY = (
    PEAK
    + """
import sys, torch
from erk_guid.metrics import Moments
torch.manual_seed(0)
dim, rows = 2048, int(sys.argv[1])
moments = Moments(dim)
for _ in range(rows // 64):
    moments.add(torch.randn(64, dim))
print(peak())
"""
)


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    # 6,400 rows of 2048 features are 105 MB in float64, more than is allowed here.
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEMORY, str(n)], text=True))
        for n in (640, 7040)
    ]
    assert peaks[1] - peaks[0] < 40_000  # in KB
