"""Settings of ERK guidance for one's own model, solver and noise levels, in minutes.

The paper leaves w_stiff and w_con to a sweep of 50,000-image FID runs for each model and step
count. Here a few dozen images are solved finely, and what is looked for is the setting that ends
nearest to them from the same noise. That is fidelity to the ODE. It is not FID, nor what
FD-DINOv2 likes, which may prefer images that are sharper than the ODE's.

How evaluations of the network are saved:

- all settings of a round are walked together and share what they have in common
  (`erk_guid.studies.calibration.sweep`);
- w_con matters only by the steps at which it opens the gate, so one value between the stiffness
  of each step and the next stands for all;
- a coarse ladder of w_stiff is tried on a few images; on all of them only what did best there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.guidance import GATES, Guidance, norm
from erk_guid.multistep import Modal
from erk_guid.sampling import check_levels, plan_steps
from erk_guid.solvers import Solver, check_guidance, make_solver
from erk_guid.steps import Step
from erk_guid.studies.calibration.sweep import (
    ConditionalDenoiser,
    Task,
    distances,
    fine_path,
    gauges,
    step_errors,
)

OBJECTIVES = ("end", "steps")

FEWEST = 4
"""Samples that are needed to judge at all."""
SCREENED = 8
"""Samples that the ladder is tried on."""
PROMISING = 24
"""Samples that the best of the ladder at each threshold is tried on."""
LADDER = (0.2, 0.3, 0.45, 0.67, 1.0, 1.5, 2.25)
RUNG = 1.5
EXTENSIONS = 4
"""Rungs added at most where the ladder ends on its best."""
THRESHOLDS = 12
"""Values of w_con tried, at most."""
FINALISTS = 4
"""Values of w_con that are tried on all samples."""
BRACKET = 1.15
"""Factor between neighbours when w_stiff is refined."""
CLOSE = 0.02
"""Ratios that differ by less may change places when w_stiff is refined."""
REFINED = 3
"""Further values of w_stiff, at most."""
CAUTION = 2.0
"""Standard errors that a setting is charged when it is compared with others."""
CERTAINTY = 3.0
"""Standard errors by which settings must beat the plain solver to be recommended."""
ROUNDING = 10.0
"""Multiple of the start points' rounding that errors must exceed to mean anything."""

REFERENCE_EVALUATIONS = 42
REFERENCE_SUBSTEPS = 4
"""Of the fine solution: evaluations in all, and in each interval, at least."""
REFERENCE_ERROR = 0.03
"""It is refined, twice at most, until its own error is below this multiple of plain's."""
REFINEMENTS = 2

NOT_FINITE = "the plain solver does not end at finite values; look at the denoiser"


@dataclass(frozen=True)
class Trial:
    """What one setting did.

    Attributes:
        guidance: the setting.
        error: mean over the samples of the objective.
        ratio: that over the plain solver's on the same samples.
        ratio_error: standard error of `ratio`; the samples are the same, so that it is small.
        step_ratio: the error of single steps from the exact solution, summed over the steps, over
            the plain solver's; nan where it was not computed.
        samples: how many.
    """

    guidance: Guidance
    error: float
    ratio: float
    ratio_error: float
    step_ratio: float
    samples: int

    @property
    def score(self) -> float:
        """What settings are ranked by: the ratio and two of its standard errors.

        The best of many noisy means is the luckiest; and a setting whose errors scatter ruins
        some images even if it is good for most.
        """
        return self.ratio + CAUTION * self.ratio_error


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        guidance: the recommendation: the setting with the least `score`, or `Guidance()`, no
            guidance, if its error is not below the plain solver's by three standard errors.
        trials: all settings that were tried; those on all samples first, each by rising score.
        objective: "end" or "steps".
        reference_error: estimate of the fine solution's own error at the end, as a multiple of
            the plain solver's.
        evaluations: of the denoiser, counted per sample.
    """

    guidance: Guidance
    trials: tuple[Trial, ...]
    objective: str
    reference_error: float
    evaluations: int

    @property
    def chosen(self) -> Trial:
        """The trial of the recommendation."""
        return self.trial(self.guidance)

    @property
    def plain(self) -> Trial:
        """The plain solver's trial."""
        return self.trial(Guidance())

    def trial(self, guidance: Guidance) -> Trial:
        """The trial of one of the settings.

        Raises:
            KeyError: it was not tried.
        """
        for trial in self.trials:
            if trial.guidance == guidance:
                return trial
        raise KeyError(guidance)

    def table(self, rows: int = 12) -> str:
        """The trials on all samples as Markdown, best first, the plain solver among them."""
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
            strength = "auto" if g.blends else f"{g.w_stiff:g}"
            threshold = "" if g.blends or not g.active else f"{g.w_con:g}"
            spread = f" ± {trial.ratio_error:.3f}" if trial != self.plain else ""
            cells = (strength, threshold, f"{trial.error:.4g}", f"{trial.ratio:.3f}")
            marked = " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in cells)
            lines.append(f"| {marked}{spread} | {trial.step_ratio:.3f} |")
        return "\n".join(lines) + "\n"


