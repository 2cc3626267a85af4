"""Precision, recall and inception score of generated images."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erk_guid.common.datasets import ImageSource, holds_images, open_images
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import sha256_of, user_path
from erk_guid.generation.devices import choose_device
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.metrics.detectors import (
    Detector,
    check_detector_name,
    describe,
    load_detector,
    refuse_others,
)
from erk_guid.metrics.scores import InceptionScore, Observed, PrecisionRecall
from erk_guid.metrics.scoring import (
    check_weights_are_used,
    names_of,
    read_blocks,
    tell_ignored,
    versions,
)
from erk_guid.metrics.statistics import Collected, blocks, collect
from erk_guid.metrics.statistics.references import SHIPPED, locate_reference, read_reference

METRICS = ("precision", "recall", "is")
REAL = "ILSVRC2012_img_val_resize_centercrop"
"""The folder of real images that the published program expects."""

MANIFOLD_DETECTOR, SCORE_DETECTOR = PrecisionRecall.detector, InceptionScore.detector
"""torch-fidelity's detectors for precision and recall, and for the inception score."""

SPLITS = InceptionScore.splits


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings of a comparison. Field names are those of calculate_precision_recall_is.py."""

    generated: Path
    real: str = REAL
    metrics: Sequence[str] = METRICS
    detector: str | None = None
    k: int = PrecisionRecall.k
    batch: int = 500
    workers: int = 2
    device: str | None = None
    detector_weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Set:
    """One side of a comparison: images, or features from a file."""

    path: str
    images: ImageSource | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what identifies the set, in JSON's types."""
        if self.images is None:
            return {"path": self.path, "sha256": sha256_of(locate_reference(self.path))}
        return {"path": self.path, "names": names_of(self.images, range(len(self.images)))}


def _count(side: _Set, detector: str) -> int:
    if side.images is not None:
        return len(side.images)
    return len(side.features.get(detector, ()))


