"""Search for settings of ERK guidance for your own model, solver and noise levels, in minutes.

The paper leaves w_stiff and w_con to a sweep of 50,000-image FID runs for each model and step
count. Here a few dozen images are solved finely. The search looks for the setting that ends nearest
to them from the same noise. That is fidelity to the ODE. It is neither FID nor FD-DINOv2, which may
prefer images that are sharper than the ODE's.

How evaluations of the network are saved:

- all settings of a round run together and share their common evaluations
  (`erk_guid.studies.fitting.sweep`);
- w_con only decides at which steps the gate opens, so one value between two neighbouring
  stiffnesses of the steps stands for all values between them;
- a coarse ladder of w_stiff is tried on a few images, and only the best of it on all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance, settings_of
from erk_guid.norms import norm
from erk_guid.processes import InSigma, Process, in_sigma
from erk_guid.sampling import as_solver
from erk_guid.solvers import Modal, Solver, Step, check_levels
from erk_guid.studies.fitting.sweep import (
    ASKED_TWICE,
    QUESTIONS,
    Task,
    distances,
    fine_path,
    readings,
    step_errors,
)

OBJECTIVES = ("end", "steps")

FEWEST = 4
"""Fewest samples that a search can judge by."""
SCREENED = 8
"""Samples that the ladder is tried on."""
PROMISING = 24
"""Samples that the best of the ladder at each threshold is tried on."""
LADDER = (0.2, 0.3, 0.45, 0.67, 1.0, 1.5, 2.25)
RUNG = 1.5
EXTENSIONS = 4
"""Rungs added at most where the best value is at an end of the ladder."""
THRESHOLDS = 12
"""Values of w_con tried, at most."""
FINALISTS = 4
"""Values of w_con that are tried on all samples."""
BRACKET = 1.15
"""Factor between neighbours when w_stiff is refined."""
CLOSE = 0.02
"""Ratios that differ by less may change their order when w_stiff is refined."""
REFINED = 3
"""Further values of w_stiff, at most."""
CAUTION = 2.0
"""Standard errors that are added to a setting's ratio when settings are compared."""
CERTAINTY = 3.0
"""Standard errors by which settings must beat the plain solver to be recommended."""
ROUNDING = 10.0
"""Multiple of the start points' rounding that errors must exceed to mean anything."""

REFERENCE_EVALUATIONS = 42
REFERENCE_SUBSTEPS = 4
"""Fewest evaluations of the fine solution, in all and in each interval."""
REFERENCE_ERROR = 0.03
"""The fine solution is refined, twice at most, until its error is below this part of plain's."""
REFINEMENTS = 2

PLAIN = ERKGuidance()
"""The plain solver."""

NOT_FINITE = "the plain solver does not end at finite values; look at the denoiser"


@dataclass(frozen=True)
class Trial:
    """The result of one setting.

    Attributes:
        guidance: the setting.
        error: mean over the samples of the objective.
        ratio: `error` over the plain solver's on the same samples.
        ratio_error: standard error of `ratio`; small, because the samples are the same.
        step_ratio: the error of single steps from the exact solution, summed over the steps, over
            the plain solver's; nan where it was not computed.
        samples: number of samples.
    """

    guidance: Guidance
    error: float
    ratio: float
    ratio_error: float
    step_ratio: float
    samples: int

    @property
    def score(self) -> float:
        """The value that settings are ranked by: the ratio plus two of its standard errors.

        The best of many noisy means is partly luck. A setting whose errors scatter ruins some
        images even if it is good for most.
        """
        return self.ratio + CAUTION * self.ratio_error


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    Attributes:
        guidance: the recommendation: the setting with the lowest `score`. It is `PLAIN` (no
            guidance) unless that setting is better than plain by three standard errors.
        trials: all settings that were tried; those on all samples first, each by rising score.
        objective: "end" or "steps".
        reference_error: estimate of the fine solution's own error at the end, as a multiple of
            the plain solver's.
        nfe: calls of the denoiser, counted per sample.
    """

    guidance: Guidance
    trials: tuple[Trial, ...]
    objective: str
    reference_error: float
    nfe: int

    @property
    def chosen(self) -> Trial:
        """The trial of the recommendation."""
        return self.trial(self.guidance)

    @property
    def plain(self) -> Trial:
        """The plain solver's trial."""
        return self.trial(PLAIN)

    def trial(self, guidance: Guidance) -> Trial:
        """Return the trial of one of the settings.

        Raises:
            KeyError: it was not tried.
        """
        for trial in self.trials:
            if trial.guidance == guidance:
                return trial
        raise KeyError(guidance)

    def table(self, rows: int = 12) -> str:
        """Return the trials on all samples as Markdown, best first, with the plain solver."""
        final = [t for t in self.trials if t.samples == self.plain.samples]
        shown = final[:rows]
        if self.plain not in shown:
            shown = [*shown[: rows - 1], self.plain]
        lines = [
            f"| w_stiff | w_con | error ({self.objective}) | over plain's "
            "| of single steps, over plain's |",
            "|---:|---:|---:|---:|---:|",
        ]
        for trial in shown:
            g, mark = trial.guidance, "**" if trial.guidance == self.guidance else ""
            strength, threshold = written(g)
            spread = f" ± {trial.ratio_error:.3f}" if trial != self.plain else ""
            cells = (strength, threshold, f"{trial.error:.4g}", f"{trial.ratio:.3f}")
            marked = " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in cells)
            lines.append(f"| {marked}{spread} | {trial.step_ratio:.3f} |")
        return "\n".join(lines) + "\n"


