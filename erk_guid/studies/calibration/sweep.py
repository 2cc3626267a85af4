"""Many settings of guidance in one run: what they have in common is computed once.

Two settings part at the first step that they correct differently. Before that, and for every
image whose gate is shut in both, they walk the same path, and the denoiser need not be asked
twice. `distances` walks all of them at once, as rows that split: the result is that of separate
runs of `erk_guid.sample`, for a fraction of the evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erk_guid.auto import improve
from erk_guid.denoisers import Denoiser
from erk_guid.guidance import Guidance, gauge, guide, measure, norm
from erk_guid.sampling import StepInfo, sample
from erk_guid.solvers import Solver
from erk_guid.steps import Step, StepResult

ConditionalDenoiser = Callable[..., Tensor]
"""``denoiser(x, sigma)``, or ``denoiser(x, sigma, labels)`` where there are labels."""


def in_batches(denoiser: ConditionalDenoiser, labels: Tensor | None, size: int) -> Denoiser:
    """A denoiser for as many rows as there are labels, called with `size` of them at a time."""

    @torch.no_grad()
    def denoise(x: Tensor, sigma: Tensor, /) -> Tensor:
        parts = []
        for i in range(0, len(x), size):
            part = slice(i, i + size)
            given = () if labels is None else (labels[part],)
            parts.append(denoiser(x[part], sigma, *given).to(x.dtype))
        return torch.cat(parts)

    return denoise


@dataclass(frozen=True)
class Task:
    """What is solved: a denoiser and where to start.

    Attributes:
        denoiser: called as ``denoiser(x, sigma)``, or with the labels of x's rows behind them.
        x: start points, [N, ...], already scaled by sigmas[0].
        labels: [N, ...], one row for each of x, or None.
        sigmas: noise levels, falling strictly to the last one above 0.
        batch: rows at a time that the denoiser is called with.
    """

    denoiser: ConditionalDenoiser
    x: Tensor
    labels: Tensor | None
    sigmas: Tensor
    batch: int

    def rows(self, chosen: slice | Tensor) -> Task:
        """The task for some of the samples."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, x=self.x[chosen], labels=labels)

    def on(self, owner: Tensor) -> Denoiser:
        """The denoiser for rows that belong to the samples `owner`."""
        labels = None if self.labels is None else self.labels[owner]
        return in_batches(self.denoiser, labels, self.batch)


class Distances(NamedTuple):
    """How far from the end points the settings led."""

    values: Tensor
    """Euclidean, [settings, samples], float64 on the CPU; NaN or inf where a run overflowed."""
    evaluations: int
    """Of the denoiser, counted per sample."""


class _Rows(NamedTuple):
    x: Tensor
    state: Any
    owner: Tensor
    """Whose path it is, [R]."""
    walks: Tensor
    """Which settings walk it, [R, settings] bool."""


@torch.no_grad()
def distances(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], ends: Tensor
) -> Distances:
    """Where all settings lead, as distances from `ends`.

    Args:
        task: what to solve.
        steps: one for each interval between its noise levels.
        settings: of guidance; `Guidance()` is the plain solver.
        ends: [N, ...], what the results are held against.
    """
    found = []
    evaluations = 0
    # A few samples at a time: their rows are as many as the settings, at most.
    for i in range(0, len(task.x), task.batch):
        part = slice(i, i + task.batch)
        values, spent = _walk(task.rows(part), steps, settings, ends[part])
        found.append(values)
        evaluations += spent
    return Distances(torch.cat(found, dim=1), evaluations)


@torch.no_grad()
def step_errors(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], path: Tensor
) -> Tensor:
    """How far one step from the exact solution leads away from it, [settings, steps, samples].

    Float64 on the CPU. Every step begins on the path, with the state (the companion that
    guidance needs, the past) that the step before it left behind there. The denoiser is asked as
    often as in one plain run, whatever the number of settings.

    Args:
        task, steps, settings: see `distances`.
        path: the exact solution at each of the noise levels, [levels, N, ...].
    """
    count = len(task.x)
    every = torch.arange(count, device=task.x.device)
    walks = torch.ones(count, len(settings), dtype=torch.bool, device=task.x.device)
    denoiser, sigmas, state = task.on(every), task.sigmas.to(task.x), None
    found = []
    for i, step in enumerate(steps):
        result, state = step(denoiser, path[i], sigmas[i], sigmas[i + 1], state)
        rows = _split(_Rows(path[i], None, every, walks), result, None, settings)
        found.append(_apart(rows, path[i + 1]))
    return torch.stack(found, dim=1)


