"""Per-step diagnostics of a run: what guidance measured and did, for each image and step.

While a job runs, every rank appends its rows to a part file in the folder of the images, before
the images are written, and the trace is written from these. So a job that is killed has lost no
row of an image that is there, and what happens to the trace itself never matters.
"""

from __future__ import annotations

import contextlib
import csv
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, reason_of
from erk_guid.common.files import NPZ_START, replacing, write_bytes
from erk_guid.common.npz import npz_names, read_npz
from erk_guid.sampling import StepInfo

COLUMNS = (
    "seed",
    "step",
    "sigma",
    "sigma_next",
    "stiffness",
    "h_stiffness",
    "gate",
    "step_size",
    "correction_size",
    "relative_correction",
)
"""`stiffness` is rho (unit 1/sigma), `h_stiffness` is rho times the step's length, `gate` is 1
where the correction acts. Sizes are Euclidean norms. Empty (NaN) at steps with no embedded pair;
`gate` also in the parameter-free form, which has none."""

KEYS = COLUMNS[:2]
"""Columns that hold whole numbers."""
ROW = np.dtype([(name, "<i8" if name in KEYS else "<f8") for name in COLUMNS])
"""A row of a trace: seeds beyond 2^53 are no floating-point numbers."""
NO_ROWS = np.empty(0, ROW)

PART_ROW = np.dtype([*ROW.descr, ("check", "<u4")])
"""A row of a part file: with a checksum of it, and of which run's it is."""
PART = ".trace.{rank}.part"
"""Name of a rank's part file: rows (`PART_ROW`) as they are in memory, one after the other."""

MOST_STEPS = 10_000
"""Largest number of steps of a trace that is read."""

SUFFIXES = (".csv", ".npz")
BEGINS = (",".join(COLUMNS).encode(), *NPZ_START)
"""How traces begin."""


class Trace:
    """Collector of `StepInfo`: give `callback` to a sampler, call `end_batch` after each batch.

    Args:
        append: takes the rows of each batch.
    """

    def __init__(self, append: Callable[[np.ndarray], None]) -> None:
        self._append = append
        self._open: list[list[Tensor | float]] = []

    def callback(self, info: StepInfo) -> None:
        """Record one step on the device, without waiting for it."""
        moved = torch.linalg.vector_norm((info.x - info.x_before).flatten(1).float(), dim=1)
        nothing = torch.full_like(moved, torch.nan)
        rho = nothing if info.stiffness is None else info.stiffness
        gate = nothing if info.gate is None else info.gate
        size = nothing if info.correction_size is None else info.correction_size
        h = info.sigma_hat - info.sigma_next
        self._open.append(
            [
                float(info.step), info.sigma, info.sigma_next, rho, rho * h, gate, moved, size,
                size / moved,
            ]
        )  # fmt: skip

    def end_batch(self, seeds: Sequence[int]) -> None:
        """Append the steps recorded since the last call, as rows of these seeds."""
        parts = [NO_ROWS]
        for values in self._open:
            rows = np.empty(len(seeds), ROW)
            rows["seed"] = seeds
            for name, value in zip(COLUMNS[1:], values, strict=True):
                rows[name] = value.cpu().double().numpy() if isinstance(value, Tensor) else value
            parts.append(rows)
        self._open = []
        self._append(np.concatenate(parts))


def part_files(folder: Path) -> list[Path]:
    """Return the part files in a folder."""
    return sorted(folder.glob(PART.format(rank="*")))


@contextlib.contextmanager
def recorded(folder: Path, rank: int, run: str) -> Iterator[Trace]:
    """Give a trace that appends its rows to the part file of a rank, for the run of that name.

    Raises:
        ErkGuidError: it cannot be written.
    """
    path = folder / PART.format(rank=rank)

    def append(rows: np.ndarray) -> None:
        try:
            data = memoryview(with_checks(rows, run).tobytes())
            while data:
                data = data[os.write(file, data) :]
        except OSError as error:
            raise ErkGuidError(f"cannot write the trace's {path}: {error.strerror}") from error

    try:
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    except OSError as error:
        raise ErkGuidError(f"cannot write the trace's {path}: {error.strerror}") from error
    try:
        yield Trace(append)
    finally:
        os.close(file)


