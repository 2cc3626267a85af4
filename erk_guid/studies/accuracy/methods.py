"""The methods that are compared: our solvers, and diffusers' schedulers on the same problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.denoisers import Denoiser
from erk_guid.guidance import Guidance
from erk_guid.sampling import sample
from erk_guid.schedules import make_sigmas

SIGMA_DATA = 0.5
"""EDM schedulers scale by it on the way in and out; it cancels."""


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: for the table.
        solver, options, guidance: see `erk_guid.sample`.
        schedule: see `erk_guid.schedules.make_sigmas`.
        stages: evaluations an interval.
        outside: class name of a diffusers scheduler to run instead, with `options` its settings.
    """

    name: str
    solver: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)
    schedule: str = "polynomial"
    stages: int = 1
    outside: str | None = None

    def sigmas(self, evaluations: int, sigma_min: float, sigma_max: float) -> Tensor:
        """Noise levels for a number of evaluations, without a 0 at the end, float64."""
        levels = evaluations // self.stages + 1
        return make_sigmas(self.schedule, levels, sigma_min, sigma_max, 7)[:-1]

    def run(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
        """Where the method ends.

        Raises:
            MissingExtraError: it is diffusers', which is not installed.
        """
        if self.outside is None:
            return sample(
                denoiser, start, sigmas, solver=self.solver, guidance=self.guidance, **self.options
            )
        return _run_outside(self.outside, self.options, denoiser, start, sigmas)


def _run_outside(
    name: str, options: dict[str, Any], denoiser: Denoiser, x: Tensor, sigmas: Tensor
) -> Tensor:
    """A diffusers scheduler over our noise levels: theirs are overwritten, the rest is theirs."""
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
        raise RuntimeError(f"{name} made {len(scheduler.timesteps)} steps")  # not its interface
    scheduler.sigmas = levels
    # Discrete schedulers other than Heun's work on x scaled to unit variance.
    scaled = not is_edm and not is_heun

    def scale(sigma: Tensor) -> Tensor:
        return (1 + sigma**2).sqrt() if scaled else torch.ones_like(sigma)

    x = x / scale(levels[0]).to(x)
    for sigma, time in zip(levels[:-1].to(x), scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, time)  # the result is not wanted, but they insist
        at = x * scale(sigma)
        denoised = denoiser(at, sigma)
        if is_edm:  # undo the preconditioning that the scheduler will do
            total = sigma**2 + SIGMA_DATA**2
            output = (denoised - SIGMA_DATA**2 / total * at) / (sigma * SIGMA_DATA / total.sqrt())
        else:
            output = (at - denoised) / sigma
        x = scheduler.step(output, time, x).prev_sample
    return x * scale(levels[-1].to(x))


def _outside(name: str, scheduler: str, stages: int = 1, **options: Any) -> Method:
    return Method(f"diffusers {name}", outside=scheduler, options=options, stages=stages)


def _methods() -> list[Method]:
    auto = Guidance.auto()
    return [
        Method("euler", "euler"),
        Method("heun", "heun", stages=2),
        Method("heun + ERK 0.5/0.5", "heun", guidance=Guidance(0.5, 0.5), stages=2),
        Method("heun + ERK auto", "heun", guidance=auto, stages=2),
        Method("dpm2", "dpm2", stages=2),
        Method("dpm2 + ERK 0.408/0", "dpm2", guidance=Guidance(0.408, 0), stages=2),
        Method(
            "dpm2 + ERK 0.408/0 bound 0.2", "dpm2", guidance=Guidance(0.408, 0, bound=0.2), stages=2
        ),
        Method("dpm2 + ERK auto", "dpm2", guidance=auto, stages=2),
        Method("deis tab 3", "deis", {"order": 3}),
        Method("deis tab 3 + ERK 0.4/0", "deis", {"order": 3}, Guidance(0.4, 0)),
        Method(
            "deis tab 3 + ERK 0.4/0 bound 0.2", "deis", {"order": 3}, Guidance(0.4, 0, bound=0.2)
        ),
        Method("deis tab 4", "deis", {"order": 4}),
        Method("deis log 3", "deis", {"order": 3, "deis_mode": "log"}),
        Method("ipndm 4", "ipndm", {"order": 4}),
        Method("ipndm_v 3", "ipndm_v", {"order": 3}),
        Method("ipndm_v 4", "ipndm_v", {"order": 4}),
        Method("dpmpp 2 data", "dpmpp", {"order": 2}),
        Method("dpmpp 3 data", "dpmpp", {"order": 3}),
        Method("dpmpp 3 noise", "dpmpp", {"order": 3, "predict_x0": False}),
        Method("unipc 3 data", "unipc", {"order": 3}),
        Method("unipc 3 noise", "unipc", {"order": 3, "predict_x0": False}),
        Method("res 2", "res"),
        Method("modal", "modal"),
        Method("modal (logsnr)", "modal", schedule="logsnr"),
        Method("deis tab 4 (logsnr)", "deis", {"order": 4}, schedule="logsnr"),
        Method("deis log 3 (logsnr)", "deis", {"order": 3, "deis_mode": "log"}, schedule="logsnr"),
        Method("ipndm_v 3 (logsnr)", "ipndm_v", {"order": 3}, schedule="logsnr"),
        Method("dpmpp 3 data (logsnr)", "dpmpp", {"order": 3}, schedule="logsnr"),
        Method("unipc 3 data (logsnr)", "unipc", {"order": 3}, schedule="logsnr"),
        Method("res 2 (logsnr)", "res", schedule="logsnr"),
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
"""By name, in the tables' order."""


def choose_methods(patterns: list[str], outside: bool = True) -> list[Method]:
    """The methods whose names begin with one of the patterns; all for none.

    Raises:
        ValueError: a pattern that fits none.
    """
    chosen: list[Method] = []
    matches: Callable[[str, str], bool] = lambda name, start: name.startswith(start)  # noqa: E731
    for pattern in patterns or [""]:
        found = [m for name, m in METHODS.items() if matches(name, pattern)]
        if not found:
            raise ValueError(f"no method begins with {pattern!r}; there are: {'; '.join(METHODS)}")
        chosen += [m for m in found if m not in chosen]
    kept = [m for m in chosen if outside or m.outside is None]
    if not kept:
        raise ValueError(f"{', '.join(patterns)}: only diffusers' own, and those are switched off")
    return kept