@torch.no_grad()
def gauges(task: Task, steps: Sequence[Step], gate: str) -> Tensor:
    """What the gate reads in a plain run, [steps that have a pair, samples], on the CPU."""
    denoiser = task.on(torch.arange(len(task.x), device=task.x.device))
    x, sigmas, state = task.x, task.sigmas.to(task.x), None
    found = []
    for i, step in enumerate(steps):
        result, state = step(denoiser, x, sigmas[i], sigmas[i + 1], state)
        x = result.x
        if result.pair is not None:
            rho = measure(result.pair, Guidance()).stiffness
            found.append(gauge(rho, result.pair.h, gate).cpu())
    return torch.stack(found) if found else torch.empty(0, len(task.x))


@torch.no_grad()
def fine_path(task: Task, substeps: int, solver: Solver) -> Tensor:
    """x at each of the task's noise levels, [levels, N, ...], by small steps.

    Args:
        task: what to solve.
        substeps: to each interval, at equal distances in log sigma.
        solver: what takes them.
    """
    shares = torch.arange(substeps, dtype=torch.float64) / substeps
    levels = task.sigmas.double().cpu()
    fine = torch.cat([*(s * (t / s) ** shares for s, t in pairwise(levels)), levels[-1:]])
    path = [task.x]

    def note(info: StepInfo) -> None:
        if (info.step + 1) % substeps == 0:
            path.append(info.x)

    every = torch.arange(len(task.x), device=task.x.device)
    sample(task.on(every), task.x, fine, solver=solver, callback=note)
    return torch.stack(path)


def _walk(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], ends: Tensor
) -> tuple[Tensor, int]:
    count, device = len(task.x), task.x.device
    rows = _Rows(
        task.x, None, torch.arange(count, device=device),
        torch.ones(count, len(settings), dtype=torch.bool, device=device),
    )  # fmt: skip
    evaluations, sigmas = 0, task.sigmas.to(task.x)
    for i, step in enumerate(steps):
        denoiser = task.on(rows.owner)
        result, state = step(denoiser, rows.x, sigmas[i], sigmas[i + 1], rows.state)
        evaluations += result.evaluations * len(rows.x)
        rows = _split(rows, result, state, settings)
    return _apart(rows, ends), evaluations


def _apart(rows: _Rows, ends: Tensor) -> Tensor:
    """Distances from `ends` [N, ...], [settings, N], float64 on the CPU."""
    apart = norm(rows.x - ends[rows.owner]).cpu().double()
    row, setting = rows.walks.cpu().nonzero(as_tuple=True)
    values = torch.empty(rows.walks.shape[1], len(ends), dtype=torch.float64)
    values[setting, rows.owner.cpu()[row]] = apart[row]
    return values


def _split(rows: _Rows, result: StepResult, state: Any, settings: Sequence[Guidance]) -> _Rows:
    """One row for each result that the settings walking a row come to."""
    left = rows.walks.clone()
    branches: list[tuple[Tensor, Tensor]] = []  # x, which settings took it
    for alike in _alike(settings):
        first = settings[alike[0]]
        if first.blends and result.embedded is not None:
            moved, _ = improve(result.x, result.embedded)
            takes = torch.ones_like(left[:, alike])
        elif first.active and not first.blends and result.pair is not None:
            limit = result.spread() if first.bound is not None and result.spread else None
            # All at once as if the gate were open; then each setting's own gate.
            moved, measured = guide(result.x, result.pair, replace(first, w_con=0.0), limit)
            reading = gauge(measured.stiffness, result.pair.h, first.gate)
            thresholds = torch.tensor([settings[k].w_con for k in alike]).to(reading)
            takes = reading[:, None] > thresholds
        else:
            continue
        walks = torch.zeros_like(left)
        walks[:, alike] = rows.walks[:, alike] & takes
        left &= ~walks
        branches.append((moved, walks))
    branches.insert(0, (result.x, left))
    kept = [walks.any(dim=1).nonzero()[:, 0] for _, walks in branches]
    origin = torch.cat(kept)
    return _Rows(
        x=torch.cat([x[k] for (x, _), k in zip(branches, kept, strict=True)]),
        state=_choose(state, origin),
        owner=rows.owner[origin],
        walks=torch.cat([walks[k] for (_, walks), k in zip(branches, kept, strict=True)]),
    )


def _alike(settings: Sequence[Guidance]) -> list[list[int]]:
    """Places of the settings that differ in w_con alone, together."""
    groups: dict[Guidance, list[int]] = {}
    for k, setting in enumerate(settings):
        alike = setting if setting.blends else replace(setting, w_con=0.0)
        groups.setdefault(alike, []).append(k)
    return list(groups.values())


def _choose(state: Any, rows: Tensor) -> Any:
    """The rows of a step's state: tensors [R, ...] in (named) tuples, in any depth."""
    if isinstance(state, Tensor):
        return state[rows] if state.ndim else state
    if isinstance(state, tuple):
        parts = [_choose(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