def compare(job: Comparison) -> dict[str, Any]:
    """Compute precision and recall against the real images, and the inception score.

    Returns:
        `precision`, `recall`, `inception_score_mean`, `inception_score_std` as far as asked
        for, and everything needed to repeat them.

    Raises:
        ErkGuidError: any error that the user can correct.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ErkGuidError("precision and recall run in one process; start it without torchrun")
    device = choose_device(job.device)
    manifold = job.detector or MANIFOLD_DETECTOR
    classifier = job.detector or SCORE_DETECTOR
    compares = bool({"precision", "recall"} & set(job.metrics))
    scores = "is" in job.metrics
    used = [name for name, needed in ((manifold, compares), (classifier, scores)) if needed]
    for name in used:
        check_detector_name(name)
    check_weights_are_used(job.detector_weights, used)
    generated = _open(str(job.generated), classifier if scores else manifold)
    if scores and generated.images is None:
        raise ErkGuidError(f"{job.generated} holds features; the inception score needs images")
    real = _open(job.real, manifold, shipped=True) if compares else None
    try:
        _check_counts(job, generated, real, manifold)
        if real is not None:
            _tell_other_size(generated, real)
        detectors: dict[str, Detector] = {
            name: load_detector(name, device, job.detector_weights.get(name))
            for name in dict.fromkeys(used)
        }
        result: dict[str, Any] = {}
        made = {
            name: _collect(
                job, generated, detector, device,
                features=compares and name == manifold, logits=scores and name == classifier,
            )
            for name, detector in detectors.items()
        }  # fmt: skip
        if real is not None:
            theirs = _collect(job, real, detectors[manifold], device, features=True, logits=False)
            a, b = (one.features[manifold] for one in (theirs, made[manifold]))
            found = PrecisionRecall(job.k)(Observed(features=b), Observed(features=a), device)
            result |= {name: value for name, value in found.items() if name in job.metrics}
            result["k"] = job.k
            result["num_real"], result["real"] = len(a), real.record()
        if scores:
            score = InceptionScore()
            logits = Observed(logits=made[classifier].logits[classifier])
            found = score(logits, Observed(), device)
            result |= {f"inception_score_{name}": value for name, value in found.items()}
            result["splits"], result["rng_seed"] = score.splits, score.rng_seed
    except ValueError as error:
        raise ErkGuidError(str(error)) from error
    return {
        **result,
        "num_generated": _count(generated, manifold),
        "generated": generated.record(),
        "detectors": [describe(d) for d in detectors.values()],
        "batch": job.batch,
        "device": str(device),
        "versions": versions(),
    }


def _open(source: str, detector: str, shipped: bool = False) -> _Set:
    """Open images, or a file with features (an .npz from `ref` or `calc --features`)."""
    path = user_path(source)
    features = shipped and source == SHIPPED  # a folder of that name is ./digits
    if path.suffix == ".npz" and path.is_file():
        features = not holds_images(path)
    if features:
        reference = read_reference(source)
        if detector not in reference.features:
            raise ErkGuidError(
                f"{source} holds no features of {detector}; it has "
                f"{', '.join(reference.features) or 'none'} (see --detector)"
            )
        return _Set(source, None, reference.features, reference.about)
    if source == REAL and not path.exists():
        raise ErkGuidError(
            f"there is no folder {REAL} here; name the folder of real images with --real"
        )
    tell_ignored(path)
    return _Set(source, open_images(path))


def _check_counts(job: Comparison, generated: _Set, real: _Set | None, manifold: str) -> None:
    for side in (generated, real):
        if side is not None and real is not None and _count(side, manifold) <= job.k:
            raise ErkGuidError(
                f"{side.path} has {_count(side, manifold)} images; --k {job.k} needs at least "
                f"{job.k + 1}"
            )
    if "is" in job.metrics and _count(generated, manifold) < SPLITS:
        raise ErkGuidError(
            f"{generated.path} has {_count(generated, manifold)} images; the inception score's "
            f"{SPLITS} splits need at least as many"
        )


def _tell_other_size(generated: _Set, real: _Set) -> None:
    """Print a note if the images of two sets differ in size: a detector may resize them."""
    sizes = ["x".join(map(str, side.images.read(0).shape[:0:-1])) for side in (generated, real)
             if side.images is not None]  # fmt: skip
    if len(set(sizes)) > 1:
        print(
            f"Note: {generated.path} has images of {sizes[0]}, {real.path} of {sizes[1]}: what "
            "resizing does to them is compared, too",
            file=sys.stderr,
        )


def _collect(
    job: Comparison,
    side: _Set,
    detector: Detector,
    device: torch.device,
    *,
    features: bool,
    logits: bool,
) -> Collected:
    if side.images is None:
        refuse_others(side.path, side.about, detector)
        rows = side.features[detector.name].astype(np.float32)
        if rows.ndim != 2 or rows.shape[1] != detector.feature_dim:
            raise ErkGuidError(
                f"{side.path}: its features of {detector.name} are {list(rows.shape)}, not "
                f"[N, {detector.feature_dim}]"
            )
        return Collected({}, {detector.name: rows})
    parts = blocks(range(len(side.images)), job.batch, ProcessGroup())
    return collect(
        read_blocks(side.images, parts, job.workers), [detector], device,
        total=len(side.images), description=Path(side.path).name,
        statistics=False, keep_features=features,
        keep_logits=[detector.name] if logits else [],
    )  # fmt: skip


def warn_unequal(result: Mapping[str, Any]) -> None:
    """Print a note if the numbers of images differ much: the values depend on both numbers."""
    if "num_real" in result and result["num_real"] > 2 * result["num_generated"]:
        print(
            f"Note: {result['num_real']} real images against {result['num_generated']} generated "
            "ones: precision and recall depend on both numbers, compare among equal ones only",
            file=sys.stderr,
        )
