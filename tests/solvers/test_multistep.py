"""What multistep methods share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erk_guid.solvers import make_solver
from erk_guid.solvers.multistep import dynamic_threshold


def test_thresholding_by_hand_and_its_limits() -> None:
    # Values from NumPy's quantile; the published function is held to in test_diff_sampler.py.
    x = 3 * torch.randn(4, 3, 20, 20, dtype=torch.float64)
    x[0] /= 30  # stays as it is: all of it lies within 1
    found = dynamic_threshold(x)
    for one, result in zip(x.numpy(), found.numpy(), strict=True):
        limit = max(np.quantile(np.abs(one), 0.995), 1)
        np.testing.assert_allclose(result, np.clip(one, -limit, limit) / limit, rtol=1e-12)
    assert torch.equal(found[0], x[0])
    with pytest.raises(ValueError, match="needs predict_x0"):
        make_solver("unipc", threshold=True, predict_x0=False)
