"""Per-step diagnostics of a run: what guidance measured and did, for each image and step."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import replacing
from erk_guid.common.npz import read_npz
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

NO_ROWS = np.empty((0, len(COLUMNS)))

MOST_STEPS = 10_000
"""Largest number of steps of a trace that is read."""

SUFFIXES = (".csv", ".npz")


class Trace:
    """Collector of `StepInfo`: give `callback` to a sampler, call `end_batch` after each batch."""

    def __init__(self) -> None:
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

    def end_batch(self, seeds: Sequence[int]) -> np.ndarray:
        """Return the steps recorded since the last call, as rows of these seeds.

        Returns:
            float64 [steps x seeds, len(COLUMNS)].
        """
        names = np.asarray(seeds, dtype=np.float64)
        rows = [NO_ROWS]
        for values in self._open:
            columns = [
                v.cpu().double().numpy() if isinstance(v, Tensor) else np.full(len(names), v)
                for v in values
            ]
            rows.append(np.stack([names, *columns], axis=1))
        self._open = []
        return np.concatenate(rows)


def check_trace_path(path: Path) -> None:
    """Raise ErkGuidError unless `path` ends in a known suffix."""
    if path.suffix not in SUFFIXES:
        raise ErkGuidError(f"cannot write a trace to {path}: end its name in .csv or .npz")


def read_trace(path: Path) -> np.ndarray:
    """Read the rows of a trace that `write_trace` wrote.

    Raises:
        ErkGuidError: the file cannot be read, or is something else.
    """
    try:
        if path.suffix == ".npz":
            columns = read_npz(path, lambda name: "f" if name in COLUMNS else None)
            return _checked(np.stack([columns[name] for name in COLUMNS], axis=1))
        with open(path, newline="") as file:
            rows = [[float(row[name] or "nan") for name in COLUMNS] for row in csv.DictReader(file)]
        return _checked(np.asarray(rows, dtype=np.float64).reshape(-1, len(COLUMNS)))
    except KeyError as error:
        raise ErkGuidError(f"cannot read the trace {path}: it has no {error}") from error
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise ErkGuidError(f"cannot read the trace {path}: {error}") from error


def _checked(rows: np.ndarray) -> np.ndarray:
    known = rows[:, : COLUMNS.index("stiffness")] if rows.ndim == 2 else rows
    if rows.ndim != 2 or not np.isfinite(known).all():
        raise ValueError("every row has a seed, a step and its noise levels")
    if len(np.unique(rows[:, 1])) > MOST_STEPS:
        raise ValueError(f"more than {MOST_STEPS} steps")
    return rows


def write_trace(path: Path, rows: np.ndarray) -> None:
    """Write rows, ordered by seed and step, as .csv or as .npz with an array per column."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    with replacing(path) as partial:
        if path.suffix == ".npz":
            np.savez_compressed(partial, **dict(zip(COLUMNS, rows.T, strict=True)))
        else:
            with open(partial, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for row in rows:
                    writer.writerow(
                        [
                            int(row[0]),
                            int(row[1]),
                            *("" if np.isnan(v) else f"{v:.7g}" for v in row[2:]),
                        ]
                    )