def with_checks(rows: np.ndarray, run: str) -> np.ndarray:
    """Return rows (`ROW`) as `PART_ROW`, for the run of that name."""
    rows = rows.astype(ROW)
    data, size, start = memoryview(rows.tobytes()), ROW.itemsize, zlib.crc32(run.encode())
    parts = np.empty(len(rows), PART_ROW)
    for name in COLUMNS:
        parts[name] = rows[name]
    parts["check"] = [zlib.crc32(data[k : k + size], start) for k in range(0, len(data), size)]
    return parts


def read_parts(folder: Path, run: str) -> np.ndarray:
    """Read the rows of all part files.

    Half a row at the end, from a kill, is left out, and so are rows that were changed, rows of
    another run, and blocks of zeros, which some file systems leave after a crash.

    Raises:
        ErkGuidError: one cannot be read, or is something else.
    """
    parts = [NO_ROWS]
    for path in part_files(folder):
        try:
            if not path.is_file():
                raise ValueError("it is no file")  # a pipe would be waited for
            data = path.read_bytes()
            whole = len(data) - len(data) % PART_ROW.itemsize
            found = np.frombuffer(data[:whole], PART_ROW)
            rows = found[list(COLUMNS)].astype(ROW)
            parts.append(_checked(rows[found["check"] == with_checks(rows, run)["check"]]))
        except (OSError, ValueError) as error:
            raise ErkGuidError(
                f"cannot read {path}, which holds rows of a trace: {error}; delete it to go on "
                "without them"
            ) from error
    return np.concatenate(parts)


def restart_parts(folder: Path, run: str, without: Collection[int]) -> None:
    """Put the rows of all part files of a run into one, without those of some seeds.

    Raises:
        ErkGuidError: a part file cannot be read or written.
    """
    before = part_files(folder)
    if not before:
        return
    rows = rows_without(read_parts(folder, run), without)
    first = folder / PART.format(rank=0)
    try:
        # The new file first: after a kill between the two, rows are there twice and not missing.
        write_bytes(first, with_checks(rows, run).tobytes())
        for path in before:
            if path != first:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ErkGuidError(f"cannot write the trace's {first}: {error.strerror}") from error


def rows_without(rows: np.ndarray, seeds: Collection[int]) -> np.ndarray:
    """Return the rows of other seeds."""
    return rows[~np.isin(rows["seed"], np.asarray(list(seeds), np.int64))]


def complete(rows: np.ndarray, seeds: Collection[int]) -> np.ndarray:
    """Return the rows of these seeds that have a row of every step, ordered as by `united`.

    A row at other noise levels than its step's in most rows is damaged, and counts as missing.
    """
    rows = united(rows[np.isin(rows["seed"], np.asarray(list(seeds), np.int64))])
    if not len(rows):
        return rows
    levels = rows[["step", "sigma", "sigma_next"]]
    kinds, which, counts = np.unique(levels, return_inverse=True, return_counts=True)
    usual: dict[int, int] = {}  # the most frequent levels of each step
    for k in np.argsort(counts, kind="stable"):
        usual[int(kinds["step"][k])] = int(k)
    rows = rows[np.isin(which, list(usual.values()))]
    found, steps = np.unique(rows["seed"], return_counts=True)
    return rows[np.isin(rows["seed"], found[steps == len(usual)])]


def _differ(old: np.ndarray, new: np.ndarray) -> bool:
    """Return whether two traces have a row of one seed and step that is not of one run.

    Runs of one setting round otherwise in other batches, and `.csv` holds seven digits.
    """
    old, new = united(old), united(new)
    kind, names = np.dtype([(name, ROW[name]) for name in KEYS]), list(KEYS)
    keys = (old[names].astype(kind), new[names].astype(kind))
    _, a, b = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    if not len(a):
        return False
    old, new = old[a], new[b]
    return not all(
        np.allclose(old[name], new[name], rtol=rtol, atol=0, equal_nan=True)
        for name, rtol in (("sigma", 1e-5), ("sigma_next", 1e-5), ("step_size", 0.02))
    )


def united(rows: np.ndarray) -> np.ndarray:
    """Order rows by seed and step, and keep the last of several for one seed and step."""
    order = np.lexsort((np.arange(len(rows)), rows["step"], rows["seed"]))
    rows = rows[order]
    keys = rows[list(KEYS)]
    last = np.ones(len(rows), bool)
    last[:-1] = keys[1:] != keys[:-1]
    return rows[last]


