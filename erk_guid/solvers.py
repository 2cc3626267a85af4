"""The solvers by name: from options and noise levels to steps.

A solver is a frozen set of options. `plan(levels)` turns it into one step per interval, with all
weights computed on the host; a step is called as those of `erk_guid.steps` are, and keeps what
it needs of the past in the state that it returns.

One-step methods are here (Heun's step itself in `erk_guid.steps`; DPM-Solver-2 is Lu et al. 2022,
arXiv 2206.00927), those that remember earlier evaluations in `erk_guid.multistep`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from erk_guid.auto import Blend
from erk_guid.denoisers import Denoiser
from erk_guid.flow import check_times
from erk_guid.guidance import Guidance, Pair, norm
from erk_guid.multistep import DEIS, IPNDM, IPNDMV, RES, DPMpp, Modal, UniPC
from erk_guid.quadrature import modal_weights
from erk_guid.steps import EulerStep, HeunStep, Step, StepResult, evaluate

__all__ = [
    "DEIS", "DPM2", "IPNDM", "IPNDMV", "RES", "SOLVERS", "DPMpp", "Euler", "Heun", "Modal",
    "Solver", "UniPC", "make_solver",
]  # fmt: skip


@runtime_checkable
class Solver(Protocol):
    """What `erk_guid.sample` takes: something that plans its steps.

    A solver whose solution does not depend on what its steps remember (guidance may) can say so
    with ``one_step = True``: then noise may be added between steps, see `erk_guid.churn`.
    """

    @property
    def has_pair(self) -> bool:
        """Whether its steps carry an embedded pair to guide with."""

    @property
    def blends(self) -> bool:
        """Whether they carry what the parameter-free form needs."""

    def plan(self, levels: Sequence[float]) -> Sequence[Step]:
        """A step for each interval between the levels, which fall strictly and end above 0."""
        ...


# --- one-step methods -----------------------------------------------------------------------


@dataclass(frozen=True)
class Euler:
    """Order 1, one evaluation a step, no pair."""

    has_pair = False
    blends = False
    one_step = True

    def plan(self, levels: Sequence[float]) -> list[Step]:
        return [EulerStep()] * (len(levels) - 1)


@dataclass(frozen=True)
class Heun:
    """Order 2, two evaluations a step; the pair comes from the step before.

    Args:
        flow: the model is a flow-matching one, and levels are times: see `erk_guid.flow`. The
            parameter-free form has to know.
    """

    flow: bool = False
    has_pair = True
    blends = True
    one_step = True

    def plan(self, levels: Sequence[float]) -> list[Step]:
        if self.flow:
            check_times(levels)
            return [HeunStep(times=(s, t)) for s, t in pairwise(levels)]
        return [HeunStep(modal_weights((t, s), s, t)[0]) for s, t in pairwise(levels)]


@dataclass(frozen=True)
class DPM2Step:
    """Order 2: a midpoint at sigma' ^ r * sigma ^ (1 - r), two evaluations, a pair in each step.

    The pair's two points lie at two noise levels, sigma and the midpoint's.
    """

    r: float
    midpoint: float
    has_pair = True

    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None
    ) -> tuple[StepResult, None]:
        denoised, f = evaluate(denoiser, x, sigma)
        middle = torch.full_like(sigma, self.midpoint)
        x_middle = x + (middle - sigma) * f
        f_middle = evaluate(denoiser, x_middle, middle).drift
        slope = f_middle * (1 / (2 * self.r)) + f * (1 - 1 / (2 * self.r))
        pair = Pair(x, x_middle, f, f_middle, sigma - sigma_next)
        x_high = x + (sigma_next - sigma) * slope
        x_low = x + (sigma_next - sigma) * f
        embedded = Blend(
            x_high, x_low, f, f_middle, sigma_next / sigma, middle / sigma, 1 / (2 * self.r)
        )
        result = StepResult(x_high, denoised, f, 2, pair, lambda: norm(x_high - x_low), embedded)
        return result, None


@dataclass(frozen=True)
class DPM2:
    """DPM-Solver-2 (Lu et al. 2022)."""

    r: float = 0.5
    has_pair = True
    blends = True
    one_step = True

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and at most 1, got {self.r!r}")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        return [DPM2Step(self.r, t**self.r * s ** (1 - self.r)) for s, t in pairwise(levels)]


# --- by name --------------------------------------------------------------------------------

SOLVERS: dict[str, Callable[..., Solver]] = {
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
"""The solvers `erk_guid.sample` knows by name."""

OPTION_NAMES = {"deis_mode": "mode"}
"""Option to field, where a field's name says less on its own."""


def make_solver(name: str, **options: Any) -> Solver:
    """A solver by name; options that are None are left at its defaults.

    Raises:
        ValueError: there is no such solver, it has no such option, or a value is out of range.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(sorted(SOLVERS))}")
    kind: Any = SOLVERS[name]
    public = {field: option for option, field in OPTION_NAMES.items()}
    known = [public.get(f.name, f.name) for f in dataclasses.fields(kind)]
    fields = {}
    for option, value in options.items():
        if value is None:
            continue
        if option not in known:
            # flow is for programs: the command lines, where this is read, sample EDM's networks.
            listed = ", ".join(name for name in known if name != "flow")
            takes = f"it takes {listed}" if listed else "it takes no options"
            raise ValueError(f"the solver {name!r} has no option {option!r}; {takes}")
        fields[OPTION_NAMES.get(option, option)] = value
    solver: Solver = kind(**fields)
    return solver


_MEMBERS = {"solver": ("has_pair", "blends", "plan"), "step": ("has_pair", "__call__")}


def check_solver(solver: Any) -> None:
    """Refuse what is neither a solver nor a step.

    Raises:
        TypeError: naming what it lacks.
    """
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; make one: {solver.__name__}()")
    kind = "solver" if hasattr(solver, "plan") or not callable(solver) else "step"
    missing = [name for name in _MEMBERS[kind] if not hasattr(solver, name)]
    if missing:
        raise TypeError(
            f"solver must be a name, a solver or a step; {type(solver).__name__} lacks "
            f"{', '.join(missing)} of the protocol of a {kind} (erk_guid.solvers.Solver, "
            "erk_guid.Step)"
        )


def churned_solvers() -> list[str]:
    """Names of the solvers between whose steps noise may be added."""
    return [name for name, kind in sorted(SOLVERS.items()) if getattr(kind, "one_step", False)]


def guided_solvers() -> list[str]:
    """Names of the solvers that have an embedded pair."""
    return [name for name, kind in sorted(SOLVERS.items()) if kind.has_pair]  # type: ignore[attr-defined]


def blended_solvers() -> list[str]:
    """Names of the solvers that the parameter-free form knows."""
    return [name for name, kind in sorted(SOLVERS.items()) if kind.blends]  # type: ignore[attr-defined]


def check_guidance(guidance: Guidance, solver: Any, name: str) -> None:
    """Whether a solver (or a step) can be guided that way.

    Raises:
        ValueError: it cannot; the message lists those that can.
    """
    if guidance.blends:
        if not getattr(solver, "blends", False):
            raise ValueError(
                f"{name} has no parameter-free form; solvers that have one: "
                f"{', '.join(blended_solvers())}"
            )
    elif guidance.active and not solver.has_pair:
        raise ValueError(
            f"{name} has no embedded pair to guide with (w_stiff {guidance.w_stiff}); solvers "
            f"that have one: {', '.join(guided_solvers())}"
        )
