"""What the controls of the playground say, and the options of the command line that say the same.

Nothing in a `Choice` names a file: networks and files of settings are those that the command line
of the playground named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.seeds import STREAMS
from erk_guid.guidance import FORMS, ERKGuidance, Gate
from erk_guid.schedules import SCHEDULES
from erk_guid.solvers import SOLVERS, Heun, name_of

PLAIN, PUBLISHED = "none", "published"
GUIDANCE = (PLAIN, PUBLISHED, *FORMS)
"""Forms of guidance: none, the paper's with its settings, and those that a word stands for."""
GATES = get_args(Gate)
STEPS = 8
"""Steps that the page begins with."""
MOST_STEPS = 64
COUNT = 16
"""Images that the page begins with."""
MOST_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A source of fitted settings: solver, noise levels and guidance at once.

    Attributes:
        arguments: the options that name it.
        takes_steps: whether there is one for each number of steps.
    """

    arguments: tuple[str, ...]
    takes_steps: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a visitor chose.

    Attributes:
        solver: name of the solver.
        steps: noise levels.
        form: one of `GUIDANCE`.
        w_stiff, w_con, gate, bound: of the published form, see `ERKGuidance`.
        strength: of model guidance; 1 switches it off.
        eta: noise in each step.
        schedule: name of the spacing, or of a `Fit`. A fit also says which solver, eta and
            guidance.
        class_idx: this class only; None draws one for each seed.
        first_seed, count: which images.

    Raises:
        ErkGuidError: a value of another kind, or out of range.
    """

    solver: str = name_of(Heun())
    steps: int = STEPS
    form: str = PUBLISHED
    w_stiff: float = ERKGuidance.w_stiff
    w_con: float = ERKGuidance.w_con
    gate: str = ERKGuidance.gate
    bound: float | None = ERKGuidance.bound
    strength: float = GenerationConfig.guidance
    eta: float = 0.0
    schedule: str = str(GenerationConfig.schedule)
    class_idx: int | None = None
    first_seed: int = 0
    count: int = COUNT

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("form", GUIDANCE), ("gate", GATES)):
            _check_word(name, getattr(self, name), known)
        for name in ("w_stiff", "w_con", "strength", "eta"):
            _check_number(name, getattr(self, name))
        if self.bound is not None:
            _check_number("bound", self.bound)
        _check_whole("steps", self.steps, 1, MOST_STEPS)
        _check_whole("images", self.count, 1, MOST_IMAGES)
        _check_whole("first seed", self.first_seed, 0, STREAMS - self.count)
        if self.class_idx is not None:
            _check_whole("class", self.class_idx, 0, STREAMS)

    @property
    def seeds(self) -> range:
        """The seeds of the images."""
        return range(self.first_seed, self.first_seed + self.count)

    def arguments(self, guided: bool, fits: Mapping[str, Fit]) -> list[str]:
        """Return the options of the command line that ask for the same.

        Args:
            guided: whether there is a guiding network.
            fits: the sources of fitted settings by name.

        Raises:
            ErkGuidError: there is no such schedule, or a strength without a guiding network.
        """
        _check_word("schedule", self.schedule, (*SCHEDULES, *fits))
        if not guided and self.strength != 1:
            raise ErkGuidError(
                f"a strength of {self.strength:g} needs a guiding network: begin the playground "
                "with --gnet, or with a preset that has one"
            )
        model = [f"--guidance={number(self.strength)}"] if guided else []
        if self.class_idx is not None:
            model.append(f"--class={self.class_idx}")
        if self.schedule in fits:
            fit = fits[self.schedule]
            steps = [f"--steps={self.steps}"] if fit.takes_steps else []
            return [*model, *fit.arguments, *steps]
        spaced = [] if self.schedule == Choice.schedule else [f"--schedule={self.schedule}"]
        eta = [f"--eta={number(self.eta)}"] if self.eta else []
        sampler = [f"--solver={self.solver}", f"--steps={self.steps}", *spaced, *eta]
        return [*model, *sampler, *self._guidance()]

    def _guidance(self) -> list[str]:
        if self.form == PLAIN:
            return []
        if self.form in FORMS:
            return [f"--w_stiff={self.form}"]
        given = [f"--w_stiff={number(self.w_stiff)}", f"--w_con={number(self.w_con)}"]
        if self.gate != ERKGuidance.gate:
            given.append(f"--gate={self.gate}")
        if self.bound is not None:
            given.append(f"--bound={number(self.bound)}")
        return given


def number(value: float) -> str:
    """Return a number as short as it can be, so that it is read as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _check_word(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise ErkGuidError(
            f"{name} cannot be {printable(repr(value), 60)}; choose from {', '.join(known)}"
        )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ErkGuidError(f"{name} cannot be {printable(repr(value), 60)}; give a number")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ErkGuidError(
            f"{name} cannot be {printable(repr(value), 60)}; give a whole number of {low} to {high}"
        )
