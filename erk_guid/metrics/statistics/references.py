"""Reference statistics of data sets: EDM2's `.pkl`, EDM's and our own `.npz`.

A `.pkl` is EDM2's: ``{"num_images": int, metric: {"mu": [d], "sigma": [d, d]}, ...}``. An `.npz`
keeps fid's `mu` and `sigma` at the top level, where EDM (2022) has and expects them. Other metrics
have ``metric/mu`` and ``metric/sigma``. Ours adds ``metric/count``, ``metric/features`` and
`about`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import (
    NPZ_START,
    check_writable,
    replacing,
    sha256_of,
    shipped_file,
    user_path,
)
from erk_guid.common.npz import npz_names, read_npz
from erk_guid.metrics.statistics.moments import Statistics
from erk_guid.models.checkpoints.download import download, how_to_refetch, is_url
from erk_guid.models.checkpoints.safe_pickle import UnsafePickleError, array_of, read_pickle

FOLDER = Path("dataset-refs")
EDM2_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/{}.pkl"
PUBLISHED = ("img512", "img64")
SHIPPED = "digits"
SUFFIXES = (".npz", ".pkl")

COUNT_KEY = "num_images"
"""The entry of EDM2's files that is not a metric: the number of images."""
TOP_LEVEL_METRIC = "fid"
"""The metric that `mu` and `sigma` without a name are for, as in EDM (2022)."""

MAX_DIM = 1 << 14
"""Largest number of features of a reference: a covariance of this size takes 2 GB."""


class ReferenceFileError(ErkGuidError):
    """Reference statistics that cannot be obtained or used."""


@dataclass(frozen=True)
class Reference:
    """The statistics in one file.

    Attributes:
        source: what was asked for.
        path: the local file.
        statistics: by metric.
        features: features of single images by metric, [n, d]; empty for most files.
        about: what the file says of its origin.
    """

    source: str
    path: Path
    statistics: dict[str, Statistics]
    features: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def of(self, metric: str) -> Statistics:
        """Return the statistics for `metric`.

        Raises:
            ErkGuidError: the file has none; the message says which it has.
        """
        if metric not in self.statistics:
            raise ReferenceFileError(
                f"{self.source} has no statistics for {metric}; it has "
                f"{', '.join(list(self.statistics)[:8]) or 'none'}. Make some with 'ref', or "
                "choose other --metrics"
            )
        found = self.statistics[metric]
        # Converted here, not when read: a small file may name one array many times.
        return replace(found, mu=found.mu.astype(np.float64), sigma=found.sigma.astype(np.float64))

    def record(self) -> dict[str, Any]:
        """Return what identifies the reference, in JSON's types."""
        return {"source": self.source, "sha256": sha256_of(self.path), "about": self.about}


def locate_reference(source: str, refresh: bool = False) -> Path:
    """Return the local file of a reference.

    Args:
        source: a path, a URL, 'digits' (shipped), 'img512' or 'img64'. The last two are EDM2's.
            They are taken from `dataset-refs/` if they are there, and else downloaded. A file of
            such a name is ./digits.
        refresh: download again what is downloaded.

    Raises:
        ErkGuidError: there is no such reference, or it cannot be downloaded.
    """
    place = _place(source)
    return download(place, refresh=refresh) if isinstance(place, str) else place


def _place(source: str) -> Path | str:
    """Return the local file of a reference, or the URL that it is downloaded from."""
    if is_url(source):
        return source
    if source == SHIPPED:
        return shipped_file("digits-refs.npz")
    if source in PUBLISHED:
        beside = FOLDER / f"{source}.pkl"
        return beside if beside.is_file() else EDM2_URL.format(source)
    path = user_path(source)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ReferenceFileError(f"{source[:60]}: {error.strerror}") from error
    known = ", ".join([SHIPPED, *PUBLISHED])
    raise ReferenceFileError(
        f"{source!r} is no reference: give a .npz or .pkl file, a URL, or one of {known}"
    )


def read_reference(source: str | Path) -> Reference:
    """Read reference statistics; see `locate_reference` for what `source` may be.

    A `.pkl` is read without running anything in it. `mu` and `sigma` at the top level of an
    `.npz` are fid's, as in EDM (2022).

    Raises:
        ErkGuidError: the file is damaged, unsafe, or not a reference.
    """
    source = str(source)
    path = locate_reference(source)
    try:
        with open(path, "rb") as file:
            packed = file.read(4) == b"PK\x03\x04"
        return _read_npz(source, path) if packed else _read_pkl(source, path)
    except (ErkGuidError, OSError, ValueError, MemoryError, RecursionError) as error:
        remedy = how_to_refetch(path) if isinstance(_place(source), str) else ""
        raise ReferenceFileError(f"{source}: {_reason(error)}{remedy}") from error


def _reason(error: Exception) -> str:
    """Return why a file cannot be used."""
    if isinstance(error, UnsafePickleError):
        return f"{error}. A reference is a dict of arrays, pickled with protocol 3 or 4"
    return str(error) if isinstance(error, ErkGuidError) else f"cannot read it: {printable(error)}"


