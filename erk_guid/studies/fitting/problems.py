"""What a search for noise levels solves: the task, its usual spacings, and its fine solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erk_guid.norms import norm
from erk_guid.processes import VE, Process, in_sigma
from erk_guid.sampling import sample
from erk_guid.schedules import RHO, SIGMA_MAX, make_sigmas
from erk_guid.solvers import Modal
from erk_guid.studies.fitting.calibration import Labelled
from erk_guid.studies.fitting.journal import Journal
from erk_guid.studies.fitting.spacing import Spacing
from erk_guid.studies.fitting.sweep import Task
from erk_guid.studies.fitting.trials import Method, Trials

USUAL = ("polynomial", "logsnr")
"""Spacings that a fit must beat: rho 7, and equal steps in log sigma."""
REFERENCE_EVALUATIONS = 48
REFERENCE_ERROR = 0.02
"""The fine solution is refined until its error is below this part of a usual run's."""
REFINEMENTS = 4

Spacings = Mapping[str, Callable[[int], Sequence[float]]]
"""Functions by name that return noise levels for a number of intervals between them."""


@dataclass(frozen=True)
class Problem:
    """The task in sigma, with its range, and the way back to the process's times.

    Attributes:
        task: a denoiser of noise levels, with the samples to solve for.
        first: noise level at which the samples are.
        low: last noise level of usual runs.
        process: what the caller's x is.
        start: its time at `first`; `first` itself without a process.
        floor: see `erk_guid.fit`.
        more: further usual spacings by name.
    """

    task: Task
    first: float
    low: float
    process: Process
    start: float
    floor: float | None
    more: Spacings

    @classmethod
    def of(
        cls,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        labels: Tensor | None,
        *,
        sigma_min: float,
        sigma_max: float | None,
        floor: float | None,
        process: Process | None,
        more: Spacings,
        batch: int,
    ) -> Problem:
        """Return the problem that `erk_guid.fit` is asked for.

        Raises:
            ValueError: a level is out of range.
        """
        lowest = sigma_min if floor is None else floor
        if process is None or isinstance(process, VE):
            first = float(SIGMA_MAX) if sigma_max is None else float(sigma_max)
            if not 0 < lowest < first < math.inf:
                raise ValueError(f"sigma_min {lowest} must be above 0 and below sigma_max {first}")
            ends = torch.tensor([first, lowest], dtype=torch.float64)
            task = Task(denoiser, x, labels, ends, batch)
            found = cls(task, first, float(sigma_min), VE(), first, floor, more)
        else:
            start = process.last if sigma_max is None else process.time(sigma_max)
            if not math.isfinite(start):
                raise ValueError("sigma_max: say where to begin; this process has no last time")
            ends = torch.tensor([start, process.time(lowest)], dtype=torch.float64)
            turned = in_sigma(denoiser, x, ends, process)
            task = Task(Labelled(denoiser, turned), turned.x, labels, turned.sigmas, batch)
            first = float(turned.sigmas[0])
            found = cls(task, first, float(sigma_min), process, start, floor, more)
        if not found.low < found.high:
            raise ValueError(f"sigma_min {sigma_min} must be below sigma_max {found.high}")
        return found

    @property
    def high(self) -> float:
        """The range that is divided begins here: below `first` where that is nothing but noise."""
        return self.first if isinstance(self.process, VE) else min(self.first, float(SIGMA_MAX))

    def usual(self, intervals: int) -> dict[str, Spacing]:
        """Return the usual spacings by name."""
        found = {}
        for name in USUAL:
            levels = make_sigmas(name, intervals + 1, self.low, self.high, RHO)[:-1].tolist()
            found[name] = Spacing.of([self.first, *levels[1:]], self.high, self.floor)
        if math.isfinite(self.process.last):  # evenly spaced times, as flow models use them
            end = self.process.time(self.low)
            times = torch.linspace(self.start, end, intervals + 1, dtype=torch.float64)
            inner = [self.process.level(t).sigma for t in times.tolist()[1:-1]]
            if all(level < self.high for level in inner):
                found["time"] = Spacing.of([self.first, *inner, self.low], self.high, self.floor)
        for name, spaced in self.more.items():
            *inner, own = list(spaced(intervals))[1:]
            last = self.low if self.floor is None else own
            if all(last < level < self.high for level in inner) and last < self.high:
                found[name] = Spacing.of([self.first, *inner, last], self.high, self.floor)
        return found

    def times(self, levels: Sequence[float], to_zero: bool) -> Tensor:
        """Return the levels as the caller's sigmas or times."""
        later = [self.process.time(level) for level in levels[1:]]
        return torch.tensor([self.start, *later, *([0.0] if to_zero else [])], dtype=torch.float64)


def fine_solution(
    problem: Problem, memory: Journal, count: int, to_zero: bool
) -> tuple[Tensor, float]:
    """Return the fine end points [N, ...], and their own error (measured on a few samples).

    Args:
        problem: what to solve.
        memory: keeps the end points.
        count: evaluations of the runs that are compared with it.
        to_zero: whether it ends at 0.

    Raises:
        ValueError: the solutions are not finite.
    """
    few = slice(0, 4)

    def solved(rows: slice, evaluations: int) -> Tensor:
        task = problem.task.rows(rows)
        low = problem.low if problem.floor is None else problem.floor
        levels = make_sigmas("polynomial", evaluations + 1, low, problem.high, RHO)[:-1]
        sigmas = levels.tolist()
        if problem.first > problem.high:
            above = torch.logspace(
                math.log10(problem.first), math.log10(problem.high), 9, dtype=torch.float64
            ).tolist()
            sigmas = [*above[:-1], *sigmas]
        with torch.no_grad():
            denoise = task.on(torch.arange(len(task.x), device=task.x.device))
            return sample(
                denoise, task.x, torch.tensor([*sigmas, *([0.0] if to_zero else [])],
                                              dtype=torch.float64),
                solver=Modal(),
            )  # fmt: skip

    def fine() -> tuple[int, float]:
        method = Method(Modal())
        intervals = method.intervals(count, to_zero)
        evaluations = REFERENCE_EVALUATIONS
        coarse = solved(few, evaluations)
        for refinement in range(REFINEMENTS + 1):
            finer = solved(few, 2 * evaluations)
            error = float(norm(coarse - finer).mean())
            runs = [
                Trials(problem.task.rows(few), finer).errors(method.plan(s.levels, to_zero))
                for s in problem.usual(intervals).values()
            ]
            usual = min(float(run.mean()) for run in runs)
            if not math.isfinite(usual) or not math.isfinite(error):
                raise ValueError("solutions are not finite; look at the denoiser")
            if error <= REFERENCE_ERROR * usual or refinement == REFINEMENTS:
                break
            coarse, evaluations = finer, 2 * evaluations
        return evaluations, error

    evaluations, error = memory.numbers(("reference",), lambda: list(fine()))
    ends = memory.tensor(
        "fine", problem.task.x, lambda: solved(slice(0, len(problem.task.x)), int(evaluations))
    )
    return ends, float(error)
