"""Scoring: images or a model against a reference, and making such references."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erk_guid._version import __version__
from erk_guid.common.datasets import ImageSource, open_images, refuse_overwriting
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import JSON_START, check_writable, write_bytes
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.devices import choose_device
from erk_guid.generation.images import generate
from erk_guid.generation.process_groups import ProcessGroup, process_group
from erk_guid.metrics.choice import Metric, metrics_of
from erk_guid.metrics.detectors import Detector, describe, load_detector
from erk_guid.metrics.scores import bootstrap_distances
from erk_guid.metrics.statistics import (
    Collected,
    Reference,
    blocks,
    collect,
    read_reference,
    reporting_memory,
    write_reference,
)
from erk_guid.metrics.statistics.collecting import Block
from erk_guid.metrics.statistics.references import check_destination, locate_reference


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Settings of scoring. Field names are those of calculate_metrics.py."""

    metrics: Sequence[str] = ("fid", "fd_dinov2")
    num: int = 50000
    seed: int = 0
    batch: int = 64
    workers: int = 2
    device: str | None = None
    detector_weights: Mapping[str, str] = field(default_factory=dict)
    json: Path | None = None
    features: Path | None = None
    bootstrap: int = 0
    refresh: bool = False

    @property
    def chosen(self) -> list[Metric]:
        """The metrics that `metrics` names.

        Raises:
            ErkGuidError: there is no such metric.
        """
        return metrics_of(self.metrics)

    @property
    def detectors(self) -> list[str]:
        """Names of the detectors that the metrics need, each once."""
        return list(dict.fromkeys(metric.detector for metric in self.chosen))

    @property
    def outputs(self) -> dict[str, Path | None]:
        """Files that are written, by option."""
        return {"--json": self.json, "--features": self.features}

    def collect(
        self,
        source: Iterable[Block],
        detectors: Sequence[Detector],
        device: torch.device,
        group: ProcessGroup,
        total: int,
    ) -> Collected:
        """Run the detectors on the images and return the results that the metrics need."""
        chosen = self.chosen
        keeps = self.features is not None or self.bootstrap > 0
        return collect(
            source, detectors, device, group=group, total=total,
            keep_features=keeps or any(metric.needs("features") for metric in chosen),
            keep_logits={metric.detector for metric in chosen if metric.needs("logits")},
        )  # fmt: skip

    def check(self) -> None:
        """Refuse settings that would fail only after hours of work.

        Raises:
            ErkGuidError: an unknown metric, weights for a metric that is not asked for, or a
                file that cannot be written.
        """
        check_weights_are_used(self.detector_weights, self.detectors)
        if self.bootstrap == 1:
            raise ErkGuidError("--bootstrap 1: a standard error needs at least 2 resamples")
        if self.features is not None:
            if self.features.suffix != ".npz":
                raise ErkGuidError(
                    f"cannot write features to {self.features}: end its name in .npz"
                )
            check_destination(self.features)
        if self.json is not None:
            check_writable(self.json, JSON_START)

    def check_scores(self) -> None:
        """Refuse fewer images than a score needs, and say which have no standard error.

        Raises:
            ErkGuidError: too few images.
        """
        for metric in self.chosen:
            metric.check_count(self.num, "generated")
            if self.bootstrap and metric.score_name != "frechet":
                print(
                    f"Note: --bootstrap gives no standard error for {metric.name}: it is for "
                    "Frechet distances",
                    file=sys.stderr,
                )

    def open_detectors(self, device: torch.device, group: ProcessGroup) -> list[Detector]:
        """Load the detectors, first on rank 0, which downloads the files for all ranks."""

        def load() -> list[Detector]:
            return [
                load_detector(name, device, self.detector_weights.get(name))
                for name in self.detectors
            ]

        first: list[Detector] = []
        group.agree(lambda: first.extend(load()))
        return first or load()


