"""Scores: comparisons of generated images with real ones, by the features of a detector."""

from erk_guid.metrics.scores.base import (
    Need,
    Observed,
    Score,
    register_score,
    score_names,
    score_of,
)
from erk_guid.metrics.scores.bootstrap import bootstrap_distances
from erk_guid.metrics.scores.frechet import FrechetDistance, frechet_distance
from erk_guid.metrics.scores.inception import InceptionScore, inception_score
from erk_guid.metrics.scores.kernel import KernelDistance, kernel_distance
from erk_guid.metrics.scores.neighbours import PrecisionRecall, precision_recall

__all__ = [
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "Need",
    "Observed",
    "PrecisionRecall",
    "Score",
    "bootstrap_distances",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "register_score",
    "score_names",
    "score_of",
]
