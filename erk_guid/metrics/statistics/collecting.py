"""Running detectors over images: in fixed blocks, shared among processes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.metrics.detectors import Detector, run_detector
from erk_guid.metrics.statistics.moments import Moments, Statistics

Block = tuple[Sequence[int], Tensor]
"""Places in the whole set, and their images, uint8 [n, C, H, W]."""


_Kept = dict[str, list[tuple[np.ndarray, np.ndarray]]]
"""By detector: places and rows, block by block."""


def _row_block(indices: Sequence[int], rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(indices), rows.float().cpu().numpy()


def blocks(indices: Sequence[int], batch: int, group: ProcessGroup) -> list[Sequence[int]]:
    """Return this process's share of `indices`, in blocks of `batch`.

    The images of a block do not depend on the number of processes. So a detector's results for
    them do not depend on it either.
    """
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    return parts[group.rank :: group.world_size]


@dataclass(frozen=True)
class Collected:
    """The detectors' results for a set of images.

    Attributes:
        statistics: by metric.
        features: by metric, float32 [N, d] in the order of the set; on rank 0, if asked for.
        logits: likewise.
    """

    statistics: dict[str, Statistics]
    features: dict[str, np.ndarray] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)


def collect(
    source: Iterable[Block],
    detectors: Sequence[Detector],
    device: torch.device,
    *,
    group: ProcessGroup | None = None,
    total: int | None = None,
    description: str = "images",
    statistics: bool = True,
    keep_features: bool = False,
    keep_logits: Collection[str] = (),
) -> Collected:
    """Run all detectors on this process's blocks, and merge the results of all processes.

    Args:
        total: images of this process, for the progress bar that rank 0 shows.
        statistics: compute means and covariances.
        keep_features: also return every image's features.
        keep_logits: names of detectors; also return their logits for every image. They must be
            classifiers.

    Raises:
        ErkGuidError: a detector cannot use the images, or the device ran out of memory.
    """
    group = group or ProcessGroup()
    moments = {d.name: Moments(d.feature_dim, device) for d in detectors if statistics}
    kept: _Kept = {d.name: [] for d in detectors}
    logits: _Kept = {d.name: [] for d in detectors}
    if group.world_size > 1:
        description = f"{description}, rank 0 of {group.world_size}"
    with tqdm(total=total, desc=description, unit="image", disable=group.rank != 0) as bar:
        for indices, images in source:
            group.check()
            with torch.no_grad():
                with reporting_memory(device, len(images)):
                    moved = images.to(device)
                for detector in detectors:
                    with reporting_memory(device, len(images)):
                        features, classes = run_detector(
                            detector, moved, detector.name in keep_logits
                        )
                    if statistics:
                        moments[detector.name].add(features)
                    if keep_features:
                        kept[detector.name].append(_row_block(indices, features))
                    if classes is not None:
                        logits[detector.name].append(_row_block(indices, classes))
            bar.update(len(images))
    return Collected(
        {name: moment.statistics(group) for name, moment in moments.items()},
        _in_order(kept, group) if keep_features else {},
        _in_order(logits, group) if keep_logits else {},
    )


@contextlib.contextmanager
def reporting_memory(device: torch.device, batch: int) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one that says which option helps."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ErkGuidError(
            f"{device} ran out of memory with batches of {batch} images; choose a smaller --batch"
        ) from error


def _in_order(kept: _Kept, group: ProcessGroup) -> dict[str, np.ndarray]:
    """Return the rows of all processes, sorted by their places, on rank 0."""
    found = {}
    for name in list(kept):
        everyone = [part for rank in group.gather(kept.pop(name)) for part in rank]
        if not everyone:
            continue
        order = np.argsort(np.concatenate([places for places, _ in everyone]))
        target = np.empty_like(order)
        target[order] = np.arange(len(order))
        # Each block is freed once it is copied: two copies of all features would be too much.
        rows = np.empty([len(order), everyone[0][1].shape[1]], everyone[0][1].dtype)
        begin = 0
        everyone.reverse()
        while everyone:
            _, block = everyone.pop()
            rows[target[begin : begin + len(block)]] = block
            begin += len(block)
        found[name] = rows
    return found