def calc(images: Path, ref: str, scoring: Scoring) -> dict[str, Any]:
    """Score a folder, zip or .npz of images. Under torchrun every rank calls this.

    Returns:
        What `--json` writes: scores, and everything needed to repeat them. On ranks other than
        0 an empty dict.

    Raises:
        ErkGuidError: any error that the user can correct.
    """
    device = choose_device(scoring.device)
    with process_group(device) as group:

        def look() -> Reference:
            refuse_overwriting(scoring.outputs, (images, ref, *scoring.detector_weights.values()))
            scoring.check()
            tell_ignored(images)
            choose(open_images(images), scoring.num, scoring.seed)
            scoring.check_scores()
            tell_replaced(scoring.outputs)
            if scoring.refresh:
                locate_reference(ref, refresh=True)
            return read_reference(ref)

        # Rank 0 checks first, so that each error is reported only once.
        reference = group.agree(look)
        source = open_images(images)
        chosen = choose(source, scoring.num, scoring.seed)
        detectors = scoring.open_detectors(device, group)
        _check_alike(group, scoring, detectors, images=_sample_of(source, chosen))
        group.agree(lambda: _check_reference(scoring, reference, detectors))
        parts = blocks(chosen, scoring.batch, group)
        images_read = read_blocks(source, parts, scoring.workers)
        total = sum(map(len, parts))
        collected = scoring.collect(images_read, detectors, device, group, total)
        about = {"path": str(images), "available": len(source), "names": names_of(source, chosen)}
        return _finish(scoring, collected, reference, detectors, device, group, about)


def gen(config: GenerationConfig, ref: str, scoring: Scoring) -> dict[str, Any]:
    """Generate and score the images of seeds `seed ... seed + num - 1`, and write no image.

    Returns and raises the same as `calc`.
    """
    device = config.choose_device()
    with process_group(device) as group:

        def look() -> Reference:
            networks = (config.net, config.gnet or "")
            refuse_overwriting(
                scoring.outputs, (*networks, ref, *scoring.detector_weights.values())
            )
            scoring.check()
            _check_count(scoring.num, "--num")
            scoring.check_scores()
            tell_replaced(scoring.outputs)
            if scoring.refresh:
                locate_reference(ref, refresh=True)
            return read_reference(ref)

        reference = group.agree(look)
        models = config.open(device, group, refresh=scoring.refresh)
        detectors = scoring.open_detectors(device, group)
        if group.world_size > 1:
            recipe = {k: v for k, v in models.record().items() if k != "device"}
            _check_alike(group, scoring, detectors, **{**recipe, "batch": config.batch})
        group.agree(lambda: _check_reference(scoring, reference, detectors))
        parts = blocks(range(scoring.num), config.batch, group)

        def source() -> Iterator[Block]:
            # One call for each block, so that blocks do not depend on the number of processes.
            for part in parts:
                seeds = [scoring.seed + i for i in part]
                batches = generate(
                    models.loaded.net, seeds, batch_size=len(seeds), **models.generation_options
                )
                with reporting_memory(device, len(seeds)):
                    images = torch.cat([batch.images for batch in batches])
                yield part, images

        collected = scoring.collect(source(), detectors, device, group, sum(map(len, parts)))
        about = {"recipe": {"net": config.net, "gnet": config.gnet, **models.record()}}
        return _finish(scoring, collected, reference, detectors, device, group, about)


