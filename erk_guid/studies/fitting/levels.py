"""Search for the noise levels at which a solver is nearest to the ODE, for your own model.

A few samples are solved finely. The search moves the noise levels until a run with few evaluations
ends as near to them as it can, from the same noise. How it saves evaluations:

- It measures how the end points move with each noise level, and solves for the best move by least
  squares (Gauss-Newton, damped). One such measurement serves a density over log sigma with four
  parameters, which is searched first, and then the single levels.
- A run with one level moved shares all steps before that level, and all runs share the first
  evaluation (`erk_guid.studies.fitting.trials`).
- With several solvers, most are dropped after a short search on half of the samples.

Three sets of samples are used: one to search, one to choose among what the search found, one to say
how good it is. What is measured is fidelity to the ODE, not which images look or score better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.guidance import Guidance
from erk_guid.norms import norm
from erk_guid.processes import VE, Process, in_sigma
from erk_guid.quadrature import prior_response
from erk_guid.sampling import as_solver, sample
from erk_guid.schedules import RHO, SIGMA_MAX, SIGMA_MIN, make_sigmas
from erk_guid.solvers import DEIS, IPNDMV, DPMpp, Modal, Solver, Step, UniPC
from erk_guid.studies.fitting.calibration import ROUNDING, Labelled
from erk_guid.studies.fitting.journal import Journal
from erk_guid.studies.fitting.spacing import Spacing
from erk_guid.studies.fitting.sweep import ASKED_TWICE, QUESTIONS, Task, asked_levels
from erk_guid.studies.fitting.trials import DIFFERENCE, Changed, Method, Slope, Trials

BEST = "best"
CANDIDATES: tuple[Solver, ...] = (
    Modal(), Modal(3), Modal(2), UniPC(3), UniPC(2), IPNDMV(3), DEIS(3, "log"), DPMpp(2),
)  # fmt: skip
"""Solvers among which `BEST` chooses: each was the best somewhere."""
USUAL = ("polynomial", "logsnr")
"""Spacings that a fit must beat: rho 7, and equal steps in log sigma."""
FITTED = "fitted"

FEWEST = 16
"""Fewest samples: a quarter to search, a quarter to choose, half to report."""
SEARCHED = 32
"""Most samples that are searched on, and that are chosen on."""
TRIALS = 60
"""Runs on all samples of the search that a fit may cost; `BEST` may cost three times that."""
BEST_TRIALS = 3 * TRIALS
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

RECOGNIZED = 5
"""Noise levels at which a journal knows its model again."""
REFERENCE_EVALUATIONS = 48
REFERENCE_ERROR = 0.02
"""The fine solution is refined until its error is below this part of a usual run's."""
REFINEMENTS = 4
RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


class Cost(NamedTuple):
    """What a fit took."""

    search: int
    """Calls of the denoiser, counted per sample, of search, choice and report."""
    reference: int
    """Those of the fine solution."""
    seconds: float


class Tried(NamedTuple):
    """One run that was judged on the samples of the choice."""

    method: Method
    spacing: str
    """"polynomial", "logsnr", "time" or "fitted"."""
    levels: tuple[float, ...]
    error: float
    """Mean distance there."""

    @property
    def described(self) -> str:
        """The run in words."""
        return described(self.method, self.spacing)


def described(method: Method, spacing: str) -> str:
    """Return a run in words."""
    return f"{method} with {spacing} spacing"


@dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
        sigmas: noise levels for `erk_guid.sample`, or times where there is a process; float64.
        solver, guidance: what they are for, for `erk_guid.sample`, too.
        evaluations: calls of the denoiser that such a run takes; no more than was asked for.
        spacing: "fitted", or the usual spacing that nothing was significantly better than.
        before: error of the best usual run on the samples of the report: mean distance of the end
            points from the fine solution's, with a bootstrap interval (95 %).
        before_is: which run that was.
        after: error with `sigmas` on the same samples.
        ratio: after over before, with the interval of that ratio.
        usual: errors of the chosen solver with each usual spacing, on the same samples.
        tried: the runs among which it was chosen, best first.
        reference_error: estimate of the fine solution's own error over `after`.
        samples: how many samples were searched on, chosen on, reported on.
        cost: evaluations and seconds.
    """

    sigmas: Tensor
    solver: Solver
    guidance: Guidance | None
    evaluations: int
    spacing: str
    before: Interval
    before_is: str
    after: Interval
    ratio: Interval
    usual: dict[str, float]
    tried: tuple[Tried, ...]
    reference_error: float
    samples: tuple[int, int, int]
    cost: Cost

    @property
    def found(self) -> bool:
        """Whether fitted levels are significantly better than the usual ones."""
        return self.spacing == FITTED

    def __str__(self) -> str:
        method = Method(self.solver, self.guidance)
        levels = ", ".join(f"{level:.4g}" for level in self.sigmas.tolist())
        said = (
            f"error {self.after} against {self.before} of {self.before_is}: {self.ratio} times"
            if self.found
            else f"nothing is significantly better than {self.before_is}, error {self.before}"
        )
        return f"{method}, {self.evaluations} evaluations at {levels}; {said}"


Spacings = Mapping[str, Callable[[int], Sequence[float]]]
"""Functions by name that return noise levels for a number of intervals between them."""
Progress = Callable[[int, int], None]
"""Called with the evaluations done, and those expected in all."""


def fit(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    *,
    evaluations: int,
    solver: str | Solver | Sequence[Solver] = BEST,
    guidance: Guidance | None = None,
    labels: Tensor | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float | None = None,
    process: Process | None = None,
    denoise_to_zero: bool = False,
    floor: float | None = None,
    spacings: Spacings | None = None,
    trials: int | None = None,
    batch: int = 32,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Fitted:
    """Find the noise levels at which a model needs the fewest evaluations.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, or as ``denoiser(x, sigma, labels)`` with the
            labels of x's rows. With model guidance, the guided one (`erk_guid.ModelGuidance`).
        x: where to start, [N, ...], already scaled by `sigma_max`; 128 samples serve well. Half
            of them are used for the report alone.
        evaluations: calls of the denoiser that a run may take.
        solver: "best" chooses among `CANDIDATES`, a list among its own; a name or a solver is
            kept.
        guidance: ERK guidance of the solver, as in `erk_guid.sample`; not with "best".
        labels: one row for each of x's, or None.
        sigma_min, sigma_max: first and last noise level above 0, noise over signal. None is 80,
            or with a process the noise that it begins with.
        process: what x is, as in `erk_guid.sample`.
        denoise_to_zero: end with an Euler step to 0, which takes one of the evaluations.
        floor: lowest level of the fine solution, where runs usually end their steps far above 0
            (noise over signal, below sigma_min). The last level is then fitted, too, and the error
            of the step from it to 0 counts. None is for a last level of sigma_min, from which the
            fine solution, too, takes one step to 0.
        spacings: further usual spacings that a fit must beat: a function by name, which returns
            the noise levels above 0 (noise over signal) for a number of intervals between them.
            The first one is taken to be sigma_max; the last one sigma_min, unless there is a floor.
        trials: budget of the search in runs of `evaluations` on `SEARCHED` samples; None is
            `TRIALS`, or `BEST_TRIALS` with several solvers.
        batch: samples at a time.
        progress: called with the evaluations done and expected in all.
        journal: a folder that keeps what was measured. A fit that was interrupted goes on from
            there when it is called again with the same arguments.

    Returns:
        What was found. It is a usual spacing, and says so, where nothing is significantly better.

    Raises:
        ValueError: a value out of range, or a denoiser whose solutions are not finite, or that does
            not answer the same question twice alike.
        ErkGuidError: the journal cannot be used.
    """
    return fit_each(
        denoiser, x, evaluations=[evaluations], solver=solver, guidance=guidance, labels=labels,
        sigma_min=sigma_min, sigma_max=sigma_max, process=process,
        denoise_to_zero=denoise_to_zero, floor=floor, spacings=spacings, trials=trials, batch=batch,
        progress=progress, journal=journal,
    )[0]  # fmt: skip


def fit_each(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    *,
    evaluations: Sequence[int],
    solver: str | Solver | Sequence[Solver] = BEST,
    guidance: Guidance | None = None,
    labels: Tensor | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float | None = None,
    process: Process | None = None,
    denoise_to_zero: bool = False,
    floor: float | None = None,
    spacings: Spacings | None = None,
    trials: int | None = None,
    batch: int = 32,
    progress: Progress | None = None,
    journal: str | Path | None = None,
    journal_of: str = "",
) -> list[Fitted]:
    """Fit several numbers of evaluations, against one fine solution; see `fit`.

    Args:
        journal_of: names the denoiser, whose journal another one must not use.
    """
    methods = _methods(solver, guidance)
    several = len(methods) > 1
    trials = (BEST_TRIALS if several else TRIALS) if trials is None else trials
    _check(x, labels, evaluations, methods, denoise_to_zero, trials, batch)
    if floor is not None and not (denoise_to_zero and 0 < floor < sigma_min):
        raise ValueError(
            f"floor {floor} must be above 0 and below sigma_min {sigma_min}, and needs "
            "denoise_to_zero"
        )
    lowest = sigma_min if floor is None else floor
    problem = _problem(denoiser, x, labels, lowest, sigma_max, process, batch)
    if not sigma_min < problem.high:
        raise ValueError(f"sigma_min {sigma_min} must be below sigma_max {problem.high}")
    problem.low, problem.floor = float(sigma_min), floor
    problem.more = dict(spacings or {})
    memory = Journal.open(
        journal, (x, evaluations, solver, guidance, sigma_min, sigma_max, process, denoise_to_zero,
                  trials, journal_of, *([] if labels is None else [labels]),
                  *([] if floor is None else [f"floor {floor}"])),
    )  # fmt: skip
    quarter = min(SEARCHED, len(x) // 4)
    fits = len(evaluations)
    expected = sum(_expected(count, quarter, len(x), trials) for count in evaluations)
    expected += len(x) * REFERENCE_EVALUATIONS * 2 + 2 * QUESTIONS * ASKED_TWICE
    memory.check_same_answers(lambda: _answers(problem.task))
    problem.task = replace(problem.task, denoiser=memory.counting(problem.task.denoiser))
    memory.report = None if progress is None else lambda done: progress(done, max(done, expected))
    began = time.monotonic()
    problem.task.check_denoiser()
    ends, own = _reference(problem, memory, max(evaluations), denoise_to_zero)
    of_reference = memory.spent
    whole = Trials(problem.task, ends)
    search = whole.rows(slice(0, quarter), "search")
    choice = whole.rows(slice(quarter, 2 * quarter), "choice")
    report = whole.rows(slice(2 * quarter, len(x)), "report")
    fitted = []
    for count in evaluations:
        before = memory.spent
        fitting = _Fitting(problem, memory, count, denoise_to_zero, search, choice, report)
        found = fitting.fitted(*fitting.run(methods, trials * count * len(search)), own)
        spent = Cost(memory.spent - before, of_reference // fits, time.monotonic() - began)
        began = time.monotonic()
        fitted.append(replace(found, cost=spent))
    if progress is not None:
        progress(memory.spent, memory.spent)
    return fitted


def _methods(solver: str | Solver | Sequence[Solver], guidance: Guidance | None) -> list[Method]:
    if isinstance(solver, (list, tuple)):
        if not solver:
            raise ValueError("solver: the list is empty")
        return [method for each in solver for method in _methods(each, guidance)]
    if isinstance(solver, str) and solver == BEST:
        if guidance is not None:
            raise ValueError(
                "solver 'best' chooses among solvers without ERK guidance; name the solver that "
                "is guided, e.g. solver='heun'"
            )
        return [Method(candidate) for candidate in CANDIDATES]
    chosen = as_solver(solver)  # type: ignore[arg-type]
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(
            f"guidance must be an object such as erk_guid.ERKGuidance(0.5), got {guidance!r}"
        )
    if guidance is not None:
        guidance.check(chosen)
    if isinstance(chosen, Modal) and chosen.response is not None:
        raise ValueError("the response is fitted, too: leave it out of the solver")
    if chosen.noisy:
        raise ValueError(
            "levels are fitted to the solution of the ODE, and a solver that adds noise (eta) "
            "solves another equation: leave eta out; fitted levels may be used with it"
        )
    return [Method(chosen, guidance)]


def _check(
    x: Tensor,
    labels: Tensor | None,
    evaluations: Sequence[int],
    methods: Sequence[Method],
    to_zero: bool,
    trials: int,
    batch: int,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [N, ...], got {type(x).__name__}")
    if not x.is_floating_point() or x.ndim < 2 or len(x) < FEWEST:
        raise ValueError(
            f"x must be a floating tensor of at least {FEWEST} samples [N, ...], got {x.dtype} "
            f"{list(x.shape)}"
        )
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, a row for each sample, got {labels!r:.60}")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} samples")
    for name, value in (("trials", trials), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not evaluations:
        raise ValueError("evaluations: there is no number to fit for")
    for count in evaluations:
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"evaluations must be whole numbers, got {count!r}")
        for method in methods:
            if method.intervals(count, to_zero) < 2:
                raise ValueError(
                    f"{count} evaluations leave {method} no noise level to choose between the "
                    "first and the last; take more"
                )


class _Problem:
    """The task in sigma, with its range, and the way back to the process's times."""

    def __init__(self, task: Task, first: float, low: float, process: Process, start: float):
        self.task = task
        self.first = first
        self.high = min(first, float(SIGMA_MAX)) if not isinstance(process, VE) else first
        self.low = low
        self.floor: float | None = None
        self.process = process
        self.start = start
        self.more: dict[str, Callable[[int], Sequence[float]]] = {}

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


