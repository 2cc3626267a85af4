"""Fitted levels as arguments of a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erk_guid.common.errors import printable
from erk_guid.generation.settings import Settings
from erk_guid.guidance import Guidance, settings_of
from erk_guid.integrations.diffusers.families import EDM
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE
from erk_guid.solvers import Modal, Solver, name_of
from erk_guid.studies.fitting import Fitted

SOLVERS = ("modal", "heun")
STEPPED_IN = "stepped_in"
"""Entry of `Settings.measured` that names the process in which the fit took its steps."""
FAMILY = "family"
"""Entry of `Settings.measured` that names the family of the pipeline that was fitted."""
RANGE = 1.01
"""How far fitted levels may reach above a model's highest noise level."""


@dataclass(frozen=True)
class PipelineFit:
    """What `fit` found for a pipeline.

    Attributes:
        fitted: levels, errors before and after, cost; see `erk_guid.studies.fitting.Fitted`.
        settings: the same as settings, for `for_pipeline`.
    """

    fitted: Fitted
    settings: Settings

    def write(self, path: str | Path) -> None:
        """Write the settings, for ``for_pipeline(pipe, settings=path)``."""
        self.settings.write(path)

    def __str__(self) -> str:
        return str(self.fitted)


def options_of_solver(solver: Solver, guidance: Guidance) -> dict[str, Any]:
    """Return a solver, and the guidance of Heun, as arguments of a scheduler."""
    if isinstance(solver, Modal):
        response = None if solver.response is None else list(solver.response)
        return {"modal_order": solver.order, "modal_response": response, "eta": solver.eta}
    return {k: v for k, v in settings_of(guidance).items() if v is not None}


def options_of_settings(settings: Settings, solver: str | None, family: str) -> dict[str, Any]:
    """Return the arguments of a scheduler that settings stand for."""
    made = settings.solver()
    name = name_of(made)
    if name not in SOLVERS:
        raise ValueError(
            f"the settings are for the solver {name!r}, which has no scheduler here; fit with "
            f"{' or '.join(SOLVERS)}"
        )
    if solver not in (None, name):
        raise ValueError(f"the settings are for the solver {name!r}, not {solver!r}")
    options = options_of_solver(made, settings.guidance)
    levels = settings.made_for.get("schedule")
    if isinstance(levels, (list, tuple)):
        if (settings.process is not None) != (family == "flow"):
            what = "sigmas" if settings.process is None else f"times of {settings.process}"
            raise ValueError(
                f"the settings hold {what}, and the pipeline's family is {family!r}; fit for this "
                "pipeline"
            )
        own = flow_process(made, settings.guidance) if family == "flow" else None
        if isinstance(own, VE) and settings.measured.get(STEPPED_IN) != repr(own):
            raise ValueError(
                f"the settings were fitted to {name!r} with steps in noise over signal, and this "
                "scheduler takes them in t; fit for this pipeline again"
            )
        of = settings.measured.get(FAMILY)
        if of is not None and of != family:
            raise ValueError(
                f"the settings were fitted to a pipeline of the family {printable(of, 20)!r}, "
                f"this one is of {family!r}; fit for this pipeline"
            )
        end = [0.0] if settings.made_for.get("denoise_to_zero", True) else []
        options["levels"] = [*levels, *end]
    return options


def check_range(scheduler: Any, levels: Sequence[float]) -> None:
    """Refuse levels that were fitted to a model with other noise levels.

    Raises:
        ValueError: they reach above what the model has been trained on, or do not begin where a
            pipeline over EDM's levels does.
    """
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is not None:
        highest = float(((1 - kept[-1]) / kept[-1]) ** 0.5)
    elif scheduler.name == EDM.name:
        highest = float(scheduler.config.sigma_max)
    else:
        return
    if scheduler.name == EDM.name and levels[0] < highest / RANGE:
        raise ValueError(
            f"the levels begin at {levels[0]:g}, and the pipeline's first noise is of size "
            f"{highest:g}: fit with that sigma_max, or for this pipeline"
        )
    if levels[0] > RANGE * highest:
        raise ValueError(
            f"the levels reach {levels[0]:g}, this model's noise only {highest:.3g}: they were "
            "fitted to another model; fit for this pipeline"
        )