def make_reference(
    data: Path,
    dest: Path,
    scoring: Scoring,
    *,
    first: int = 0,
    last: int | None = None,
    keep: int = 0,
) -> dict[str, int]:
    """Write statistics of a data set to a file that `calc` and `gen` read.

    Args:
        data: folder, zip or .npz.
        dest: `.npz` (ours) or `.pkl` (what EDM2's programs read).
        scoring: its `num` and `seed` are not used.
        first, last: use only images ``first ... last - 1``, in the order of their names.
        keep: how many images' features to keep, for precision and recall: as float16, or as
            they are where that would round them by more than `COARSE` of how far they scatter.

    Returns:
        Number of images by metric. On ranks other than 0 an empty dict.

    Raises:
        ErkGuidError: any error that the user can correct.
    """
    device = choose_device(scoring.device)
    with process_group(device) as group:

        def look() -> None:
            scoring.check()
            refuse_overwriting({"--dest": dest}, (data,))
            check_destination(dest)
            for metric in scoring.chosen:
                if "features" in metric.score.needs_of_reference and not keep:
                    raise ErkGuidError(
                        f"{metric.name} needs every image's features: give --keep-features"
                    )
            if keep and dest.suffix != ".npz":
                raise ErkGuidError(f"--keep-features needs a .npz, not {dest}")
            tell_ignored(data)
            total = len(open_images(data))
            count = len(range(total)[first:last])
            _check_count(count, f"{data}, from image {first} on,")
            if last is not None and last > total:
                raise ErkGuidError(f"--last {last}: there are {total} images")
            tell_replaced({"--dest": dest})

        group.agree(look)
        source = open_images(data)
        indices = range(len(source))[first:last]
        detectors = scoring.open_detectors(device, group)
        _check_alike(group, scoring, detectors, images=_sample_of(source, indices), keep=keep)
        parts = blocks(indices, scoring.batch, group)
        collected = collect(
            read_blocks(source, parts, scoring.workers), detectors, device,
            group=group, total=sum(map(len, parts)), keep_features=keep > 0,
        )  # fmt: skip
        if group.rank != 0:
            return {}
        rng = np.random.default_rng(scoring.seed)
        features = {
            name: _short(rows[np.sort(rng.permutation(len(rows))[:keep])])
            for name, rows in collected.features.items()
        }
        about = {
            "data": source.path.name,
            "images": len(indices),
            "detectors": [describe(d) for d in detectors],
            "versions": versions(),
        }
        write_reference(dest, collected.statistics, features, about)
        return {name: s.count or 0 for name, s in collected.statistics.items()}


def check_weights_are_used(weights: Mapping[str, str], detectors: Sequence[str]) -> None:
    """Refuse weights that nothing would use.

    Raises:
        ErkGuidError: weights for a detector that is not asked for.
    """
    for name in weights:
        if name not in detectors:
            raise ErkGuidError(
                f"--detector-weights {name}=...: {name} is not among {', '.join(detectors)}"
            )


def choose(source: ImageSource, num: int, seed: int) -> list[int]:
    """Return the indices of `num` images to score; of more images, EDM2's choice by `seed`.

    Raises:
        ErkGuidError: there are fewer than `num`, or fewer than 2.
    """
    _check_count(num, "--num")
    if len(source) < 2:
        raise ErkGuidError(f"{source.path} has 1 image; scores need at least 2")
    if len(source) < num:
        raise ErkGuidError(
            f"{source.path} has {len(source)} images, --num asks for {num}; generate the rest, or "
            f"give --num {len(source)} (a distance of fewer images is larger, and comparable only "
            "among equal numbers)"
        )
    return subset(len(source), num, seed)


def subset(total: int, num: int, seed: int) -> list[int]:
    """Return `num` numbers below `total`, drawn by `seed` as EDM2 does, in rising order."""
    if num >= total:
        return list(range(total))
    order = np.arange(total, dtype=np.int64)
    np.random.RandomState(seed % (1 << 31)).shuffle(order)
    return np.sort(order[:num]).tolist()


def _check_count(count: int, what: str) -> None:
    if count < 2:
        raise ErkGuidError(f"{what} has {count} images; statistics need at least 2")


def tell_ignored(path: Path) -> None:
    """Print which files were passed over; called on rank 0 only, so that it is said once."""
    source = open_images(path)
    if source.ignored:
        more = f" and {len(source.ignored) - 1} more" if len(source.ignored) > 1 else ""
        note = f"Note: {source.path}: passed over {source.ignored[0]}{more}, not an image"
        print(printable(note), file=sys.stderr)


def tell_replaced(outputs: Mapping[str, Path | None]) -> None:
    """Print which outputs are there already, and from when; called on rank 0 only."""
    for option, path in outputs.items():
        if path is not None and path.is_file() and (found := path.stat()).st_size:
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.st_mtime))
            note = f"Note: {option} will replace {path}, written {written}"
            print(printable(note), file=sys.stderr)


def read_blocks(
    source: ImageSource, parts: Sequence[Sequence[int]], workers: int
) -> Iterator[Block]:
    for part, images in zip(parts, source.batches(parts, workers), strict=True):
        yield part, torch.from_numpy(images)


COARSE = 1 / 256
"""Largest rounding error of kept features, as a share of their scatter."""


