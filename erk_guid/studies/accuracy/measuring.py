"""Runs of methods on a problem, and the table of their errors."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from erk_guid.studies.accuracy.methods import Method
from erk_guid.studies.accuracy.problems import Problem


class Error(NamedTuple):
    """The error of one method at one number of evaluations."""

    mean: float
    """Mean Euclidean distance of the end points."""
    standard_error: float
    """Standard error of that mean, over the points."""
    worst: float
    """The largest distance."""


@dataclass(frozen=True)
class Table:
    """Errors by method and evaluations.

    Attributes:
        problem: its name.
        evaluations: the columns.
        errors: by method's name, one for each column.
    """

    problem: str
    evaluations: tuple[int, ...]
    errors: dict[str, list[Error]]

    def markdown(self) -> str:
        """Return the mean errors as Markdown, the best of each column in bold."""
        finite = [
            [row[k].mean for row in self.errors.values() if math.isfinite(row[k].mean)]
            for k in range(self._width)
        ]
        best = [min(means, default=math.nan) for means in finite]
        lines = [
            f"| {self.problem}: evaluations | " + " | ".join(map(str, self.evaluations)) + " |",
            "|---|" + "---:|" * self._width,
        ]
        for name, row in self.errors.items():
            cells = [
                f"**{_short(e.mean)}**" if e.mean == best[k] else _short(e.mean)
                for k, e in enumerate(row)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV, one line for each entry."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["problem", "method", "evaluations", *Error._fields])
        for name, row in self.errors.items():
            for count, error in zip(self.evaluations, row, strict=True):
                writer.writerow([self.problem, name, count, *(f"{v:.6g}" for v in error)])
        return text.getvalue()

    @property
    def _width(self) -> int:
        return len(self.evaluations)


def _short(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"


def distances(found: Tensor, end: Tensor) -> Tensor:
    """Return the Euclidean distance per sample, [N], float64."""
    return (found.double() - end.double()).flatten(1).norm(dim=1).cpu()


def error_of(apart: Tensor) -> Error:
    """Return the mean of the distances [N], its standard error, and the largest distance."""
    count = len(apart)
    spread = float(apart.std()) / count**0.5 if count > 1 else float("nan")
    return Error(float(apart.mean()), spread, float(apart.max()))


def measure(
    problem: Problem,
    methods: Sequence[Method],
    evaluations: Sequence[int],
    progress: Callable[[Iterable[Method]], Iterable[Method]] = lambda methods: methods,
    note: Callable[[Table], None] = lambda table: None,
) -> Table:
    """Run every method with every number of evaluations.

    Args:
        problem: what to solve.
        methods: how, see `METHODS`.
        evaluations: calls of the denoiser a run may take; even numbers of at least 2, because
            some methods take two at a time.
        progress: wraps the methods, as tqdm does.
        note: called after each method with the table so far.

    Raises:
        ValueError: an odd number of evaluations, or one below 2.
    """
    for count in evaluations:
        if count < 2 or count % 2:
            raise ValueError(f"evaluations must be even and at least 2, got {count}")
    errors = {}
    for method in progress(methods):
        row = []
        for count in evaluations:
            chosen = method.at(count)
            if chosen is None:
                row.append(Error(math.nan, math.nan, math.nan))
                continue
            sigmas = chosen.sigmas(count, problem.sigma_min, problem.sigma_max)
            found = chosen.run(problem.denoiser, problem.start, sigmas)
            row.append(error_of(distances(found, problem.end)))
        errors[method.name] = row
        note(Table(problem.name, tuple(evaluations), dict(errors)))
    return Table(problem.name, tuple(evaluations), errors)
