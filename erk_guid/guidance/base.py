"""The protocol of guidance: from what a step found to a better solution of that step."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from erk_guid.solvers.base import Solver, StepResult


class Guided(NamedTuple):
    """What guidance made of a step.

    Attributes:
        x: the solution at the end of the step, like the step's own.
        stiffness: rho per sample, [N], unit 1/sigma; None at steps without a pair.
        gate: whether the correction acts, [N] bool; None without a pair or without a gate.
        size: Euclidean norm of the correction, [N]; None at steps that are not corrected.
    """

    x: Tensor
    stiffness: Tensor | None = None
    gate: Tensor | None = None
    size: Tensor | None = None


@runtime_checkable
class Guidance(Protocol):
    """Corrects the solution of a step by what the step found. Costs no evaluation."""

    @property
    def active(self) -> bool:
        """True if anything is corrected at all."""

    def check(self, solver: Solver) -> None:
        """Refuse a solver whose steps do not have what is needed.

        Raises:
            ValueError: naming solvers that do.
        """

    def __call__(self, result: StepResult) -> Guided:
        """Return the corrected solution; the step's own where there is nothing to correct by."""
        ...