def _short(rows: np.ndarray) -> np.ndarray:
    """Return features as float16 if that keeps what tells them apart."""
    with np.errstate(over="ignore"):
        short = rows.astype(np.float16)
    apart = np.linalg.norm(rows - rows.mean(axis=0, dtype=np.float64))
    if np.isfinite(short).all() and np.linalg.norm(short - rows) <= COARSE * apart:
        return short
    return rows.astype(np.float32)


def _check_reference(scoring: Scoring, reference: Reference, detectors: Sequence[Detector]) -> None:
    by_name = {detector.name: detector for detector in detectors}
    for metric in scoring.chosen:
        metric.check(reference, by_name[metric.detector])


def names_of(source: ImageSource, chosen: Sequence[int]) -> dict[str, str]:
    """Return which images were taken: first and last name, and a digest of all names."""
    names = [source.names[i] for i in chosen]
    # Names that are not UTF-8 have halves of characters in them.
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()
    return {"first": names[0], "last": names[-1], "sha256": digest}


def _sample_of(source: ImageSource, chosen: Sequence[int]) -> dict[str, str]:
    """Return the names of images, and a digest of the first and last one's pixels.

    Folders of two nodes may have one name, and the same names in them.
    """
    pixels = hashlib.sha256()
    for images in source.batches([[chosen[0]], [chosen[-1]]]):
        pixels.update(images.tobytes())
    return {**names_of(source, chosen), "pixels": pixels.hexdigest()}


def _check_alike(
    group: ProcessGroup, scoring: Scoring, detectors: Sequence[Detector], **more: Any
) -> None:
    """Refuse to score with a process that was given other options, images or detectors."""
    given = {
        "metrics": list(scoring.metrics), "num": scoring.num, "seed": scoring.seed,
        "batch": scoring.batch, "features": scoring.features is not None,
        "bootstrap": scoring.bootstrap, "detectors": [describe(d) for d in detectors],
    }  # fmt: skip
    if group.world_size > 1:
        group.check_alike({**given, **more})


def _finish(
    scoring: Scoring,
    collected: Collected,
    reference: Reference,
    detectors: Sequence[Detector],
    device: torch.device,
    group: ProcessGroup,
    images: dict[str, Any],
) -> dict[str, Any]:
    """Compute the scores on rank 0, and write them."""
    if group.rank != 0:
        return {}
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    chosen = scoring.chosen
    for metric in chosen:
        try:
            scores |= metric.compute(collected, reference, device)
        except ValueError as error:
            raise ErkGuidError(f"{reference.source}, {metric.name}: {error}") from error
        if scoring.bootstrap and metric.score_name == "frechet":
            rows, wanted = collected.features[metric.detector], reference.of(metric.detector)
            scattered = bootstrap_distances([rows], wanted, scoring.bootstrap, scoring.seed)
            errors[metric.name] = float(scattered[:, 0].std(ddof=1))
    result = {
        "scores": scores,
        **({"standard_errors": errors, "resamples": scoring.bootstrap} if errors else {}),
        "num": scoring.num,
        "seed": scoring.seed,
        "images": images,
        "reference": reference.record(),
        "detectors": [describe(d) for d in detectors],
        "metrics": {metric.name: metric.record() for metric in chosen},
        "batch": scoring.batch,
        "device": str(device),
        "processes": group.world_size,
        "versions": versions(),
    }
    if scoring.features is not None:
        write_reference(
            scoring.features, collected.statistics, collected.features,
            {"images": images, "detectors": result["detectors"], "versions": result["versions"]},
        )  # fmt: skip
    if scoring.json is not None:
        write_json(scoring.json, result)
    return result


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, whole or not at all.

    JSON has no infinity: settings such as ``S_max`` without a limit, and what a reference says of
    itself, become the text "Infinity".

    Raises:
        ErkGuidError: it cannot be written.
    """
    try:
        strict = json.loads(json.dumps(result), parse_constant=str)
        write_bytes(path, (json.dumps(strict, indent=1, allow_nan=False) + "\n").encode())
    except RecursionError as error:
        raise ErkGuidError(f"cannot write {path}: lists nested too deeply in it") from error
    except OSError as error:
        raise ErkGuidError(f"cannot write {path}: {error.strerror or error}") from error


def versions() -> dict[str, str]:
    """Return the versions of everything that scores depend on."""
    found = {"erk_guid": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "Pillow", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