def calibrate(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    solver: str | Solver = "heun",
    guidance: ERKGuidance = PLAIN,
    process: Process | None = None,
    objective: str = OBJECTIVES[0],
    auto: bool = True,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[Sequence[Trial]], None] | None = None,
) -> Calibration:
    """Search for the settings of guidance that stay nearest to the ODE's solution.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, or as ``denoiser(x, sigma, labels)`` with the
            labels of x's rows. Rows come in another order than in `x`, and more than once. So a
            denoiser that needs labels must use this argument.
        x: where to start, [N, ...], already scaled by ``sigmas[0]``; 64 samples serve well.
        sigmas: the noise levels, as in `erk_guid.sample`. The step to a trailing 0 is not guided,
            and left out.
        labels: one row for each of x's, or None.
        solver: "heun", "dpm2", "deis", or one with its options (`erk_guid.solvers`).
        guidance: gate and bound of all candidates; its w_stiff and w_con are not used.
        process: what x is, as in `erk_guid.sample`; `sigmas` are then its times. The settings
            are then for sampling with that process: w_con is per unit of noise over signal.
        objective: "end": the distance of the end points. "steps": the errors of single steps
            from the exact solution, summed over the steps. "end" also rewards a step that
            corrects the errors of earlier steps.
        auto: also try the parameter-free form, if the solver has it.
        batch: samples at a time.
        progress: called during the search with the evaluations of a sample so far, and how many
            they will be at most. That limit falls as the search goes on: settings share
            evaluations, and less may be left to try.
        note: called whenever settings have been tried, with all trials so far, best first.

    Returns:
        The recommendation, in `guidance`, and what was tried.

    Raises:
        ValueError: too few samples or levels, a solver without a pair, an unknown objective, or
            a denoiser whose solutions are not finite, or that does not answer the same question
            twice alike.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    if not x.is_floating_point() or x.ndim < 2 or len(x) < FEWEST:
        raise ValueError(
            f"x must be a floating tensor of at least {FEWEST} samples [N, ...], got {x.dtype} "
            f"{list(x.shape)}"
        )
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} samples")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not isinstance(guidance, ERKGuidance):
        raise TypeError(
            f"guidance must be an ERKGuidance with the candidates' gate and bound, got {guidance!r}"
        )
    solver = as_solver(solver)
    base = replace(guidance, w_stiff=1.0, w_con=0.0)
    base.check(solver)
    counted = _Counted(denoiser, progress)
    solved: Callable[..., Tensor] = counted
    if process is not None:
        problem = in_sigma(counted, x, sigmas, process)
        x, sigmas, solved = problem.x, problem.sigmas, Labelled(counted, problem)
    levels = [level for level in check_levels(sigmas) if level > 0]
    if len(levels) < 2:
        raise ValueError("there is 1 noise level above 0: no step between two of them to guide")
    steps = solver.plan(levels)
    task = Task(solved, x, labels, torch.tensor(levels, dtype=torch.float64), batch)
    budget = _Budget(counted, len(x), solver, len(steps))
    task.check_denoiser()
    read = readings(task.rows(slice(SCREENED)), steps, base)
    if not len(read):
        raise ValueError(
            f"no step between {len(levels)} noise levels above 0 has a pair to guide with; Heun "
            "needs three levels"
        )
    path, reference_error = _reference(task, steps, Modal())
    trials = _Trials(task, steps, path, objective, budget.left, note)
    others: list[Guidance] = [PLAIN]
    if auto and solver.two_stages:
        others.append(ParameterFreeGuidance())
    _search(trials, base, read.median(dim=1).values.tolist(), others)

    budget.left("single steps")
    final = [trial.guidance for trial in trials.all_of()]
    single = step_errors(task, steps, final, path).sum(dim=1).mean(dim=1)
    plain = float(single[final.index(PLAIN)])
    found = [
        trials.trial(setting, float(error) / plain if plain else math.nan)
        for setting, error in zip(final, single, strict=True)
    ]
    best = found[0]
    certain = best.ratio + CERTAINTY * best.ratio_error < 1
    # If the plain solver's error is no more than rounding, settings cannot be judged.
    rounding = ROUNDING * torch.finfo(x.dtype).eps * float(norm(x).mean())
    certain = certain and trials.trial(PLAIN).error > rounding
    if note is not None:
        note((*found, *trials.screened()))
    return Calibration(
        guidance=best.guidance if certain else PLAIN,
        trials=(*found, *trials.screened()),
        objective=objective,
        reference_error=reference_error,
        nfe=counted.rows,
    )


def written(guidance: Guidance) -> tuple[str, str]:
    """Return w_stiff and w_con as tables show them; empty where they are not used."""
    shown = settings_of(guidance)
    strength = shown["w_stiff"]
    if isinstance(strength, str):
        return strength, ""
    return f"{strength:g}", f"{shown['w_con']:g}" if guidance.active else ""


def is_published(guidance: Guidance) -> TypeGuard[ERKGuidance]:
    """Return whether `guidance` is the published form, and active."""
    return isinstance(guidance, ERKGuidance) and guidance.active


@dataclass(frozen=True)
class Labelled:
    """The denoiser of a problem rewritten in sigma, called with x, sigma and labels."""

    denoiser: Callable[..., Tensor]
    problem: InSigma

    def __call__(self, x: Tensor, sigma: Tensor, *labels: Tensor) -> Tensor:
        return self.problem.with_denoiser(lambda x, t: self.denoiser(x, t, *labels))(x, sigma)


@dataclass
class _Counted:
    """A denoiser that counts the samples it is given, and says how far it is."""

    denoiser: Callable[..., Tensor]
    progress: Callable[[int, int], None] | None = None
    rows: int = 0
    most: int = 0

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        self.rows += len(x)
        found = self.denoiser(x, *rest)
        if self.progress is not None:
            self.progress(self.rows, max(self.most, self.rows))
        return found


class _Budget:
    """How many evaluations of a sample the search still takes, at most, from each stage on."""

    def __init__(self, counted: _Counted, samples: int, solver: Solver, steps: int) -> None:
        self.counted = counted
        run = steps * (2 if solver.two_stages else 1)
        thresholds = min(THRESHOLDS, steps + 1)
        rungs = thresholds * len(LADDER) + EXTENSIONS + 1
        finalists = FINALISTS + 2  # with the plain solver and the parameter-free form
        near = 2 * 2 + 2
        fine = max(REFERENCE_SUBSTEPS * steps, REFERENCE_EVALUATIONS)
        self.stages = {
            "reference": 2 * QUESTIONS * ASKED_TWICE
            + SCREENED * run
            + fine * (3 * FEWEST + samples),
            "ladder": rungs * SCREENED * run,
            "thresholds": thresholds * PROMISING * run,
            "finalists": finalists * samples * run,
            "near": near * samples * run,
            "refined": REFINED * samples * run,
            "single steps": (finalists + near + REFINED) * samples * run,
        }
        self.left("reference")

    def left(self, stage: str) -> None:
        """Say that a stage begins."""
        names = list(self.stages)
        ahead = sum(self.stages[name] for name in names[names.index(stage) :])
        self.counted.most = self.counted.rows + ahead


def _reference(task: Task, steps: Sequence[Step], solver: Solver) -> tuple[Tensor, float]:
    """Return the fine solution at all levels, and its own error at the end over plain's.

    The error is measured on few samples, against a solution with half the step length.
    """
    few = task.rows(slice(FEWEST))
    substeps = max(REFERENCE_SUBSTEPS, -(-REFERENCE_EVALUATIONS // len(steps)))
    coarse, finer = (fine_path(few, n, solver)[-1] for n in (substeps, 2 * substeps))
    plain = float(distances(few, steps, [PLAIN], finer).values.mean())
    if not math.isfinite(plain):
        raise ValueError(NOT_FINITE)
    for refinement in range(REFINEMENTS + 1):
        error = float(norm(coarse - finer).mean())
        if error <= REFERENCE_ERROR * plain or refinement == REFINEMENTS:
            break
        substeps *= 2
        coarse, finer = finer, fine_path(few, 2 * substeps, solver)[-1]
    return fine_path(task, substeps, solver), error / plain if plain else 0.0


@dataclass
class _Trials:
    """Errors of settings, measured on demand."""

    task: Task
    steps: Sequence[Step]
    path: Tensor
    objective: str
    begin: Callable[[str], None] = lambda stage: None
    note: Callable[[Sequence[Trial]], None] | None = None
    values: dict[Guidance, Tensor] = field(default_factory=dict)
    """Values of the objective on the first samples, [n]."""

    @property
    def samples(self) -> int:
        return len(self.task.x)

    def measure(self, settings: Iterable[Guidance], samples: int) -> None:
        """Try these settings on that many samples, except where that was done."""
        waiting: dict[int, list[Guidance]] = {}
        for setting in dict.fromkeys(settings):
            known = len(self.values.get(setting, ()))
            if known < samples:
                waiting.setdefault(known, []).append(setting)
        for known, alike in waiting.items():
            part = slice(known, samples)
            task = self.task.rows(part)
            if self.objective == "end":
                found = distances(task, self.steps, alike, self.path[-1, part]).values
            else:
                found = step_errors(task, self.steps, alike, self.path[:, part]).sum(dim=1)
            for setting, values in zip(alike, found, strict=True):
                before = self.values.get(setting, values[:0])
                self.values[setting] = torch.cat([before, values])
        if self.note is not None and waiting:
            self.note((*self.all_of(), *self.screened()))

    def trial(self, setting: Guidance, step_ratio: float = math.nan) -> Trial:
        """Return the trial of a setting that was measured."""
        values = self.values[setting]
        plain = self.values[PLAIN][: len(values)]
        mean = float(plain.mean())
        if mean == 0:  # plain has no error to improve on
            ratio = 1.0 if float(values.mean()) == 0 else math.inf
            return Trial(setting, float(values.mean()), ratio, 0.0, step_ratio, len(values))
        ratio = float(values.mean()) / mean
        if not math.isfinite(ratio):
            return Trial(setting, math.inf, math.inf, 0.0, step_ratio, len(values))
        spread = float((values - ratio * plain).std()) / len(values) ** 0.5 / mean
        return Trial(setting, ratio * mean, ratio, spread, step_ratio, len(values))

    def all_of(self) -> list[Trial]:
        """Return the settings tried on all samples, by rising score."""
        full = [k for k, values in self.values.items() if len(values) == self.samples]
        return sorted(map(self.trial, full), key=lambda trial: trial.score)

    def screened(self) -> list[Trial]:
        """Return the settings tried on fewer samples, by rising score."""
        few = [k for k, values in self.values.items() if len(values) < self.samples]
        return sorted(map(self.trial, few), key=lambda trial: trial.score)

    def published(self) -> list[tuple[ERKGuidance, float]]:
        """Return the published forms among `all_of`, with their scores, by rising score."""
        return [(t.guidance, t.score) for t in self.all_of() if is_published(t.guidance)]


def _search(
    trials: _Trials, base: ERKGuidance, readings: list[float], others: Sequence[Guidance]
) -> None:
    """Try settings so that the best is among those tried on all samples.

    Args:
        trials: filled with the results.
        base: the candidates' bound and gate.
        readings: the median of the gate's readings at each step.
        others: further settings to try.
    """
    few = min(SCREENED, trials.samples)
    thresholds = _thresholds(readings)
    ladder = {w_con: list(LADDER) for w_con in thresholds}

    def setting(w_stiff: float, w_con: float) -> ERKGuidance:
        return replace(base, w_stiff=w_stiff, w_con=w_con)

    trials.begin("ladder")
    # Try a coarse ladder at every threshold on few samples; extend it where its end is its best.
    for _ in range(EXTENSIONS + 1):
        rungs = [setting(w_stiff, w_con) for w_con in thresholds for w_stiff in ladder[w_con]]
        trials.measure([PLAIN, *rungs], few)
        valleys = {
            w_con: _valley({w: trials.trial(setting(w, w_con)).score for w in ladder[w_con]}, RUNG)
            for w_con in thresholds
        }
        best = min(thresholds, key=lambda w_con: valleys[w_con].score)
        if valleys[best].inside:
            break
        ladder[best].append(_rounded(valleys[best].place))

    trials.begin("thresholds")
    # Try the best of each threshold on more samples, and the best of those on all samples.
    first = [setting(_rounded(valleys[w_con].place), w_con) for w_con in thresholds]
    trials.measure([PLAIN, *first], min(PROMISING, trials.samples))
    first = sorted(first, key=lambda s: trials.trial(s).score)[:FINALISTS]
    trials.begin("finalists")
    trials.measure([*others, *first], trials.samples)
    if not math.isfinite(trials.trial(PLAIN).error):
        raise ValueError(NOT_FINITE)

    trials.begin("near")
    # Near the best try stronger and weaker, and the gate half open at one step more or less.
    ranked = [(g, score) for g, score in trials.published() if g in first]
    close = [ranked[0][0]]
    close += [g for g, score in ranked[1:2] if score < ranked[0][1] + CLOSE]
    near = [
        setting(_rounded(g.w_stiff * factor), g.w_con)
        for g in close
        for factor in (BRACKET, 1 / BRACKET)
    ]
    top = close[0]
    halves = [
        max((r for r in readings if r <= top.w_con), default=None),
        min((r for r in readings if r > top.w_con), default=None),
    ]
    near += [setting(top.w_stiff, _rounded(r)) for r in halves if r is not None]
    trials.measure(near, trials.samples)
    trials.begin("refined")
    for _ in range(REFINED):
        ranked = trials.published()
        w_con = ranked[0][0].w_con
        known = {g.w_stiff: score for g, score in ranked if g.w_con == w_con}
        place = _rounded(_valley(known, BRACKET).place)
        if place in known:
            break
        trials.measure([setting(place, w_con)], trials.samples)


class _Valley(NamedTuple):
    """The best w_stiff."""

    place: float
    """The minimum of a parabola, or a value beyond the known ones if the best is at an end."""
    score: float
    """The lowest known score."""
    inside: bool
    """Whether `place` lies between known values."""


def _valley(known: dict[float, float], factor: float) -> _Valley:
    """Return the best w_stiff from scores; `factor` is how far to look beyond the ends."""
    places = sorted(known)
    k = min(range(len(places)), key=lambda i: known[places[i]])
    score = known[places[k]]
    if k in (0, len(places) - 1):
        beyond = places[k] * factor if k else places[k] / factor
        return _Valley(beyond, score, False)
    (x0, x1, x2), (y0, y1, y2) = (
        [f(v) for v in places[k - 1 : k + 2]] for f in (math.log, known.__getitem__)
    )
    if not math.isfinite(y0 + y2):
        return _Valley(places[k], score, True)
    curvature, slope, _ = np.polyfit([x0, x1, x2], [y0, y1, y2], 2)
    if not curvature > 1e-12 * abs(y1):  # flat
        return _Valley(places[k], score, True)
    return _Valley(math.exp(-slope / (2 * curvature)), score, True)


def _thresholds(readings: Sequence[float]) -> list[float]:
    """Return values of w_con that shut the gate at none of the steps, at one, at two, and so on.

    They lie between the medians of the gate's readings. There is one median for each step.
    """
    ordered = sorted(r for r in readings if r > 0)
    between = [_rounded(math.sqrt(a * b)) for a, b in pairwise(ordered) if b > 1.05 * a]
    if len(between) > THRESHOLDS - 1:
        every = (len(between) - 1) / (THRESHOLDS - 2)
        between = [between[round(k * every)] for k in range(THRESHOLDS - 1)]
    return [0.0, *dict.fromkeys(between)]


def _rounded(value: float) -> float:
    """Round to two digits, because further ones mean nothing."""
    return float(f"{value:.2g}")
