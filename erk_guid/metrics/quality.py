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
from tqdm import tqdm

from erk_guid.common.datasets import ImageSource, holds_images, open_images
from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.common.files import sha256_of, user_path
from erk_guid.generation.devices import choose_device
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.metrics.collecting import Collected, blocks, collect
from erk_guid.metrics.detectors import Detector, check_detector_name, describe, load_detector
from erk_guid.metrics.jobs import (
    check_weights_are_used,
    names_of,
    read_blocks,
    tell_ignored,
    versions,
)
from erk_guid.metrics.neighbours import NEIGHBOURS, precision_recall
from erk_guid.metrics.references import SHIPPED, locate_reference, read_reference

METRICS = ("precision", "recall", "is")
REAL = "ILSVRC2012_img_val_resize_centercrop"
"""The folder of real images that the published program expects."""

SPLITS = 10
RNG_SEED = 2020
"""Of the inception score, both torch-fidelity's own."""

MANIFOLD_DETECTOR, SCORE_DETECTOR = "vgg16", "fid"
"""Whose features torch-fidelity takes for precision and recall, and for the inception score."""


def inception_score(
    logits: Any, splits: int = SPLITS, rng_seed: int = RNG_SEED
) -> tuple[float, float]:
    """Inception score (Salimans et al. 2016) by torch-fidelity: (mean, deviation over splits).

    Args:
        logits: a classifier's, [n, classes], array or tensor.
        splits: parts of the shuffled set that are scored on their own.
        rng_seed: of the shuffling.

    Raises:
        ValueError: fewer images than splits.
        MissingExtraError: torch-fidelity is not installed.
    """
    rows = logits.detach() if isinstance(logits, torch.Tensor) else torch.from_numpy(logits)
    if len(rows) < splits:
        raise ValueError(f"{splits} splits need at least as many images, got {len(rows)}")
    try:
        from torch_fidelity.metric_isc import isc_features_to_metric
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "metrics", "the inception score") from error
    found = isc_features_to_metric(rows, splits, True, rng_seed)
    return found["inception_score_mean"], found["inception_score_std"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What to compute. Field names are those of calculate_precision_recall_is.py."""

    generated: Path
    real: str = REAL
    metrics: Sequence[str] = METRICS
    detector: str | None = None
    k: int = NEIGHBOURS
    batch: int = 500
    workers: int = 2
    device: str | None = None
    detector_weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Set:
    """One side: images to be looked at, or features that a file holds."""

    path: str
    images: ImageSource | None = None
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What identifies the set, in JSON's types."""
        if self.images is None:
            return {"path": self.path, "sha256": sha256_of(locate_reference(self.path))}
        return {"path": self.path, "names": names_of(self.images, range(len(self.images)))}


def _count(side: _Set, detector: str) -> int:
    if side.images is not None:
        return len(side.images)
    return len(side.features.get(detector, ()))


def quality(job: Quality) -> dict[str, Any]:
    """Precision and recall of the generated images against the real ones, inception score.

    Returns:
        `precision`, `recall`, `inception_score_mean`, `inception_score_std` as far as asked
        for, and everything needed to repeat them.

    Raises:
        ErkGuidError: anything the user can put right.
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
            a, b = theirs.features[manifold], made[manifold].features[manifold]
            with tqdm(total=2 * (len(a) + len(b)), desc="neighbours", unit="row") as bar:
                found = precision_recall(
                    real=a, generated=b, k=job.k, device=_distance_device(device),
                    progress=bar.update,
                )  # fmt: skip
            result |= {
                name: value
                for name, value in zip(("precision", "recall"), found, strict=True)
                if name in job.metrics
            }
            result["k"] = job.k
            result["num_real"], result["real"] = len(a), real.record()
        if scores:
            mean, deviation = inception_score(made[classifier].logits[classifier])
            result["inception_score_mean"], result["inception_score_std"] = mean, deviation
            result["splits"], result["rng_seed"] = SPLITS, RNG_SEED
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
    """Images, or a file with features (an .npz that `ref` or `calc --features` wrote)."""
    path = user_path(source)
    features = shipped and source == SHIPPED and not path.exists()
    if path.suffix == ".npz" and path.is_file():
        features = not holds_images(path)
    if features:
        reference = read_reference(source)
        if detector not in reference.features:
            raise ErkGuidError(
                f"{source} holds no features of {detector}; it has "
                f"{', '.join(reference.features) or 'none'} (see --detector)"
            )
        return _Set(source, None, reference.features)
    if source == REAL and not path.exists():
        raise ErkGuidError(
            f"there is no folder {REAL} here; name the folder of real images with --real"
        )
    tell_ignored(path)
    return _Set(source, open_images(path))


def _check_counts(job: Quality, generated: _Set, real: _Set | None, manifold: str) -> None:
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


def _collect(
    job: Quality,
    side: _Set,
    detector: Detector,
    device: torch.device,
    *,
    features: bool,
    logits: bool,
) -> Collected:
    if side.images is None:
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
        statistics=False, keep_features=features, keep_logits=logits,
    )  # fmt: skip


def _distance_device(device: torch.device) -> torch.device:
    # On mps torch.cdist and kthvalue are not complete in all versions.
    return torch.device("cpu") if device.type == "mps" else device


def warn_unequal(result: Mapping[str, Any]) -> None:
    """Precision and recall depend on both numbers of images: say so if they differ much."""
    if "num_real" in result and result["num_real"] > 2 * result["num_generated"]:
        print(
            f"Note: {result['num_real']} real images against {result['num_generated']} generated "
            "ones: precision and recall depend on both numbers, compare among equal ones only",
            file=sys.stderr,
        )
