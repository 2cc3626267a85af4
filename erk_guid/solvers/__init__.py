"""Solvers of the probability-flow ODE, by class and by name.

`SOLVERS` is the one list of names. A solver of your own needs no entry there: pass an object to
`erk_guid.sample`. With an entry it is also an option of the command lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

from erk_guid.solvers.base import (
    AnalyticFirst,
    EulerStep,
    Evaluation,
    Memory,
    NoisyStep,
    Pair,
    Solver,
    Step,
    StepResult,
    check_levels,
    evaluate,
)
from erk_guid.solvers.deis import DEIS, IPNDM, IPNDMV
from erk_guid.solvers.dpmpp import DPMpp
from erk_guid.solvers.modal import Modal
from erk_guid.solvers.res import RES
from erk_guid.solvers.runge_kutta import DPM2, DPM2Step, Euler, Heun, HeunStep
from erk_guid.solvers.unipc import UniPC

__all__ = [
    "DEIS", "DPM2", "IPNDM", "IPNDMV", "RES", "SOLVERS", "AnalyticFirst", "DPM2Step", "DPMpp",
    "Euler", "EulerStep", "Evaluation", "Heun", "HeunStep", "Memory", "Modal", "NoisyStep", "Pair",
    "Solver", "Step", "StepResult", "UniPC", "check_levels", "evaluate", "make_solver", "name_of",
    "names_of_options", "names_of_solvers", "options_of", "record_of", "same_as_recorded",
]  # fmt: skip

SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "heun": Heun,
    "dpm2": DPM2,
    "deis": DEIS,
    "ipndm": IPNDM,
    "ipndm_v": IPNDMV,
    "dpmpp": DPMpp,
    "unipc": UniPC,
    "res": RES,
    "modal": Modal,
}
"""The solvers by name."""


def _fields(solver: Solver | type[Solver]) -> tuple[Field[Any], ...]:
    """Return a solver's options; one that is no dataclass has none."""
    return fields(solver) if is_dataclass(solver) else ()


def names_of_options() -> list[str]:
    """Return the names of the options that one or more of the solvers have."""
    return list(dict.fromkeys(field.name for kind in SOLVERS.values() for field in _fields(kind)))


def make_solver(name: str, **options: object) -> Solver:
    """Return the solver of that name; options that are None are left at its defaults.

    Raises:
        ValueError: there is no such solver, it has no such option, or a value is out of range.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(sorted(SOLVERS))}")
    kind = SOLVERS[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = [field.name for field in _fields(kind)]
    for option in given:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no options"
            having = [n for n, k in SOLVERS.items() if option in {f.name for f in _fields(k)}]
            if having:
                takes += f"; {option} is an option of {', '.join(having)}"
            raise ValueError(f"the solver {name!r} has no option {option!r}; {takes}")
    return kind(**given)


def name_of(solver: Solver) -> str:
    """Return the name of a solver's class in `SOLVERS`; of another class its own name."""
    kind = type(solver)
    return next((name for name, known in SOLVERS.items() if known is kind), kind.__name__)


def options_of(solver: Solver) -> dict[str, object]:
    """Return the options of a solver that are not at their defaults."""
    return {
        field.name: value
        for field in _fields(solver)
        if (value := getattr(solver, field.name)) != field.default
    }


def same_as_recorded(record: Mapping[str, object]) -> dict[str, object]:
    """Return a record of `record_of` with options at their defaults as None, as it writes them.

    Earlier records hold what the user typed, a default included. What is no record stays as it is.
    """
    kind = SOLVERS.get(str(record.get("solver")))
    if kind is None:
        return dict(record)
    defaults = {field.name: field.default for field in _fields(kind)}
    return {
        name: None if name in defaults and value == defaults[name] else value
        for name, value in record.items()
    }


def record_of(solver: Solver) -> dict[str, object]:
    """Return a solver as `make_solver` takes it: its name, and every option of any solver.

    Options at their defaults, and those of other solvers, are None.
    """
    return {
        "solver": name_of(solver), **dict.fromkeys(names_of_options()), **options_of(solver),
    }  # fmt: skip


def names_of_solvers(
    *, has_pair: bool = False, two_stages: bool = False, one_step: bool = False
) -> list[str]:
    """Return the names of the solvers that have what is asked for, sorted."""
    return sorted(
        name
        for name, kind in SOLVERS.items()
        if kind.has_pair >= has_pair and kind.two_stages >= two_stages and kind.one_step >= one_step
    )
