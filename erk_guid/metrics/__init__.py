"""Scoring: Frechet distances, precision and recall, inception score, and their detectors.

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

from erk_guid.metrics.bootstrap import bootstrap_distances
from erk_guid.metrics.detectors import (
    Classifier,
    Detector,
    detector_names,
    load_detector,
    register_detector,
)
from erk_guid.metrics.frechet import frechet_distance
from erk_guid.metrics.jobs import Scoring, calc, gen, make_reference
from erk_guid.metrics.neighbours import precision_recall
from erk_guid.metrics.quality import Quality, inception_score, quality
from erk_guid.metrics.references import Reference, read_reference, write_reference
from erk_guid.metrics.statistics import Moments, Statistics

__all__ = [
    "Classifier",
    "Detector",
    "Moments",
    "Quality",
    "Reference",
    "Scoring",
    "Statistics",
    "bootstrap_distances",
    "calc",
    "detector_names",
    "frechet_distance",
    "gen",
    "inception_score",
    "load_detector",
    "make_reference",
    "precision_recall",
    "quality",
    "read_reference",
    "register_detector",
    "write_reference",
]
