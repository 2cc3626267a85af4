"""Move noise levels downhill, choose among what was found, and judge it on samples of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.norms import norm
from erk_guid.quadrature import prior_response
from erk_guid.solvers import Modal, Solver, Step
from erk_guid.studies.fitting.calibration import ROUNDING
from erk_guid.studies.fitting.journal import Journal
from erk_guid.studies.fitting.problems import Problem
from erk_guid.studies.fitting.results import (
    FITTED,
    Cost,
    Fitted,
    Interval,
    Tried,
    bootstrap_mean,
    bootstrap_ratio,
    described,
)  # fmt: skip
from erk_guid.studies.fitting.spacing import Spacing
from erk_guid.studies.fitting.trials import DIFFERENCE, Changed, Method, Slope, Trials

SHORT_LIST = 5
FINALISTS = 2
"""Solvers that are left after the first look, and after a short search."""
COARSE_ITERATIONS = 3
FINE_ITERATIONS = 7
RESPONSE_ITERATIONS = 3
"""Least-squares moves: of the density, of single levels, of levels and responses, at most."""
DAMPINGS = (0.1, 1.0, 10.0)
"""Factors on the damping that are tried at once."""
LARGEST_MOVE = 1.0
"""Largest change of a log gap in one move."""
ENOUGH = 0.003
"""A move that gains less than this part ends its stage."""
SURE = 2.0
"""Standard errors by which fitted responses must be better than one half to be taken."""


class Point(NamedTuple):
    """A place of the search: a method, with responses if fitted, at a spacing."""

    method: Method
    spacing: Spacing
    response: tuple[float, ...] | None = None

    def plan(self, to_zero: bool) -> list[Step]:
        return self.complete.plan(self.spacing.levels, to_zero)

    @property
    def complete(self) -> Method:
        """The method with its responses."""
        if self.response is None:
            return self.method
        return replace(self.method, solver=_with_response(self.method.solver, self.response))

    def key(self) -> tuple[object, ...]:
        return (str(self.complete), [f"{level:.12g}" for level in self.spacing.levels])


def _with_response(solver: Solver, response: tuple[float, ...]) -> Solver:
    assert isinstance(solver, Modal)
    return replace(solver, response=response)


@dataclass
class Search:
    """One fit: a problem, a number of evaluations, three sets of samples.

    Attributes:
        problem: what is solved.
        memory: keeps what was measured.
        count: evaluations of a run.
        to_zero: whether runs end with a step to 0.
        search: samples on which levels are moved.
        choice: those on which one is chosen among what the search found.
        report: those on which it is judged.
    """

    problem: Problem
    memory: Journal
    count: int
    to_zero: bool
    search: Trials
    choice: Trials
    report: Trials

    def run(
        self, methods: Sequence[Method], budget: int
    ) -> tuple[Point, str, list[tuple[Point, str, Tensor]]]:
        """Return what was chosen, its spacing, and all that was judged on the choice's samples."""
        until = self.memory.spent + budget
        usual = {
            method: {
                name: Point(method, spacing)
                for name, spacing in self.problem.usual(
                    method.intervals(self.count, self.to_zero)
                ).items()
            }
            for method in methods
        }
        half = self.search
        if len(methods) > 1:
            half = half.rows(slice(0, max(len(half) // 2, 4)), "half of search")
        places = {method: self._lowest(half, points.values()) for method, points in usual.items()}
        kept = sorted(methods, key=lambda method: places[method][1])
        if len(methods) > 1:
            rival = kept[0]
            for method in kept[:SHORT_LIST]:
                places[method] = self._improve(half, *places[method], until, (2, 0, 0))
            kept = sorted(kept[:SHORT_LIST], key=lambda method: places[method][1])[:FINALISTS]
        else:
            rival = methods[0]
        ended: list[tuple[Point, str]] = []
        for k, method in enumerate(kept):
            point, error = places[method]
            if half is not self.search:
                error = self._mean(self.search, point)
            share = self.memory.spent + (until - self.memory.spent) // (len(kept) - k)
            stages = (COARSE_ITERATIONS, FINE_ITERATIONS, 0)
            levelled, error = self._improve(self.search, point, error, share, stages)
            ended.append((levelled, FITTED))
            if isinstance(method.solver, Modal):
                answered, _ = self._improve(
                    self.search, levelled, error, share, (0, 0, RESPONSE_ITERATIONS)
                )
                if answered.response is not None:
                    ended.append((answered, FITTED))
        for method in dict.fromkeys([*kept, rival]):
            ended += [(point, name) for name, point in usual[method].items()]
        judged = [(point, name, self._errors(self.choice, point)) for point, name in ended]
        judged.sort(key=lambda found: float(found[2].mean()))
        chosen, name, errors = judged[0]
        if chosen.response is not None:
            # Responses are taken only where they are better beyond doubt than none.
            for point, other, others in judged:
                plain = point.response is None and other == FITTED
                if plain and point.method == chosen.method:
                    apart = others - errors
                    doubt = SURE * float(apart.std()) / len(apart) ** 0.5
                    if float(apart.mean()) <= doubt:
                        chosen, name = point, other
        return chosen, name, judged

    def fitted(
        self,
        chosen: Point,
        name: str,
        judged: Sequence[tuple[Point, str, Tensor]],
        own: float,
    ) -> Fitted:
        """Judge what was chosen on the samples of the report."""
        usual = [(point, which) for point, which, _ in judged if which != FITTED]
        errors = [self._errors(self.report, point) for point, _ in usual]
        best = min(range(len(usual)), key=lambda k: float(errors[k].mean()))
        before = errors[best]
        after = self._errors(self.report, chosen) if name == FITTED else before
        ratio = bootstrap_ratio(after, before)
        # Errors that are no more than rounding say nothing.
        start = self.report.task.x
        rounding = ROUNDING * torch.finfo(start.dtype).eps * float(norm(start).mean())
        if name != FITTED or ratio.high >= 1 or before.mean() <= rounding:
            chosen, name, after = usual[best][0], usual[best][1], before
            ratio = Interval(1.0, 1.0, 1.0)
        tried = tuple(
            Tried(point.complete, which, tuple(point.spacing.levels), float(found.mean()))
            for point, which, found in judged
        )
        own_spacings = {
            which: float(found.mean())
            for (point, which), found in zip(usual, errors, strict=True)
            if point.method == chosen.method
        }
        after_interval = bootstrap_mean(after)
        stages = 2 if chosen.method.solver.two_stages else 1
        return Fitted(
            sigmas=self.problem.times(chosen.spacing.levels, self.to_zero),
            solver=chosen.complete.solver,
            guidance=chosen.method.guidance,
            evaluations=stages * (len(chosen.spacing.levels) - 1) + self.to_zero,
            spacing=name,
            before=bootstrap_mean(before),
            before_is=described(usual[best][0].method, usual[best][1]),
            after=after_interval,
            ratio=ratio,
            usual=own_spacings,
            tried=tried,
            reference_error=own / after_interval.mean if after_interval.mean else 0.0,
            samples=(len(self.search), len(self.choice), len(self.report)),
            cost=Cost(0, 0, 0.0),
        )

    def _lowest(self, trials: Trials, points: Iterable[Point]) -> tuple[Point, float]:
        found = [(point, self._mean(trials, point)) for point in points]
        return min(found, key=lambda pair: pair[1])

    def _mean(self, trials: Trials, point: Point) -> float:
        mean = float(self._errors(trials, point).mean())
        return mean if math.isfinite(mean) else math.inf

    def _errors(self, trials: Trials, point: Point) -> Tensor:
        key = ("errors", self.count, trials.name, *point.key())
        guidance = point.method.guidance
        return torch.tensor(
            self.memory.numbers(
                key, lambda: trials.errors(point.plan(self.to_zero), guidance).tolist()
            ),
            dtype=torch.float64,
        )

    def _slope(self, trials: Trials, point: Point) -> Slope:
        spacing, response = point.spacing, point.response
        changed = []
        levels = spacing.levels
        moving = range(1, len(levels) if spacing.open else len(levels) - 1)
        for i in moving:
            # Not as far as the level above.
            by = min(DIFFERENCE, math.log(levels[i - 1] / levels[i]) / 2)
            moved = [*levels[:i], levels[i] * math.exp(by), *levels[i + 1 :]]
            changed.append(Changed(point.complete.plan(moved, self.to_zero), by))
        for i in range(len(response or ())):
            assert response is not None
            other = (*response[:i], response[i] + DIFFERENCE, *response[i + 1 :])
            plan = point._replace(response=other).plan(self.to_zero)
            changed.append(Changed(plan, DIFFERENCE))
        count = len(changed)

        def measured() -> list[float]:
            slope = trials.slope(point.plan(self.to_zero), changed, point.method.guidance)
            return [*slope.gradient.tolist(), *slope.curvature.flatten().tolist()]

        key = ("slope", self.count, trials.name, *point.key())
        numbers = torch.tensor(self.memory.numbers(key, measured), dtype=torch.float64)
        return Slope(numbers[:0], numbers[:count], numbers[count:].reshape(count, count))

    def _improve(
        self,
        trials: Trials,
        point: Point,
        error: float,
        until: int,
        iterations: tuple[int, int, int],
    ) -> tuple[Point, float]:
        """Move a point downhill, until nothing is gained or the budget is spent.

        Args:
            trials: samples to search on.
            point: where to begin.
            error: its error.
            until: evaluations spent at which to stop.
            iterations: most moves of the density, of single levels, of levels and responses.
        """
        if not math.isfinite(error):
            return point, error
        for stage, most in enumerate(iterations):
            damping = 0.1
            for _ in range(most):
                if self.memory.spent >= until:
                    return point, error
                start = point
                if stage == 2 and point.response is None:
                    start = point._replace(response=self._prior(point.spacing))
                slope = self._slope(trials, start)
                found = self._moved(trials, start, slope, stage, damping)
                if found is None or found[1] >= error:
                    damping *= 30
                    if self.memory.spent < until:
                        found = self._moved(trials, start, slope, stage, damping)
                if found is None or found[1] >= error:
                    break
                gained = 1 - found[1] / error if error else 0.0
                point, error, damping = found
                if gained < ENOUGH:
                    break
        return point, error

    def _prior(self, spacing: Spacing) -> tuple[float, ...]:
        return tuple(prior_response(level) for level in spacing.levels[1:-1])

    def _moved(
        self, trials: Trials, point: Point, slope: Slope, stage: int, damping: float
    ) -> tuple[Point, float, float] | None:
        """Return the best of a few damped least-squares moves: place, error, damping."""
        spacing = point.spacing
        basis = spacing.hats() if stage == 0 else torch.eye(len(spacing.gaps))
        basis = basis.double()
        ways = spacing.jacobian() @ basis
        if point.response is not None:
            ways = torch.block_diag(ways, torch.eye(len(point.response), dtype=torch.float64))
        curvature, gradient = ways.T @ slope.curvature @ ways, ways.T @ slope.gradient
        if not bool(torch.isfinite(curvature).all()):
            return None
        sizes = curvature.diagonal()
        best = None
        for factor in DAMPINGS:
            scaled = damping * factor
            # The mean of all log gaps changes nothing: the second term keeps the matrix regular.
            damped = curvature + torch.diag(scaled * sizes + 1e-4 * sizes.mean() + 1e-300)
            move = -torch.linalg.solve(damped, gradient)
            shift = basis @ move[: basis.shape[1]]
            shift = shift - shift.mean()
            shift = shift * min(1.0, LARGEST_MOVE / max(float(shift.abs().max()), 1e-300))
            response = point.response
            if response is not None:
                later = move[basis.shape[1] :].clamp(-1, 1).tolist()
                response = tuple(a + b for a, b in zip(response, later, strict=True))
            there = Point(point.method, spacing.moved(shift), response)
            error = self._mean(trials, there)
            if best is None or error < best[1]:
                best = (there, error, scaled)
        return best
