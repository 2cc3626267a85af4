"""How many evaluations, and seconds, does a method take to be as near as plain Heun?"""

from __future__ import annotations

import csv
import io
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from erk_guid.solvers import Heun
from erk_guid.studies.accuracy.measuring import Error, Table, distances, error_of
from erk_guid.studies.accuracy.methods import Method, OurMethod
from erk_guid.studies.accuracy.problems import Problem


class Found(NamedTuple):
    """The shortest run of a method that is near enough."""

    evaluations: int
    """Calls of the denoiser in a run."""
    error: Error
    """Its error."""
    seconds: float
    """Time of that run for each sample."""


@dataclass(frozen=True)
class Nearness:
    """What each method needs to be as near as plain Heun.

    Attributes:
        problem: its name.
        steps: noise levels of the run of plain Heun.
        target: that run.
        found: by method's name; None where no run of up to as many evaluations is near enough.
        most: by method's name, the evaluations of its longest run: fits have few numbers of them.
    """

    problem: str
    steps: int
    target: Found
    found: dict[str, Found | None]
    most: dict[str, int]

    def markdown(self) -> str:
        """Return the table, the fewest evaluations first."""
        whole = self.target.evaluations
        lines = [
            f"| {self.problem}: as near as Heun's {self.steps} noise levels "
            f"({whole} evaluations, {self.target.error.mean:.3g}) | evaluations | share | distance "
            "| seconds a sample |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, found in self.ranked:
            if found is None:
                lines.append(f"| {name} | more than {self.most[name]} | | | |")
                continue
            lines.append(
                f"| {name} | {found.evaluations} | {found.evaluations / whole:.2f} | "
                f"{found.error.mean:.3g} | {found.seconds:.3g} |"
            )
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV; empty cells where no run is near enough."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["problem", "method", "evaluations", "mean", "standard_error", "seconds_a_sample"]
        )
        for name, found in self.ranked:
            cells = [""] * 4
            if found is not None:
                numbers = (found.error.mean, found.error.standard_error, found.seconds)
                cells = [str(found.evaluations), *(f"{v:.6g}" for v in numbers)]
            writer.writerow([self.problem, name, *cells])
        return text.getvalue()

    @property
    def ranked(self) -> list[tuple[str, Found | None]]:
        """The methods, the fewest evaluations first, then the nearest."""

        def place(entry: tuple[str, Found | None]) -> tuple[float, float]:
            found = entry[1]
            return (math.inf, 0.0) if found is None else (found.evaluations, found.error.mean)

        return sorted(self.found.items(), key=place)


def as_near(
    problem: Problem,
    methods: Sequence[Method],
    table: Table | None = None,
    *,
    steps: int,
    progress: Callable[[Iterable[Method]], Iterable[Method]] = lambda methods: methods,
    note: Callable[[Nearness], None] = lambda nearness: None,
) -> Nearness:
    """Find the shortest run of each method that is as near as plain Heun's.

    The search takes it that errors fall as evaluations are added. Where they do not, a shorter run
    may be near enough, too.

    Args:
        problem: what to solve.
        methods: how.
        table: their errors at some numbers of evaluations, which saves runs.
        steps: noise levels of the run of plain Heun, 2 or more.
        progress: wraps the methods, as tqdm does.
        note: called after each method with what was found so far.

    Raises:
        ValueError: fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"plain Heun needs 2 noise levels at least, got {steps}")
    heun = OurMethod(name="heun", solver=Heun(), stages=2)
    limit = heun.stages * (steps - 1)
    _run(problem, heun, limit)  # not counted: a first run computes what later ones reuse
    target = _run(problem, heun, limit)
    known = {} if table is None else table.errors
    most = {method.name: max(method.counts(limit), default=0) for method in methods}
    found: dict[str, Found | None] = {}
    for method in progress(methods):
        row = known.get(method.name, [])
        errors = {} if table is None else dict(zip(table.evaluations, row, strict=False))
        found[method.name] = _fewest(problem, method, target.error.mean, limit, errors)
        note(Nearness(problem.name, steps, target, dict(found), most))
    return Nearness(problem.name, steps, target, found, most)


def _fewest(
    problem: Problem, method: Method, wanted: float, limit: int, given: Mapping[int, Error]
) -> Found | None:
    """Return the shortest run of a method, up to `limit` evaluations, that is that near."""
    counts = method.counts(limit)
    runs: dict[int, Found] = {}
    errors = {count: given[count].mean for count in counts if count in given}

    def error(count: int) -> float:
        if count not in errors:
            runs[count] = _run(problem, method, count)
            errors[count] = runs[count].error.mean
        return errors[count]

    near = [count for count in errors if errors[count] <= wanted]
    high = counts.index(min(near)) if near else len(counts)
    far = [count for count in counts[:high] if count in errors]
    low = counts.index(max(far)) if far else -1  # too far; from high on near enough
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        place = middle if halve else _place(counts, errors, wanted, low, high)
        before = high - low
        if error(counts[place]) <= wanted:
            high = place
        else:
            low = place
        halve = not halve and high - low > before // 2
    if high == len(counts):
        return None
    return runs.get(counts[high]) or _run(problem, method, counts[high])


def _place(
    counts: Sequence[int], errors: Mapping[int, float], wanted: float, low: int, high: int
) -> int:
    """Return where, between low and high, the wanted error is expected: errors fall as powers."""
    known = sorted(count for count in errors if math.isfinite(errors[count]) and errors[count] > 0)
    below = [count for count in known if count <= (counts[low] if low >= 0 else 0)]
    above = [
        count for count in known if count >= (counts[high] if high < len(counts) else math.inf)
    ]
    pair = [*below[-2:], *above[:1]][-2:]
    if len(pair) < 2 or wanted <= 0 or errors[pair[0]] <= errors[pair[1]]:
        return (low + high) // 2
    slope = math.log(errors[pair[1]] / errors[pair[0]]) / math.log(pair[1] / pair[0])
    expected = pair[0] * (wanted / errors[pair[0]]) ** (1 / slope)
    return min(max(bisect_left(counts, expected), low + 1), high - 1)


def _run(problem: Problem, method: Method, evaluations: int) -> Found:
    chosen = method.at(evaluations)
    assert chosen is not None  # it is one of the method's counts
    begun = time.perf_counter()
    sigmas = chosen.sigmas(evaluations, problem.sigma_min, problem.sigma_max)
    end = chosen.run(problem.denoiser, problem.start, sigmas)
    if end.is_cuda:
        torch.cuda.synchronize(end.device)
    seconds = (time.perf_counter() - begun) / len(end)
    return Found(evaluations, error_of(distances(end, problem.end)), seconds)
