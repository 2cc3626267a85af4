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

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from erk_guid.guidance import Guidance
from erk_guid.processes import Process
from erk_guid.sampling import as_solver
from erk_guid.schedules import SIGMA_MIN
from erk_guid.solvers import DEIS, IPNDMV, DPMpp, Modal, Solver, UniPC
from erk_guid.studies.fitting.journal import Journal
from erk_guid.studies.fitting.problems import (
    REFERENCE_EVALUATIONS,
    Problem,
    Spacings,
    fine_solution,
)
from erk_guid.studies.fitting.results import Cost, Fitted
from erk_guid.studies.fitting.search import Search
from erk_guid.studies.fitting.sweep import ASKED_TWICE, QUESTIONS, Task, asked_levels
from erk_guid.studies.fitting.trials import Method, Trials

BEST = "best"
CANDIDATES: tuple[Solver, ...] = (
    Modal(), Modal(3), Modal(2), UniPC(3), UniPC(2), IPNDMV(3), DEIS(3, "log"), DPMpp(2),
)  # fmt: skip
"""Solvers among which `BEST` chooses: each was the best somewhere."""

FEWEST = 16
"""Fewest samples: a quarter to search, a quarter to choose, half to report."""
SEARCHED = 32
"""Most samples that are searched on, and that are chosen on."""
TRIALS = 60
"""Runs on all samples of the search that a fit may cost; `BEST` may cost three times that."""
BEST_TRIALS = 3 * TRIALS
RECOGNIZED = 5
"""Noise levels at which a journal knows its model again."""

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
            labels of x's rows. With model guidance, the guided one: `erk_guid.ModelGuidance`,
            with labels ``lambda x, sigma, y: ModelGuidance(partial(net, labels=y), guide, 3.0)(x,
            sigma)``.
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
    problem = Problem.of(
        denoiser, x, labels, sigma_min=sigma_min, sigma_max=sigma_max, floor=floor,
        process=process, more=dict(spacings or {}), batch=batch,
    )  # fmt: skip
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
    counted = replace(problem.task, denoiser=memory.counting(problem.task.denoiser))
    problem = replace(problem, task=counted)
    memory.report = None if progress is None else lambda done: progress(done, max(done, expected))
    began = time.monotonic()
    counted.check_denoiser()
    ends, own = fine_solution(problem, memory, max(evaluations), denoise_to_zero)
    of_reference = memory.spent
    whole = Trials(counted, ends)
    search = whole.rows(slice(0, quarter), "search")
    choice = whole.rows(slice(quarter, 2 * quarter), "choice")
    report = whole.rows(slice(2 * quarter, len(x)), "report")
    fitted = []
    for count in evaluations:
        before = memory.spent
        searching = Search(problem, memory, count, denoise_to_zero, search, choice, report)
        found = searching.fitted(*searching.run(methods, trials * count * len(search)), own)
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
