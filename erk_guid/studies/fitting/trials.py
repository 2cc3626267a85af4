"""Runs of many plans on the same samples, which share what they have in common.

Two plans with the same first steps have the same states after them. So a run goes on from where it
first differs from the run before it that was kept. All runs share the evaluation at the first noise
level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser
from erk_guid.guidance import Guidance
from erk_guid.norms import norm
from erk_guid.solvers import Memory, Solver, Step, name_of, options_of
from erk_guid.studies.fitting.sweep import Task

DIFFERENCE = 0.03
"""Change of a parameter (a level's logarithm, a response) by which derivatives are measured."""
SMALL = 0.1
"""Part of the median error below which a sample's error counts no more when it shrinks."""


@dataclass(frozen=True)
class Method:
    """A solver with its guidance.

    Attributes:
        solver: the solver.
        guidance: as in `erk_guid.sample`, or None.
    """

    solver: Solver
    guidance: Guidance | None = None

    def __str__(self) -> str:
        shown = "".join(f" {name}={value}" for name, value in options_of(self.solver).items())
        return f"{name_of(self.solver)}{shown}" + (f", {self.guidance}" if self.guidance else "")

    def intervals(self, evaluations: int, to_zero: bool) -> int:
        """Return between how many intervals above 0 the evaluations can be divided.

        Args:
            evaluations: calls of the denoiser at most.
            to_zero: whether a last step to 0 takes one of them.
        """
        return (evaluations - to_zero) // (2 if self.solver.two_stages else 1)

    def plan(self, levels: Sequence[float], to_zero: bool) -> list[Step]:
        """Return the steps between these levels, and to 0 if asked for."""
        return self.solver.plan([*levels, 0.0] if to_zero else levels)


class State(NamedTuple):
    """Where a run is after a step."""

    x: Tensor
    memory: Memory | None


class Changed(NamedTuple):
    """A plan with one parameter changed."""

    plan: Sequence[Step]
    by: float
    """How much."""


class Slope(NamedTuple):
    """How the end points' errors change with the parameters, to first order.

    Attributes:
        errors: distance of the end points, per sample, [N], float64 on the CPU.
        gradient: of half the weighted sum of squared distances, [parameters].
        curvature: its Gauss-Newton matrix, [parameters, parameters].
    """

    errors: Tensor
    gradient: Tensor
    curvature: Tensor


@dataclass
class _FirstShared:
    """A denoiser that is called once at the first level, from the start points."""

    denoiser: Denoiser
    start: Tensor
    sigma: float
    found: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        first = float(sigma) == float(sigma.new_tensor(self.sigma)) and torch.equal(x, self.start)
        if not first:
            return self.denoiser(x, sigma)
        if self.found is None:
            self.found = self.denoiser(x, sigma)
        return self.found


@dataclass
class Trials:
    """Runs on the samples of a task.

    Attributes:
        task: denoiser, start points, labels and rows at a time; its levels are not used.
        ends: where the exact solution ends, like the task's x.
        name: of the samples.
    """

    task: Task
    ends: Tensor
    name: str = "all"
    _shared: dict[int, _FirstShared] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.task.x)

    def rows(self, chosen: slice, name: str) -> Trials:
        """Return the trials on some of the samples, under a name of their own."""
        return Trials(self.task.rows(chosen), self.ends[chosen], name)

    @torch.no_grad()
    def errors(self, steps: Sequence[Step], guidance: Guidance | None = None) -> Tensor:
        """Return the distances of a plan's end points, [N], float64 on the CPU."""
        return torch.cat(
            [
                _apart(self._run(part, steps, guidance)[-1].x, self.ends[part])
                for part in self._parts()
            ]
        )

    @torch.no_grad()
    def slope(
        self,
        steps: Sequence[Step],
        changed: Sequence[Changed],
        guidance: Guidance | None = None,
    ) -> Slope:
        """Return how a plan's errors change with each parameter.

        Samples weigh as one over their error: the sum of squares then falls as the mean error does.

        Args:
            steps: the plan.
            changed: the plan with each of the parameters changed.
            guidance: of all runs.
        """
        parts = []
        for part in self._parts():
            base = self._run(part, steps, guidance)
            apart = (base[-1].x - self.ends[part]).double().flatten(1)
            columns = []
            for plan, by in changed:
                end = self._run(part, plan, guidance, steps, base)[-1].x
                columns.append((end - base[-1].x).double().flatten(1) / by)
            moves = torch.stack(columns, dim=1)  # [rows, parameters, values]
            parts.append(
                (
                    apart.norm(dim=1).cpu(),
                    torch.einsum("npv,nv->np", moves, apart).cpu(),
                    torch.einsum("npv,nqv->npq", moves, moves).cpu(),
                )
            )
        errors, gradients, curvatures = (torch.cat(found) for found in zip(*parts, strict=True))
        weights = 1 / (errors + SMALL * errors.median())
        return Slope(
            errors,
            torch.einsum("n,np->p", weights, gradients) / weights.sum(),
            torch.einsum("n,npq->pq", weights, curvatures) / weights.sum(),
        )

    def _parts(self) -> Iterator[slice]:
        for i in range(0, len(self), self.task.batch):
            yield slice(i, min(i + self.task.batch, len(self)))

    def _run(
        self,
        part: slice,
        steps: Sequence[Step],
        guidance: Guidance | None,
        known: Sequence[Step] = (),
        states: Sequence[State] = (),
    ) -> list[State]:
        """Return the states after each step; those of the steps that `known` begins with too."""
        if part.start not in self._shared:
            task = self.task.rows(part)
            whole = task.on(torch.arange(len(task.x), device=task.x.device))
            self._shared[part.start] = _FirstShared(whole, task.x, steps[0].sigma)
        denoiser = self._shared[part.start]
        done = 0
        while done < min(len(known), len(steps)) and known[done] == steps[done]:
            done += 1
        found = list(states[:done])
        x, memory = found[-1] if found else State(denoiser.start, None)
        for step in steps[done:]:
            result, memory = step(denoiser, x, memory)
            x = result.x if guidance is None else guidance(result).x
            found.append(State(x, memory))
        return found


def _apart(x: Tensor, ends: Tensor) -> Tensor:
    return norm(x.double() - ends.double()).cpu()
