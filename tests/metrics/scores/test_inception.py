"""Inception score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from erk_guid.metrics import (
    inception_score,
)


def test_inception_score_of_certain_and_uncertain_classifiers() -> None:
    rng = np.random.default_rng(4)
    classes = rng.integers(0, 10, 2000)
    certain = 50 * np.eye(10)[classes]
    mean, deviation = inception_score(certain)
    # Ten classes, each surely known; in splits of 200 their frequencies are uneven, which costs
    # (10 - 1) / (2 * 200) of entropy.
    assert mean == pytest.approx(10 * np.exp(-9 / 400), rel=0.01)
    assert 0 < deviation < 0.2
    # Classes that no image is of: 0 times infinity, without care.
    sure = np.where(certain == certain.max(1, keepdims=True), 1e5, -1e5)
    assert inception_score(np.hstack([sure, np.full((len(sure), 3), -1e5)]))[0] == (
        pytest.approx(mean)
    )
    assert inception_score(np.zeros((100, 10)))[0] == pytest.approx(1)
    logits = torch.from_numpy(rng.standard_normal((105, 10)))
    expected = isc_features_to_metric(logits, 10, True, 2020)
    assert inception_score(logits)[0] == pytest.approx(expected["inception_score_mean"])
    with pytest.raises(ValueError, match="10 splits need at least as many images, got 9"):
        inception_score(np.zeros((9, 10)))
    for splits in (0, -1, 2.5):
        with pytest.raises(ValueError, match="splits must be a whole number"):
            inception_score(np.zeros((9, 10)), splits=splits)  # type: ignore[arg-type]
