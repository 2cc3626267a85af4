"""The methods that are compared: our solvers, and diffusers' schedulers on the same problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.denoisers import Denoiser
from erk_guid.generation.settings import read_settings
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.sampling import sample
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import (
    DEIS,
    DPM2,
    IPNDM,
    IPNDMV,
    RES,
    DPMpp,
    Euler,
    Heun,
    Modal,
    Solver,
    UniPC,
)

SIGMA_DATA = 0.5
"""EDM schedulers scale inputs and outputs by it; it cancels."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One row of a table.

    Attributes:
        name: for the table.
        schedule: see `erk_guid.schedules.make_sigmas`.
        stages: evaluations per interval.
    """

    name: str
    schedule: str = "polynomial"
    stages: int = 1

    def sigmas(self, evaluations: int, sigma_min: float, sigma_max: float) -> Tensor:
        """Return noise levels for a number of evaluations, without a 0 at the end, float64."""
        levels = evaluations // self.stages + 1
        return make_sigmas(self.schedule, levels, sigma_min, sigma_max, 7)[:-1]

    def at(self, evaluations: int) -> Method | None:
        """Return the method for a number of evaluations; None where there is none."""
        return self

    def counts(self, limit: int) -> list[int]:
        """Return the numbers of evaluations, up to a limit, that a run can take; rising."""
        return list(range(2, limit + 1, self.stages))

    @abstractmethod
    def run(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
        """Return the end points.

        Raises:
            MissingExtraError: the package that runs it is not installed.
        """


@dataclass(frozen=True, kw_only=True)
class OurMethod(Method):
    """One of the package's solvers.

    Attributes:
        solver, guidance: see `erk_guid.sample`.
    """

    solver: Solver
    guidance: Guidance | None = None

    def run(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
        # Where one method fails, the others are compared all the same.
        return sample(
            denoiser, start, sigmas,
            solver=self.solver, guidance=self.guidance, check_finite=False,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FittedMethod(OurMethod):
    """One of the package's solvers at levels of its own, as `erk-guid fit` finds them.

    Attributes:
        levels: the noise levels.
    """

    levels: tuple[float, ...]

    def sigmas(self, evaluations: int, sigma_min: float, sigma_max: float) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class FittedRow(Method):
    """A row of fits, each for its own number of evaluations.

    Attributes:
        fits: the methods by evaluations.
    """

    fits: dict[int, FittedMethod]

    def at(self, evaluations: int) -> Method | None:
        return self.fits.get(evaluations)

    def counts(self, limit: int) -> list[int]:
        return sorted(count for count in self.fits if count <= limit)

    def run(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
        raise TypeError("a row of fits runs by the method of each number of evaluations")


def fitted_row(files: Sequence[Path], sigma_min: float, sigma_max: float) -> FittedRow:
    """Return the row of some settings files.

    Args:
        files: each for another number of evaluations.
        sigma_min, sigma_max: the range that the table is about.

    Raises:
        ErkGuidError: a file cannot be read.
        ValueError: it holds no noise levels, or those of another range.
    """
    fits: dict[int, FittedMethod] = {}
    for file in files:
        settings = read_settings(file)
        options = dict(settings.made_for)
        levels, to_zero = options.get("schedule"), options.get("denoise_to_zero", True)
        if not isinstance(levels, tuple) or "solver" not in options:
            raise ValueError(f"{file} holds no noise levels; 'erk-guid fit' writes such files")
        if to_zero or (levels[0], levels[-1]) != (sigma_max, sigma_min):
            raise ValueError(
                f"{file} goes from {levels[0]:g} to {0 if to_zero else levels[-1]:g}, the table "
                f"from {sigma_max:g} to {sigma_min:g}"
            )
        solver = settings.solver()
        if solver.noisy:
            raise ValueError(
                f"{file} adds noise (eta), and so solves another equation than the ODE"
            )
        count = (len(levels) - 1) * (2 if solver.two_stages else 1)
        guidance = settings.guidance if settings.guidance.active else None
        fits[count] = FittedMethod(
            name="fitted", solver=solver, guidance=guidance, levels=levels,
            stages=2 if solver.two_stages else 1,
        )  # fmt: skip
    return FittedRow(name="fitted", fits=fits)


@dataclass(frozen=True, kw_only=True)
class OutsideMethod(Method):
    """One of diffusers' schedulers.

    Attributes:
        scheduler: its class's name.
        options: its settings.
    """

    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
        return _run_outside(self.scheduler, self.options, denoiser, start, sigmas)


def _run_outside(
    name: str, options: dict[str, Any], denoiser: Denoiser, x: Tensor, sigmas: Tensor
) -> Tensor:
    """Run a diffusers scheduler over our noise levels, which replace its own."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers", "diffusers", "the check from outside") from error
    count = len(sigmas) - 1
    levels = sigmas.double().cpu()
    is_heun, is_edm = name == "HeunDiscreteScheduler", name.startswith("EDM")
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(count + 1 if is_heun else count)
    if is_heun:  # every level but the first is visited twice
        levels = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
    if len(scheduler.timesteps) < len(levels) - 1:
        raise RuntimeError(f"{name} made {len(scheduler.timesteps)} steps")  # no public interface
    scheduler.sigmas = levels
    # Discrete schedulers other than Heun's work on x scaled to unit variance.
    scaled = not is_edm and not is_heun

    def scale(sigma: Tensor) -> Tensor:
        return (1 + sigma**2).sqrt() if scaled else torch.ones_like(sigma)

    x = x / scale(levels[0]).to(x)
    for sigma, time in zip(levels[:-1].to(x), scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)  # not used, but step() requires the call
        at = x * scale(sigma)
        denoised = denoiser(at, sigma)
        if is_edm:  # undo the preconditioning that the scheduler will do
            total = sigma**2 + SIGMA_DATA**2
            output = (denoised - SIGMA_DATA**2 / total * at) / (sigma * SIGMA_DATA / total.sqrt())
        else:
            output = (at - denoised) / sigma
        x = scheduler.step(output, time, x).prev_sample
    return x * scale(levels[-1].to(x))


