"""Inception score: how sure a classifier is of each image, and how varied the classes are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.metrics.scores.base import Observed, Score, register_score, required

SPLITS = 10
RNG_SEED = 2020
"""Both are torch-fidelity's values."""
WIDEST = 700.0
"""How far logits may be apart: float64 holds exp of its negative. What lies below counts as 0."""


def inception_score(
    logits: np.ndarray | Tensor, splits: int = SPLITS, rng_seed: int = RNG_SEED
) -> tuple[float, float]:
    """Compute the inception score (Salimans et al. 2016) by torch-fidelity.

    Args:
        logits: logits of a classifier, [n, classes], array or tensor.
        splits: number of parts of the shuffled set that are scored separately.
        rng_seed: seed of the shuffling.

    Returns:
        (mean, deviation over splits).

    Raises:
        ValueError: splits is no number of 1 or more, or there are fewer images.
        MissingExtraError: torch-fidelity is not installed.
    """
    rows = logits.detach() if isinstance(logits, Tensor) else torch.from_numpy(logits)
    if isinstance(splits, bool) or not isinstance(splits, int) or splits < 1:
        raise ValueError(f"splits must be a whole number of at least 1, got {splits!r}")
    if len(rows) < splits:
        raise ValueError(f"{splits} splits need at least as many images, got {len(rows)}")
    try:
        from torch_fidelity.metric_isc import isc_features_to_metric
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "metrics", "the inception score") from error
    # A class of probability 0 in all images would be 0 times infinity.
    rows = rows.double()
    rows = torch.maximum(rows, rows.amax(dim=1, keepdim=True) - WIDEST)
    found = isc_features_to_metric(rows, splits, True, rng_seed)
    return found["inception_score_mean"], found["inception_score_std"]


@dataclass(frozen=True)
class InceptionScore(Score):
    """`inception_score` as a score: mean and deviation over the splits. Needs no reference."""

    splits: int = SPLITS
    rng_seed: int = RNG_SEED

    detector = "fid"
    needs = ("logits",)
    needs_of_reference = ()

    @property
    def fewest(self) -> int:
        return self.splits

    def __call__(
        self, generated: Observed, reference: Observed, device: torch.device
    ) -> dict[str, float]:
        logits = required(generated.logits, "logits")
        mean, deviation = inception_score(logits, self.splits, self.rng_seed)
        return {"mean": mean, "std": deviation}


register_score("is", InceptionScore())