def calibrate(
    denoiser: ConditionalDenoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    solver: str | Solver | Step = "heun",
    objective: str = OBJECTIVES[0],
    auto: bool = True,
    bound: float | None = None,
    gate: str = GATES[0],
    batch: int = 32,
) -> Calibration:
    """Look for the settings of guidance that keep nearest to the ODE's solution.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, or with the labels of x's rows behind them:
            ``denoiser(x, sigma, labels)``. Rows come in another order than in `x`, and more than
            once, so that a denoiser that has labels must take them from there.
        x: where to start, [N, ...], already scaled by ``sigmas[0]``; 64 samples serve well.
        sigmas: the noise levels, as in `erk_guid.sample`. The step to a trailing 0 is not guided,
            and left out.
        labels: one row for each of x's, or None.
        solver: "heun", "dpm2", "deis", or one with its options (`erk_guid.solvers`), such as
            ``Heun(flow=True)`` for a flow-matching model.
        objective: "end": the distance of the end points. "steps": the errors of single steps
            from the exact solution, summed over the steps. The first also rewards a step that
            makes up for the errors of those before it.
        auto: whether the parameter-free form is among the candidates, where the solver has it.
        bound, gate: see `Guidance`; the same for all candidates.
        batch: samples at a time.

    Returns:
        The recommendation, in `guidance`, and what was tried.

    Raises:
        ValueError: too few samples or levels, a solver without a pair, an unknown objective, or
            a denoiser whose solutions are not finite.
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
    if isinstance(solver, str):
        solver = make_solver(solver)
    base = Guidance(w_stiff=1.0, w_con=0.0, bound=bound, gate=gate)
    check_guidance(base, solver, type(solver).__name__)
    levels = [level for level in check_levels(sigmas) if level > 0]
    steps = plan_steps(solver, levels)
    counted = _Counted(denoiser)
    task = Task(counted, x, labels, torch.tensor(levels, dtype=torch.float64), batch)

    readings = gauges(task.rows(slice(SCREENED)), steps, gate)
    if not len(readings):
        raise ValueError(
            f"no step between {len(levels)} noise levels above 0 has a pair to guide with; Heun "
            "needs three levels"
        )
    path, reference_error = _reference(task, steps, Modal(flow=getattr(solver, "flow", False)))
    trials = _Trials(task, steps, path, objective)
    others = [Guidance()]
    if auto and getattr(solver, "blends", False):
        others.append(Guidance.auto())
    _search(trials, base, readings.median(dim=1).values.tolist(), others)

    final = [trial.guidance for trial in trials.all_of()]
    single = step_errors(task, steps, final, path).sum(dim=1).mean(dim=1)
    plain = float(single[final.index(Guidance())])
    found = [
        trials.trial(setting, float(error) / plain if plain else math.nan)
        for setting, error in zip(final, single, strict=True)
    ]
    best = found[0]
    certain = best.ratio + CERTAINTY * best.ratio_error < 1
    # Where the plain solver errs by no more than rounding does, there is nothing to judge by.
    rounding = ROUNDING * torch.finfo(x.dtype).eps * float(norm(x).mean())
    certain = certain and trials.trial(Guidance()).error > rounding
    screened = [trials.trial(setting) for setting in trials.values if setting not in final]
    return Calibration(
        guidance=best.guidance if certain else Guidance(),
        trials=(*found, *sorted(screened, key=lambda trial: trial.score)),
        objective=objective,
        reference_error=reference_error,
        evaluations=counted.rows,
    )


@dataclass
class _Counted:
    """The denoiser, and how many samples it was given."""

    denoiser: ConditionalDenoiser
    rows: int = 0

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        self.rows += len(x)
        return self.denoiser(x, *rest)


def _reference(task: Task, steps: Sequence[Step], solver: Solver) -> tuple[Tensor, float]:
    """The fine solution at all levels, and its own error at the end over the plain solver's.

    It is judged on few samples, by one of half the step length.
    """
    few = task.rows(slice(FEWEST))
    substeps = max(REFERENCE_SUBSTEPS, -(-REFERENCE_EVALUATIONS // len(steps)))
    coarse, finer = (fine_path(few, n, solver)[-1] for n in (substeps, 2 * substeps))
    plain = float(distances(few, steps, [Guidance()], finer).values.mean())
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
    """Errors of settings, measured when they are asked for."""

    task: Task
    steps: Sequence[Step]
    path: Tensor
    objective: str
    values: dict[Guidance, Tensor] = field(default_factory=dict)
    """Of the objective, on the first samples, [n]."""

    @property
    def samples(self) -> int:
        return len(self.task.x)

    def measure(self, settings: Iterable[Guidance], samples: int) -> None:
        """See to it that these settings were tried on that many samples."""
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

    def trial(self, setting: Guidance, step_ratio: float = math.nan) -> Trial:
        """What is known of a setting that was measured."""
        values = self.values[setting]
        plain = self.values[Guidance()][: len(values)]
        mean = float(plain.mean())
        if mean == 0:  # nothing to be better than
            ratio = 1.0 if float(values.mean()) == 0 else math.inf
            return Trial(setting, float(values.mean()), ratio, 0.0, step_ratio, len(values))
        ratio = float(values.mean()) / mean
        if not math.isfinite(ratio):
            return Trial(setting, math.inf, math.inf, 0.0, step_ratio, len(values))
        spread = float((values - ratio * plain).std()) / len(values) ** 0.5 / mean
        return Trial(setting, ratio * mean, ratio, spread, step_ratio, len(values))

    def all_of(self, w_con: float | None = None) -> list[Trial]:
        """The settings tried on all samples, by rising score; of one w_con if that is given."""
        chosen = [
            self.trial(setting)
            for setting, values in self.values.items()
            if len(values) == self.samples
            and (
                w_con is None or (setting.active and not setting.blends and setting.w_con == w_con)
            )
        ]
        return sorted(chosen, key=lambda trial: trial.score)


def _search(
    trials: _Trials, base: Guidance, readings: list[float], others: Sequence[Guidance]
) -> None:
    """Try settings, so that the best is among those tried on all samples.

    Args:
        trials: to be filled.
        base: the candidates' bound and gate.
        readings: what the gate reads at each step, by the median.
        others: settings to try besides.
    """
    few = min(SCREENED, trials.samples)
    thresholds = _thresholds(readings)
    ladder = {w_con: list(LADDER) for w_con in thresholds}

    def setting(w_stiff: float, w_con: float) -> Guidance:
        return replace(base, w_stiff=w_stiff, w_con=w_con)

    # A coarse ladder at every threshold on few samples, longer where it ends on its best.
    for _ in range(EXTENSIONS + 1):
        rungs = [setting(w_stiff, w_con) for w_con in thresholds for w_stiff in ladder[w_con]]
        trials.measure([Guidance(), *rungs], few)
        valleys = {
            w_con: _valley({w: trials.trial(setting(w, w_con)).score for w in ladder[w_con]}, RUNG)
            for w_con in thresholds
        }
        best = min(thresholds, key=lambda w_con: valleys[w_con].score)
        if valleys[best].inside:
            break
        ladder[best].append(_rounded(valleys[best].place))

    # What that says is best at each threshold, on more; and the best of those on all of them.
    first = [setting(_rounded(valleys[w_con].place), w_con) for w_con in thresholds]
    trials.measure([Guidance(), *first], min(PROMISING, trials.samples))
    first = sorted(first, key=lambda s: trials.trial(s).score)[:FINALISTS]
    trials.measure([*others, *first], trials.samples)
    if not math.isfinite(trials.trial(Guidance()).error):
        raise ValueError(NOT_FINITE)

    # Near the best: stronger and weaker, and the gate half open at one step more or one less.
    ranked = [t for t in trials.all_of() if t.guidance in first]
    close = [ranked[0].guidance]
    close += [t.guidance for t in ranked[1:2] if t.score < ranked[0].score + CLOSE]
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
    for _ in range(REFINED):
        ranked = [t for t in trials.all_of() if t.guidance.active and not t.guidance.blends]
        w_con = ranked[0].guidance.w_con
        known = {t.guidance.w_stiff: t.score for t in trials.all_of(w_con)}
        place = _rounded(_valley(known, BRACKET).place)
        if place in known:
            break
        trials.measure([setting(place, w_con)], trials.samples)


class _Valley(NamedTuple):
    """Where w_stiff does best."""

    place: float
    """By a parabola; or, where the best known is the largest or the least, beyond it."""
    score: float
    """Least known."""
    inside: bool
    """Whether it lies between known ones."""


def _valley(known: dict[float, float], factor: float) -> _Valley:
    """From scores by w_stiff; `factor` is how far to look beyond the ends."""
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
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if left == right:  # level
        return _Valley(places[k], score, True)
    vertex = x1 - ((x1 - x0) * left - (x1 - x2) * right) / (2 * (left - right))
    return _Valley(math.exp(vertex), score, True)


def _thresholds(readings: Sequence[float]) -> list[float]:
    """Values of w_con that shut the gate at none of the steps, at one, at two, and so on.

    Between the medians of the gate's readings, of which there is one for each step.
    """
    ordered = sorted(r for r in readings if r > 0)
    between = [_rounded(math.sqrt(a * b)) for a, b in pairwise(ordered) if b > 1.05 * a]
    if len(between) > THRESHOLDS - 1:
        every = (len(between) - 1) / (THRESHOLDS - 2)
        between = [between[round(k * every)] for k in range(THRESHOLDS - 1)]
    return [0.0, *dict.fromkeys(between)]


def _rounded(value: float) -> float:
    """To two digits: more would not be meant."""
    return float(f"{value:.2g}")