def _ours(
    name: str, solver: Solver, guidance: Guidance | None = None, schedule: str = "polynomial"
) -> Method:
    stages = 2 if solver.two_stages else 1
    return OurMethod(name=name, solver=solver, guidance=guidance, schedule=schedule, stages=stages)


def _outside(name: str, scheduler: str, stages: int = 1, **options: Any) -> Method:
    return OutsideMethod(
        name=f"diffusers {name}", scheduler=scheduler, options=options, stages=stages
    )


def _methods() -> list[Method]:
    auto = ParameterFreeGuidance()
    erk, erk_deis = ERKGuidance(0.408, 0), ERKGuidance(0.4, 0)
    return [
        _ours("euler", Euler()),
        _ours("heun", Heun()),
        _ours("heun + ERK 0.5/0.5", Heun(), ERKGuidance(0.5, 0.5)),
        _ours("heun + ERK auto", Heun(), auto),
        _ours("dpm2", DPM2()),
        _ours("dpm2 + ERK 0.408/0", DPM2(), erk),
        _ours("dpm2 + ERK 0.408/0 bound 0.2", DPM2(), replace(erk, bound=0.2)),
        _ours("dpm2 + ERK auto", DPM2(), auto),
        _ours("deis tab 3", DEIS(3)),
        _ours("deis tab 3 + ERK 0.4/0", DEIS(3), erk_deis),
        _ours("deis tab 3 + ERK 0.4/0 bound 0.2", DEIS(3), replace(erk_deis, bound=0.2)),
        _ours("deis tab 4", DEIS(4)),
        _ours("deis log 3", DEIS(3, "log")),
        _ours("ipndm 4", IPNDM(4)),
        _ours("ipndm_v 3", IPNDMV(3)),
        _ours("ipndm_v 4", IPNDMV(4)),
        _ours("dpmpp 2 data", DPMpp(2)),
        _ours("dpmpp 3 data", DPMpp(3)),
        _ours("dpmpp 3 noise", DPMpp(3, predict_x0=False)),
        _ours("unipc 3 data", UniPC(3)),
        _ours("unipc 3 noise", UniPC(3, predict_x0=False)),
        _ours("res 2", RES(2)),
        _ours("modal", Modal()),
        _ours("modal (logsnr)", Modal(), schedule="logsnr"),
        _ours("deis tab 4 (logsnr)", DEIS(4), schedule="logsnr"),
        _ours("deis log 3 (logsnr)", DEIS(3, "log"), schedule="logsnr"),
        _ours("ipndm_v 3 (logsnr)", IPNDMV(3), schedule="logsnr"),
        _ours("dpmpp 3 data (logsnr)", DPMpp(3), schedule="logsnr"),
        _ours("unipc 3 data (logsnr)", UniPC(3), schedule="logsnr"),
        _ours("res 2 (logsnr)", RES(2), schedule="logsnr"),
        _outside(
            "EDM Euler", "EDMEulerScheduler", sigma_data=SIGMA_DATA, prediction_type="epsilon"
        ),
        _outside("Heun", "HeunDiscreteScheduler", stages=2),
        _outside("DPM++ 2M", "DPMSolverMultistepScheduler", solver_order=2, lower_order_final=True),
        _outside("DPM++ 3M", "DPMSolverMultistepScheduler", solver_order=3, lower_order_final=True),
        _outside(
            "EDM DPM++ 2M", "EDMDPMSolverMultistepScheduler",
            solver_order=2, sigma_data=SIGMA_DATA, prediction_type="epsilon",
        ),
        _outside("DEIS 3", "DEISMultistepScheduler", solver_order=3),
        _outside("UniPC 3", "UniPCMultistepScheduler", solver_order=3),
    ]  # fmt: skip


METHODS: dict[str, Method] = {method.name: method for method in _methods()}
"""Methods by name, in the tables' order."""


def choose_methods(patterns: list[str], outside: bool = True) -> list[Method]:
    """Return the methods whose names begin with one of the patterns; all if there are none.

    Raises:
        ValueError: a pattern fits no method, or no method is left.
    """
    chosen: list[Method] = []
    matches: Callable[[str, str], bool] = lambda name, start: name.startswith(start)  # noqa: E731
    for pattern in patterns or [""]:
        found = [m for name, m in METHODS.items() if matches(name, pattern)]
        if not found:
            raise ValueError(f"no method begins with {pattern!r}; there are: {'; '.join(METHODS)}")
        chosen += [m for m in found if m not in chosen]
    kept = [m for m in chosen if outside or not isinstance(m, OutsideMethod)]
    if not kept:
        raise ValueError(f"{', '.join(patterns)}: only diffusers' own, and those are switched off")
    return kept
