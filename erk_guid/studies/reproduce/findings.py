"""What the results of a reproduction say: paper against measured, guided against plain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from erk_guid.common.errors import ErkGuidError
from erk_guid.metrics.scores import bootstrap_distances
from erk_guid.metrics.scores.neighbours import NEIGHBOURS, precision_recall
from erk_guid.metrics.statistics.references import Reference, read_reference
from erk_guid.studies.reproduce.planning import RESAMPLES, Plan, Reproduction, plan, settled
from erk_guid.studies.reproduce.runner import is_quality_of, result_of
from erk_guid.studies.reproduce.tables import TABLES, Row

METRIC_NAMES = {"fid": "FID", "fd_dinov2": "FD-DINOv2", "fd_digits": "FD-digits"}
CLEAR = 2.0
"""A difference counts as clear if it exceeds this many standard errors."""

EMPTY = "–"
MANY = 1e7
"""Numbers from here on are written with a power of ten."""


@dataclass(frozen=True)
class Change:
    """Guided minus unguided, with the standard error of the difference where it is known."""

    value: float
    relative: float
    error: float | None = None

    @property
    def verdict(self) -> str:
        """'better', 'worse', or '' where it is not clear."""
        if self.error is None or abs(self.value) <= CLEAR * self.error:
            return ""
        return "better" if self.value < 0 else "worse"

    def __str__(self) -> str:
        scatter = "" if self.error is None else f" ± {number(self.error, sign=False)}"
        percent = "∞ %" if math.isinf(self.relative) else f"{100 * self.relative:+.0f} %"
        percent = percent.replace("-", "−")
        return f"{number(self.value, sign=True)}{scatter} ({percent})"


@dataclass
class Findings:
    """Results of one job's tables, read once."""

    job: Reproduction
    results: Sequence[Mapping[str, Any]]
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        tables = dict.fromkeys(row.table for row in self.job.rows)
        own = [row for row in self.job.rows if row.settings is not None]
        self.rows = [settled(self.job, row) for t in tables for row in TABLES.get(t, own)]

    @cached_property
    def plans(self) -> dict[str, Plan]:
        """Plan by row id, for rows that this job can run."""
        found = {}
        for row in self.rows:
            try:
                found[row.id] = plan(self.job, row)
            except ErkGuidError:
                continue
        return found

    @cached_property
    def by_row(self) -> dict[str, Any]:
        """Result by row id, for rows that were run with this job's settings."""
        found = {
            name: result_of(self.job, self.results, p)
            or result_of(self.job, self.results, p, complete=False)
            for name, p in self.plans.items()
        }
        return {name: result for name, result in found.items() if result}

    @cached_property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(m for r in self.by_row.values() for m in r["scores"]))

    @property
    def tables(self) -> list[str]:
        return list(dict.fromkeys(row.table for row in self.rows))

    @property
    def model(self) -> str:
        """The model that the rows were made with, in a word or two."""
        if self.job.model is not None:
            return self.job.model
        return ", ".join(dict.fromkeys(row.model for row in self.rows))

    @property
    def comparable(self) -> bool:
        """Whether the paper has numbers of the same models, scored in the same way."""
        numbers = any(row.paper for row in self.rows)
        return numbers and bool(self.plans) and all(p.papers for p in self.plans.values())

    def baseline(self, row: Row) -> Row | None:
        return next((r for r in self.rows if r.group == row.group and not r.guided), None)

    def score(self, row: Row, metric: str) -> float | None:
        value = self.by_row.get(row.id, {}).get("scores", {}).get(metric)
        return None if value is None else float(value)

    def error(self, row: Row, metric: str) -> float | None:
        value = self.by_row.get(row.id, {}).get("standard_errors", {}).get(metric)
        return None if value is None else float(value)

    def change(self, row: Row, metric: str) -> Change | None:
        baseline = self.baseline(row)
        if baseline is None or not row.guided:
            return None
        ours, plain = self.score(row, metric), self.score(baseline, metric)
        if ours is None or plain is None:
            return None
        relative = ours / plain - 1 if plain else math.inf
        return Change(ours - plain, relative, self._paired.get((row.id, metric)))

    @cached_property
    def references(self) -> dict[str, Reference]:
        sources = {r["key"]["ref"] for r in self.by_row.values()}
        found = {}
        for source in sources:
            try:
                found[source] = read_reference(source)
            except ErkGuidError:
                continue  # scored elsewhere; the scores stand without it
        return found

    def _features(self, row: Row, metric: str) -> np.ndarray | None:
        """Return the features of a row that kept them; read when needed, as they may be large."""
        path = self.plans[row.id].features
        if row.id not in self.by_row or not path.is_file():
            return None
        try:
            features = read_reference(path).features.get(metric)
        except ErkGuidError:
            return None  # a damaged file: the scores stand without it
        sound = features is not None and len(features) == self.by_row[row.id]["num"]
        return features if sound else None

    @cached_property
    def _paired(self) -> dict[tuple[str, str], float]:
        """Standard errors of differences: all rows of a group are resampled alike."""
        errors: dict[tuple[str, str], float] = {}
        for group in dict.fromkeys(row.group for row in self.rows):
            members = [r for r in self.rows if r.group == group and r.id in self.by_row]
            for metric in self.metrics:
                errors |= self._paired_in(members, metric)
        return errors

    def _paired_in(self, members: Sequence[Row], metric: str) -> dict[tuple[str, str], float]:
        rows = [r for r in members if self._features(r, metric) is not None]
        plain = next((k for k, r in enumerate(rows) if not r.guided), None)
        if plain is None or self.job.bootstrap == 0:
            return {}
        reference = self._reference(rows[plain], metric)
        kept = [f for r in rows if (f := self._features(r, metric)) is not None]
        if reference is None:
            return {}
        try:
            distances = bootstrap_distances(
                kept, reference.of(metric), self.job.bootstrap or RESAMPLES
            )
        except ValueError:  # features that do not match cannot be paired
            return {}
        spread = (distances - distances[:, [plain]]).std(0, ddof=1)
        return {(r.id, metric): float(e) for r, e in zip(rows, spread, strict=True)}

    def _reference(self, row: Row, metric: str) -> Reference | None:
        reference = self.references.get(self.by_row[row.id]["key"]["ref"])
        return reference if reference and metric in reference.statistics else None

    @cached_property
    def _qualities(self) -> dict[tuple[str, str], tuple[float, float]]:
        found = {}
        for row in self.rows:
            for metric in self.metrics if row.id in self.by_row else ():
                features = self._features(row, metric)
                reference = self._reference(row, metric) if features is not None else None
                if reference is None or features is None or len(features) <= NEIGHBOURS:
                    continue
                if metric in reference.features:
                    found[row.id, metric] = precision_recall(
                        real=reference.features[metric].astype(np.float32), generated=features
                    )
        return found

    def quality(self, row: Row) -> dict[str, float]:
        """Return precision, recall and inception score of a row, as far as they were computed."""
        quality = self.by_row.get(row.id, {}).get("quality", {})
        if row.id not in self.plans or not is_quality_of(quality, self.job, self.plans[row.id]):
            return {}
        found: dict[str, float] = quality.get("scores", {})
        return found

    def precision_recall(self, row: Row, metric: str) -> tuple[float, float] | None:
        """Return both if the row's and the reference's features were kept, else None."""
        return self._qualities.get((row.id, metric))


def number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return EMPTY
    if abs(value) >= MANY:
        return f"{value:{'+' if sign else ''}.3g}".replace("-", "−")
    digits = max(0, min(3, 2 - math.floor(math.log10(abs(value))))) if value else 2
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def stated(value: float | None) -> str:
    """Return a number of the paper, with the paper's digits."""
    return EMPTY if value is None else f"{value:g}"


def name_of_metric(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)
