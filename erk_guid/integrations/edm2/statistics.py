"""EDM2's functions for feature statistics and metrics, built on `erk_guid.metrics`.

Statistics are a dict in EDM2's layout: ``{"num_images": int, metric: {"mu", "sigma"}, ...}`` with
NumPy arrays in float64. A metric is the name of a detector.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.common.datasets import open_images
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.devices import choose_device
from erk_guid.generation.peers import FAILED
from erk_guid.generation.process_groups import ProcessGroup, current_group
from erk_guid.metrics.detectors import load_detector, run_detector
from erk_guid.metrics.scores import frechet_distance
from erk_guid.metrics.scoring import choose
from erk_guid.metrics.statistics import Moments, Statistics, blocks, reporting_memory
from erk_guid.metrics.statistics.references import (
    COUNT_KEY,
    edm2_layout,
    read_reference,
    write_reference,
)
from erk_guid.models.checkpoints.trusted import EasyDict

METRICS = ("fid", "fd_dinov2")


def load_stats(path: str | Path, verbose: bool = True) -> dict[str, Any]:
    """Read statistics from a file or URL: EDM2's `.pkl`, EDM's or our `.npz`; runs no code in it.

    Raises:
        ErkGuidError: it cannot be fetched, or is damaged.
    """
    _say(verbose, f"Loading feature statistics from {path} ...")
    reference = read_reference(path)
    return edm2_layout({metric: reference.of(metric) for metric in reference.statistics})


def save_stats(stats: Mapping[str, Any], path: str | Path, verbose: bool = True) -> None:
    """Write statistics: `.pkl` in EDM2's layout, `.npz` in EDM's (2022) and ours.

    Raises:
        ErkGuidError: no statistics, another suffix, or a path that cannot be written.
    """
    _say(verbose, f"Saving feature statistics to {path} ...")
    count = stats.get(COUNT_KEY)
    for metric, one in stats.items():
        if metric != COUNT_KEY and not (isinstance(one, Mapping) and {"mu", "sigma"} <= set(one)):
            raise ErkGuidError(f"cannot save the statistics of {metric}: they lack mu or sigma")
    if not set(stats) - {COUNT_KEY}:
        raise ErkGuidError(f"cannot save {path}: there are no statistics")
    write_reference(
        Path(path),
        {
            metric: Statistics(np.asarray(one["mu"]), np.asarray(one["sigma"]), count)
            for metric, one in stats.items()
            if metric != COUNT_KEY
        },
    )


def calculate_metrics_from_stats(
    stats: str | Path | Mapping[str, Any],
    ref: str | Path | Mapping[str, Any],
    metrics: Sequence[str] = METRICS,
    verbose: bool = True,
) -> dict[str, float]:
    """Compute the Frechet distance of statistics and reference for each metric.

    A metric that one of the two lacks is left out, with a message on stderr.

    Raises:
        ErkGuidError: no metric is left, or a file cannot be read.
    """
    sides = [dict(s) if isinstance(s, Mapping) else load_stats(s, verbose) for s in (stats, ref)]
    found: dict[str, float] = {}
    for metric in _names(metrics):
        if any(metric not in side for side in sides):
            print(f"{metric} is left out: the statistics lack it", file=sys.stderr)
            continue
        (mu, sigma), (mu_ref, sigma_ref) = (
            (np.asarray(side[metric]["mu"]), np.asarray(side[metric]["sigma"])) for side in sides
        )
        found[metric] = frechet_distance(mu, sigma, mu_ref, sigma_ref)
        _say(verbose, f"{metric} = {found[metric]:g}")
    if not found:
        raise ErkGuidError(
            f"the statistics and the reference share none of {', '.join(_names(metrics))}"
        )
    return found


@dataclass(frozen=True)
class _StatisticsOf:
    """The iterable that `calculate_stats_for_iterable` returns."""

    images: Iterable[Any]
    metrics: Sequence[str]
    dest_path: str | Path | None
    device: torch.device
    verbose: bool
    rounds: int

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[EasyDict]:
        group = current_group()
        try:
            yield from self._items(group)
        except Exception:
            if group.store is not None:  # the others would wait for this process
                group.store.set(FAILED, str(group.rank))
            raise

    @torch.no_grad()
    def _items(self, group: ProcessGroup) -> Iterator[EasyDict]:
        detectors = [load_detector(name, self.device) for name in self.metrics]
        moments = {d.name: Moments(d.feature_dim, self.device) for d in detectors}
        quiet = not self.verbose or group.rank != 0
        with tqdm(total=self.rounds, unit="batch", disable=quiet) as bar:
            number = -1
            for number, item in enumerate(self.images):
                if number >= self.rounds:
                    break
                images = _images_of(item)
                if images is not None:
                    with reporting_memory(self.device, len(images)):
                        moved = torch.as_tensor(images).to(self.device)
                        for detector in detectors:
                            moments[detector.name].add(run_detector(detector, moved)[0])
                bar.update()
                stats = None
                if number == self.rounds - 1:
                    stats = edm2_layout({n: m.statistics(group) for n, m in moments.items()})
                    if self.dest_path is not None and group.rank == 0:
                        save_stats(stats, self.dest_path, self.verbose)
                yield EasyDict(
                    images=images, stats=stats, batch_idx=number, num_batches=self.rounds
                )
        if number + 1 != self.rounds:
            more = "more" if number >= self.rounds else str(number + 1)
            raise ValueError(f"image_iter has a len() of {self.rounds}, and yielded {more} batches")


def calculate_stats_for_iterable(
    image_iter: Any,
    metrics: Sequence[str] = METRICS,
    verbose: bool = True,
    dest_path: str | Path | None = None,
    device: torch.device | str | None = None,
) -> _StatisticsOf:
    """Compute statistics of batches of images, as they come.

    Args:
        image_iter: has ``len()`` and yields uint8 [N, C, H, W], or (images, ...) or items with
            `images`, such as those of `generate_images`; None for an empty share.
        metrics: names of detectors.
        verbose: show progress on stderr.
        dest_path: where to save the statistics; None saves nothing.
        device: the detectors' device; None takes the best present.

    Returns:
        An iterable with ``len()``; its items have `images`, `batch_idx`, `num_batches` and
        `stats`, which is None except in the last. With a process group (`torch.distributed`), the
        statistics are those of all processes together.

    Raises:
        TypeError: `image_iter` has no ``len()``.
        ValueError: it yields another number of batches than its ``len()`` says.
        ErkGuidError: several processes without a process group, or a detector that cannot be
            loaded.
    """
    if not hasattr(image_iter, "__len__"):
        raise TypeError(
            f"image_iter must have a len(), the number of its batches; {type(image_iter).__name__} "
            "has none (a list of the batches has)"
        )
    place = choose_device(str(device) if device is not None else None)
    return _StatisticsOf(image_iter, _names(metrics), dest_path, place, verbose, len(image_iter))


@dataclass(frozen=True)
class _Files:
    source: Any
    parts: list[Sequence[int]]
    rounds: int
    workers: int

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[Tensor | None]:
        for images in self.source.batches(self.parts, self.workers):
            yield torch.from_numpy(images)
        for _ in range(len(self.parts), self.rounds):
            yield None


def calculate_stats_for_files(
    image_path: str | Path,
    num_images: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
    max_batch_size: int = 64,
    num_workers: int = 2,
    prefetch_factor: int = 2,
    verbose: bool = True,
    dest_path: str | Path | None = None,
    device: torch.device | str | None = None,
) -> _StatisticsOf:
    """Compute statistics of a folder, a zip or an .npz, as `calculate_stats_for_iterable` does.

    Args:
        num_images: how many to take, the ones that EDM2 draws with `seed`; None takes all.
        max_batch_size: images at a time.
        num_workers: threads that read ahead.
        prefetch_factor: accepted for compatibility and ignored; two batches are read ahead.

    Raises:
        ErkGuidError: there are fewer images, or one cannot be used.
    """
    del prefetch_factor
    source = open_images(image_path)
    if num_images is None and len(source) < 2:
        raise ErkGuidError(f"{image_path} has {len(source)} images; statistics need at least 2")
    chosen = choose(source, len(source) if num_images is None else num_images, seed)
    group = current_group()
    parts = blocks(chosen, max_batch_size, group)
    rounds = -(-len(chosen) // (max_batch_size * group.world_size))
    _say(verbose and group.rank == 0, f"Reading {len(chosen)} images from {image_path} ...")
    files = _Files(source, parts, rounds, num_workers)
    return calculate_stats_for_iterable(files, metrics, verbose, dest_path, device)


def _names(metrics: str | Sequence[str]) -> tuple[str, ...]:
    return (metrics,) if isinstance(metrics, str) else tuple(metrics)


def _images_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item["images"]
    if isinstance(item, (tuple, list)):
        return item[0]
    return getattr(item, "images", item)


def _say(verbose: bool, text: str) -> None:
    if verbose:
        print(text, file=sys.stderr)