def check_trace_path(path: Path) -> None:
    """Raise ErkGuidError unless `path` ends in a known suffix, and is no archive of others."""
    if path.suffix not in SUFFIXES:
        raise ErkGuidError(f"cannot write a trace to {path}: end its name in .csv or .npz")
    if path.suffix == ".npz" and path.is_file() and path.stat().st_size:
        try:
            known = set(COLUMNS) <= set(npz_names(path))  # every archive begins alike
        except ErkGuidError:
            known = False
        if not known:
            raise ErkGuidError(
                f"{path} is there, and is no trace; write to another file, or delete it"
            )


def read_trace(path: Path) -> np.ndarray:
    """Read the rows of a trace that `write_trace` wrote.

    Raises:
        ErkGuidError: the file cannot be read, or is something else.
    """
    try:
        if path.suffix == ".npz":
            columns = read_npz(path, lambda name: "fiu" if name in COLUMNS else None)
            return _checked(_rows_of(columns))
        with open(path, newline="") as file:
            lines = [
                (int(row["seed"]), int(row["step"]), *(float(row[c] or "nan") for c in COLUMNS[2:]))
                for row in csv.DictReader(file)
            ]
        return _checked(np.array(lines, dtype=ROW))
    except KeyError as error:
        raise ErkGuidError(f"cannot read the trace {path}: it has no {error}") from error
    except (OSError, OverflowError, TypeError, ValueError, csv.Error) as error:
        raise ErkGuidError(f"cannot read the trace {path}: {reason_of(error)}") from error


def _rows_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Return columns as rows; whole numbers may be stored as real ones, as they once were."""
    shape = columns["seed"].shape
    if len(shape) != 1 or any(columns[name].shape != shape for name in COLUMNS):
        raise ValueError("its columns are not of one length")
    rows = np.empty(shape, ROW)
    for name in COLUMNS:
        values = columns[name]
        with np.errstate(invalid="ignore"):  # NaN is no whole number, which is seen next
            rows[name] = values
        if name in KEYS and not np.array_equal(rows[name], values):
            raise ValueError(f"its column {name} does not hold whole numbers")
    return rows


def _checked(rows: np.ndarray) -> np.ndarray:
    if not (np.isfinite(rows["sigma"]).all() and np.isfinite(rows["sigma_next"]).all()):
        raise ValueError("every row has a seed, a step and its noise levels")
    if not all((rows[name] >= 0).all() for name in KEYS):
        raise ValueError("a seed or step is below 0")
    if len(np.unique(rows["step"])) > MOST_STEPS:
        raise ValueError(f"more than {MOST_STEPS} steps")
    return rows


def refuse_other_rows(
    trace: Path, old: np.ndarray, rows: np.ndarray, recorded: Collection[int]
) -> None:
    """Refuse to replace the trace of another run.

    Args:
        trace: the file.
        old: its rows.
        rows: those of this run.
        recorded: the seeds of this run.

    Raises:
        ErkGuidError: the file has rows of other seeds, or other rows of these.
    """
    others = np.setdiff1d(old["seed"], np.fromiter(recorded, np.int64, len(recorded)))
    if len(others) or _differ(old, rows):
        which = f"rows of seed {others[0]}" if len(others) else "other rows of the same seeds"
        raise ErkGuidError(
            f"{trace} is the trace of another run: it has {which}; give --trace another name, or "
            "delete it"
        )


def refuse_replaced(trace: Path, rows: np.ndarray, recorded: Collection[int]) -> None:
    """Refuse to replace the trace that another job has written since this one began.

    Raises:
        ErkGuidError: see `refuse_other_rows`.
    """
    try:
        old = read_trace(trace)
    except ErkGuidError:
        return
    try:
        refuse_other_rows(trace, old, rows, recorded)
    except ErkGuidError as error:
        raise ErkGuidError(
            f"{error}. The images are there, and the rows too: --resume with another --trace "
            "writes them"
        ) from error


def write_trace(path: Path, rows: np.ndarray) -> None:
    """Write rows (`ROW`) as .csv, or as .npz with an array per column; see `united`."""
    rows = united(rows)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            columns: dict[str, Any] = {name: rows[name] for name in COLUMNS}
            np.savez_compressed(partial, **columns)
        else:
            with open(partial, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for seed, step, *values in rows.tolist():
                    writer.writerow([seed, step, *("" if v != v else f"{v:.7g}" for v in values)])