def _read_pkl(source: str, path: Path) -> Reference:
    data = read_pickle(path)
    if not isinstance(data, dict):
        raise ReferenceFileError("it is no dict of metric names, so no reference statistics")
    count = data.pop(COUNT_KEY, None)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ReferenceFileError(f"its {COUNT_KEY} is {str(count)[:40]!r}, not a number of images")
    found = {}
    for metric, entry in data.items():
        arrays = {
            key: array_of(entry.get(key)) if isinstance(entry, dict) else None
            for key in ("mu", "sigma")
        }
        mu, sigma = arrays["mu"], arrays["sigma"]
        if not isinstance(metric, str) or mu is None or sigma is None:
            raise ReferenceFileError(f"its entry {str(metric)[:40]!r} has no arrays mu and sigma")
        found[metric] = _checked(metric, mu, sigma, count)
    if not found:
        raise ReferenceFileError("it has no metrics, so no reference statistics")
    return Reference(source, path, found)


def _read_npz(source: str, path: Path) -> Reference:
    def wanted(name: str) -> str | None:
        kinds = {"mu": "f", "sigma": "f", "features": "f", "count": "iu", "about": "U"}
        return kinds.get(name.rpartition("/")[2])

    arrays = read_npz(path, wanted)
    for what in ("mu", "sigma"):
        if what in arrays:
            arrays[f"{TOP_LEVEL_METRIC}/{what}"] = arrays.pop(what)
    statistics, features = {}, {}
    for key in sorted(arrays):
        metric, _, what = key.rpartition("/")
        if what == "mu" and metric:
            if f"{metric}/sigma" not in arrays:
                raise ReferenceFileError(f"its entry {metric!r} has no sigma")
            count = arrays.get(f"{metric}/count")
            statistics[metric] = _checked(
                metric, arrays[key], arrays[f"{metric}/sigma"],
                None if count is None else int(count.item()),
            )  # fmt: skip
        elif what == "features" and metric:
            if arrays[key].ndim != 2:
                raise ReferenceFileError(f"its {key} are {list(arrays[key].shape)}, not [n, d]")
            features[metric] = arrays[key]
    if not statistics and not features:
        raise ReferenceFileError("it has no arrays mu and sigma, so no reference statistics")
    about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    return Reference(source, path, statistics, features, about)


def _checked(
    metric: str, mu: np.ndarray, sigma: np.ndarray, count: int | None = None
) -> Statistics:
    d = mu.shape[0] if mu.ndim == 1 else 0
    if not 1 <= d <= MAX_DIM or sigma.shape != (d, d) or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
        raise ReferenceFileError(
            f"{metric[:40]}: mu must be [d] and sigma [d, d] floating-point numbers, got "
            f"{mu.dtype} {list(mu.shape)} and {sigma.dtype} {list(sigma.shape)}"
        )
    if count is not None and count < 0:
        raise ReferenceFileError(f"{metric[:40]}: its count is {count}, not a number of images")
    return Statistics(mu, sigma, count)


WRITTEN = ("mu", "sigma", "count", "features", "about")
"""Last parts of the names of arrays that `write_reference` writes."""


def check_destination(dest: Path) -> None:
    """Refuse a path that `write_reference` cannot write to, before the work is done.

    Raises:
        ErkGuidError: the suffix is not .npz or .pkl, the folder cannot be made, or there is a
            file that holds something else.
    """
    if dest.suffix not in SUFFIXES:
        raise ReferenceFileError(f"cannot write {dest}: end its name in {' or '.join(SUFFIXES)}")
    check_writable(dest, (*NPZ_START, b"\x80"))
    try:
        if not dest.is_file() or not dest.stat().st_size:
            return
        if dest.suffix == ".pkl":
            read_reference(dest)  # every pickle begins alike
        elif not all(name.rpartition("/")[2] in WRITTEN for name in npz_names(dest)):
            raise ReferenceFileError("it holds other arrays")
    except ErkGuidError as error:
        raise ReferenceFileError(
            f"{printable(dest, 200)} is there, and holds no statistics or features; write to "
            "another file, or delete it"
        ) from error


def edm2_layout(statistics: Mapping[str, Statistics]) -> dict[str, Any]:
    """Return statistics by metric as EDM2's programs keep them: plain dicts and NumPy arrays."""
    counts = {one.count for one in statistics.values() if one.count is not None}
    return {
        # All metrics use the same images. If that is not known, the entry is left out.
        **({COUNT_KEY: counts.pop()} if len(counts) == 1 else {}),
        **{metric: {"mu": one.mu, "sigma": one.sigma} for metric, one in statistics.items()},
    }


def write_reference(
    dest: Path,
    statistics: Mapping[str, Statistics],
    features: Mapping[str, np.ndarray] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write statistics by metric, in a layout that the published programs read too.

    A `.pkl` has EDM2's layout. EDM (2022) reads `mu` and `sigma` of an `.npz`, which are fid's.

    Args:
        features: features by metric, [n, d]; written to an `.npz` only.
        about: origin, in JSON's types; written to an `.npz` only.

    Raises:
        ErkGuidError: it cannot be written.
    """
    check_destination(dest)
    arrays: dict[str, np.ndarray] = {}
    for metric, one in statistics.items():
        prefix = "" if metric == TOP_LEVEL_METRIC else f"{metric}/"
        arrays[f"{prefix}mu"], arrays[f"{prefix}sigma"] = one.mu, one.sigma
        if one.count is not None:
            arrays[f"{metric}/count"] = np.array(one.count)
    for metric, rows in (features or {}).items():
        arrays[f"{metric}/features"] = rows
    arrays["about"] = np.array(json.dumps(dict(about or {})))
    try:
        with replacing(dest) as partial, open(partial, "wb") as file:
            if dest.suffix == ".pkl":
                pickle.dump(edm2_layout(statistics), file, protocol=4)
            else:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ReferenceFileError(f"cannot write {dest}: {error.strerror or error}") from error
