"""Scores of images: detectors, statistics of their features, and the scores themselves.

>>> import numpy as np
>>> from erk_guid.metrics import frechet_distance, precision_recall
>>> eye = np.eye(3)
>>> frechet_distance(np.zeros(3), eye, np.ones(3), 4 * eye)  # 3 + 3 (1 + 4 - 2 * 2)
6.0
>>> points = np.random.default_rng(0).standard_normal((50, 3))
>>> precision_recall(real=points, generated=points)
(1.0, 1.0)
"""

from __future__ import annotations

from erk_guid.metrics.comparison import Comparison, compare
from erk_guid.metrics.detectors import (
    Classifier,
    Detector,
    detector_names,
    load_detector,
    register_detector,
)
from erk_guid.metrics.scores import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Observed,
    PrecisionRecall,
    Score,
    bootstrap_distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    register_score,
    score_names,
)
from erk_guid.metrics.scoring import Scoring, calc, gen, make_reference
from erk_guid.metrics.statistics import (
    Moments,
    Reference,
    Statistics,
    read_reference,
    write_reference,
)

__all__ = [
    "Classifier",
    "Comparison",
    "Detector",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "Moments",
    "Observed",
    "PrecisionRecall",
    "Reference",
    "Score",
    "Scoring",
    "Statistics",
    "bootstrap_distances",
    "calc",
    "compare",
    "detector_names",
    "frechet_distance",
    "gen",
    "inception_score",
    "kernel_distance",
    "load_detector",
    "make_reference",
    "precision_recall",
    "read_reference",
    "register_detector",
    "register_score",
    "score_names",
    "write_reference",
]