def _problem(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor | None,
    sigma_min: float,
    sigma_max: float | None,
    process: Process | None,
    batch: int,
) -> _Problem:
    if process is None or isinstance(process, VE):
        first = float(SIGMA_MAX) if sigma_max is None else float(sigma_max)
        if not 0 < sigma_min < first < math.inf:
            raise ValueError(f"sigma_min {sigma_min} must be above 0 and below sigma_max {first}")
        range_ = torch.tensor([first, sigma_min], dtype=torch.float64)
        return _Problem(Task(denoiser, x, labels, range_, batch), first, sigma_min, VE(), first)
    start = process.last if sigma_max is None else process.time(sigma_max)
    if not math.isfinite(start):
        raise ValueError("sigma_max: say where to begin; this process has no last time")
    ends = torch.tensor([start, process.time(sigma_min)], dtype=torch.float64)
    problem = in_sigma(denoiser, x, ends, process)
    task = Task(Labelled(denoiser, problem), problem.x, labels, problem.sigmas, batch)
    return _Problem(task, float(problem.sigmas[0]), float(sigma_min), process, start)


def _answers(task: Task) -> list[list[float]]:
    """Return a few numbers of what the model answers for the first sample, by noise level."""
    one = task.rows(slice(0, 1))
    denoise, first = one.on(torch.zeros(1, dtype=torch.int64, device=one.x.device)), one.sigmas[0]
    found = []
    for sigma in asked_levels(one.sigmas, RECOGNIZED):
        with torch.no_grad():
            value = denoise(
                one.x * (sigma / float(first)), torch.tensor(sigma, dtype=torch.float64)
            )
        value = value.double().flatten().cpu()
        some = value[:: max(1, len(value) // 8)]
        found.append([*some.tolist(), float(value.square().mean().sqrt())])
    return found


def _expected(count: int, searched: int, samples: int, trials: int) -> int:
    """Return about how many evaluations a fit takes, the fine solution left out."""
    return count * (trials * searched + 6 * searched + 4 * (samples - 2 * searched))


def _reference(
    problem: _Problem, memory: Journal, count: int, to_zero: bool
) -> tuple[Tensor, float]:
    """Return the fine end points, and their own error (measured on a few samples)."""
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


class _Point(NamedTuple):
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
class _Fitting:
    """One fit: a problem, a number of evaluations, three sets of samples."""

    problem: _Problem
    memory: Journal
    count: int
    to_zero: bool
    search: Trials
    choice: Trials
    report: Trials

    def run(
        self, methods: Sequence[Method], budget: int
    ) -> tuple[_Point, str, list[tuple[_Point, str, Tensor]]]:
        """Return what was chosen, its spacing, and all that was judged on the choice's samples."""
        until = self.memory.spent + budget
        usual = {
            method: {
                name: _Point(method, spacing)
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
        ended: list[tuple[_Point, str]] = []
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
        chosen: _Point,
        name: str,
        judged: Sequence[tuple[_Point, str, Tensor]],
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

    def _lowest(self, trials: Trials, points: Iterable[_Point]) -> tuple[_Point, float]:
        found = [(point, self._mean(trials, point)) for point in points]
        return min(found, key=lambda pair: pair[1])

    def _mean(self, trials: Trials, point: _Point) -> float:
        mean = float(self._errors(trials, point).mean())
        return mean if math.isfinite(mean) else math.inf

    def _errors(self, trials: Trials, point: _Point) -> Tensor:
        key = ("errors", self.count, trials.name, *point.key())
        guidance = point.method.guidance
        return torch.tensor(
            self.memory.numbers(
                key, lambda: trials.errors(point.plan(self.to_zero), guidance).tolist()
            ),
            dtype=torch.float64,
        )

    def _slope(self, trials: Trials, point: _Point) -> Slope:
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
        point: _Point,
        error: float,
        until: int,
        iterations: tuple[int, int, int],
    ) -> tuple[_Point, float]:
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
        self, trials: Trials, point: _Point, slope: Slope, stage: int, damping: float
    ) -> tuple[_Point, float, float] | None:
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
            there = _Point(point.method, spacing.moved(shift), response)
            error = self._mean(trials, there)
            if best is None or error < best[1]:
                best = (there, error, scaled)
        return best


def bootstrap_mean(errors: Tensor) -> Interval:
    """Return the mean of errors [N] with its 95 % bootstrap interval."""
    means = errors[_resampled(len(errors))].mean(dim=1)
    return _interval(float(errors.mean()), means)


def bootstrap_ratio(after: Tensor, before: Tensor) -> Interval:
    """Return the ratio of two means over the same samples, with its 95 % bootstrap interval."""
    rows = _resampled(len(after))
    ratios = after[rows].mean(dim=1) / before[rows].mean(dim=1)
    return _interval(float(after.mean() / before.mean()), ratios)


def _resampled(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def _interval(mean: float, drawn: Tensor) -> Interval:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Interval(mean, low, high)
