"""Sweep many settings of guidance in one run: compute once what they have in common.

Two settings follow the same path until the first step that they correct differently, and for every
image whose gate is shut in both. There one call of the denoiser serves both. `distances` follows
all settings at once, as rows that split. The results equal those of separate runs of
`erk_guid.sample`, for a fraction of the evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser, in_batches
from erk_guid.guidance import ERKGuidance, Guidance
from erk_guid.norms import norm
from erk_guid.sampling import StepInfo, sample
from erk_guid.solvers import Memory, Solver, Step, StepResult

ASKED_TWICE = 4
"""Samples whose answers are compared before a search."""
QUESTIONS = 16
"""Noise levels at which they are: about one for each factor of 2 between 80 and 0.002."""
ANSWERS_AGREE = 0.02
"""How far two answers to one question may be apart, as a share of them (half precision rounds)."""


def asked_levels(sigmas: Tensor, count: int) -> list[float]:
    """Return some noise levels, evenly spaced in log sigma over the range."""
    shares = torch.linspace(0, 1, count).tolist()
    return [float(sigmas[0]) ** (1 - s) * float(sigmas[-1]) ** s for s in shares]


@dataclass(frozen=True)
class Task:
    """A problem to solve: a denoiser and where to start.

    Attributes:
        denoiser: called as ``denoiser(x, sigma)``, or with the labels of x's rows after them.
        x: start points, [N, ...], already scaled by sigmas[0].
        labels: [N, ...], one row for each of x, or None.
        sigmas: noise levels, falling strictly to the last one above 0.
        batch: rows at a time that the denoiser is called with.
    """

    denoiser: Callable[..., Tensor]
    x: Tensor
    labels: Tensor | None
    sigmas: Tensor
    batch: int

    def rows(self, chosen: slice | Tensor) -> Task:
        """Return the task for some of the samples."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, x=self.x[chosen], labels=labels)

    def on(self, owner: Tensor) -> Denoiser:
        """Return the denoiser for rows that belong to the samples `owner`."""
        labels = None if self.labels is None else self.labels[owner]
        return in_batches(self.denoiser, labels, self.batch)

    @torch.no_grad()
    def check_denoiser(self) -> None:
        """Ask for a few samples twice, the second time in two parts.

        Answers that are not finite are let through: the search says where they come from.

        Raises:
            ValueError: the two answers differ. A search would measure chance.
        """
        few = self.x[:ASKED_TWICE]
        order = torch.arange(len(few), device=few.device)
        halves = order.split(max(1, len(order) // 2))
        for level in asked_levels(self.sigmas, QUESTIONS):
            sigma = torch.tensor(level, dtype=torch.float64)
            x = few * (level / float(self.sigmas[0]))
            once = self.on(order)(x, sigma).double()
            again = torch.cat([self.on(half)(x[half], sigma) for half in halves]).double()
            apart, size = float((again - once).norm()), float(once.norm())
            if not math.isfinite(apart) or apart <= ANSWERS_AGREE * size:
                continue
            raise ValueError(
                "the denoiser does not answer the same question twice alike: at sigma "
                f"{level:.3g} the two answers are {apart / size:.2g} of their size apart. It "
                "draws random numbers (a network with dropout in training mode, which needs "
                ".eval()), or what it gives for a sample depends on the others of the batch"
            )


class Distances(NamedTuple):
    """Distances of the settings' results from the end points."""

    values: Tensor
    """Euclidean, [settings, samples], float64 on the CPU; NaN or inf where a run overflowed."""
    nfe: int
    """Calls of the denoiser, counted per sample."""


class _Rows(NamedTuple):
    x: Tensor
    memory: Memory | None
    owner: Tensor
    """The sample that each row belongs to, [R]."""
    walks: Tensor
    """Which settings follow each row, [R, settings] bool."""


@torch.no_grad()
def distances(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], ends: Tensor
) -> Distances:
    """Compute the distances of all settings' results from `ends`.

    Args:
        task: what to solve.
        steps: one for each interval between its noise levels.
        settings: of guidance; `ERKGuidance()` is the plain solver.
        ends: [N, ...], what the results are compared with.
    """
    found = []
    nfe = 0
    # A few samples at a time: each becomes at most as many rows as there are settings.
    for i in range(0, len(task.x), task.batch):
        part = slice(i, i + task.batch)
        values, spent = _walk(task.rows(part), steps, settings, ends[part])
        found.append(values)
        nfe += spent
    return Distances(torch.cat(found, dim=1), nfe)


@torch.no_grad()
def step_errors(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], path: Tensor
) -> Tensor:
    """Compute the errors of single steps from the exact solution, [settings, steps, samples].

    The result is float64 on the CPU. Every step begins on the path, with the state (the companion
    that guidance needs, the past) that the step before it left there. The denoiser is called as
    often as in one plain run, for any number of settings.

    Args:
        task, steps, settings: see `distances`.
        path: the exact solution at each of the noise levels, [levels, N, ...].
    """
    count = len(task.x)
    every = torch.arange(count, device=task.x.device)
    walks = torch.ones(count, len(settings), dtype=torch.bool, device=task.x.device)
    denoiser = task.on(every)
    memory: Memory | None = None
    found = []
    for i, step in enumerate(steps):
        result, memory = step(denoiser, path[i], memory)
        rows = _split(_Rows(path[i], None, every, walks), result, None, settings)
        found.append(_apart(rows, path[i + 1]))
    return torch.stack(found, dim=1)


@torch.no_grad()
def readings(task: Task, steps: Sequence[Step], guidance: ERKGuidance) -> Tensor:
    """Return the gate's readings in a plain run, [steps that have a pair, samples], on the CPU."""
    denoiser = task.on(torch.arange(len(task.x), device=task.x.device))
    x = task.x
    memory: Memory | None = None
    found = []
    for step in steps:
        result, memory = step(denoiser, x, memory)
        x = result.x
        if result.pair is not None:
            rho = ERKGuidance().measure(result.pair).stiffness
            found.append(guidance.reading(rho, result.pair.h).cpu())
    return torch.stack(found) if found else torch.empty(0, len(task.x))


@torch.no_grad()
def fine_path(task: Task, substeps: int, solver: Solver) -> Tensor:
    """Return x at each of the task's noise levels, [levels, N, ...], by small steps.

    Args:
        task: what to solve.
        substeps: number of steps in each interval, at equal distances in log sigma.
        solver: the solver that takes them.
    """
    shares = torch.arange(substeps, dtype=torch.float64) / substeps
    levels = task.sigmas.double().cpu()
    fine = torch.cat([*(s * (t / s) ** shares for s, t in pairwise(levels)), levels[-1:]])
    path = [task.x]

    def note(info: StepInfo) -> None:
        if (info.step + 1) % substeps == 0:
            path.append(info.x)

    every = torch.arange(len(task.x), device=task.x.device)
    # Whoever asks tells a user what it means where this is not finite.
    sample(task.on(every), task.x, fine, solver=solver, callback=note, check_finite=False)
    return torch.stack(path)


def _walk(
    task: Task, steps: Sequence[Step], settings: Sequence[Guidance], ends: Tensor
) -> tuple[Tensor, int]:
    count, device = len(task.x), task.x.device
    rows = _Rows(
        task.x, None, torch.arange(count, device=device),
        torch.ones(count, len(settings), dtype=torch.bool, device=device),
    )  # fmt: skip
    nfe = 0
    for step in steps:
        result, memory = step(task.on(rows.owner), rows.x, rows.memory)
        nfe += result.nfe * len(rows.x)
        rows = _split(rows, result, memory, settings)
    return _apart(rows, ends), nfe


def _apart(rows: _Rows, ends: Tensor) -> Tensor:
    """Return the distances from `ends` [N, ...] as [settings, N], float64 on the CPU."""
    apart = norm(rows.x - ends[rows.owner]).cpu().double()
    row, setting = rows.walks.cpu().nonzero(as_tuple=True)
    values = torch.empty(rows.walks.shape[1], len(ends), dtype=torch.float64)
    values[setting, rows.owner.cpu()[row]] = apart[row]
    return values


def _split(
    rows: _Rows, result: StepResult, memory: Memory | None, settings: Sequence[Guidance]
) -> _Rows:
    """Return one row for each different result of the settings that follow a row."""
    left = rows.walks.clone()
    branches: list[tuple[Tensor, Tensor]] = []  # x, which settings took it
    for alike in _alike(settings):
        guidance = settings[alike[0]]
        guided = _opened(guidance)(result) if guidance.active else None
        if guided is None or guided.size is None:
            continue
        takes = torch.ones_like(left[:, alike])
        if isinstance(guidance, ERKGuidance) and result.pair is not None:
            assert guided.stiffness is not None
            reading = guidance.reading(guided.stiffness, result.pair.h)
            thresholds = torch.tensor([_threshold(settings[k]) for k in alike]).to(reading)
            takes = reading[:, None] > thresholds
        walks = torch.zeros_like(left)
        walks[:, alike] = rows.walks[:, alike] & takes
        left &= ~walks
        branches.append((guided.x, walks))
    branches.insert(0, (result.x, left))
    kept = [walks.any(dim=1).nonzero()[:, 0] for _, walks in branches]
    origin = torch.cat(kept)
    return _Rows(
        x=torch.cat([x[k] for (x, _), k in zip(branches, kept, strict=True)]),
        memory=None if memory is None else memory.rows(origin),
        owner=rows.owner[origin],
        walks=torch.cat([walks[k] for (_, walks), k in zip(branches, kept, strict=True)]),
    )


def _alike(settings: Sequence[Guidance]) -> list[list[int]]:
    """Group the indices of settings that differ in w_con alone."""
    groups: dict[Guidance, list[int]] = {}
    for k, setting in enumerate(settings):
        groups.setdefault(_opened(setting), []).append(k)
    return list(groups.values())


def _opened(setting: Guidance) -> Guidance:
    """Return the setting with its gate open: all that differ in w_con are computed at once."""
    return replace(setting, w_con=0.0) if isinstance(setting, ERKGuidance) else setting


def _threshold(setting: Guidance) -> float:
    assert isinstance(setting, ERKGuidance)
    return setting.w_con
