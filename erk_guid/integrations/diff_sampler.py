"""The sampler functions of the diff-sampler toolbox, under its names and signatures.

In a checkout of that toolbox, one line in ``solvers.py`` replaces its functions by these::

    from erk_guid.integrations.diff_sampler import *

Every function takes all options that the toolbox's driver passes. It ignores those that do not
concern its solver, and any other name is an error. ``w_stiff`` and ``w_con`` default to 0, as in
the toolbox. Also as there, DPM-Solver++ and UniPC in data prediction (predict_x0, the default)
limit denoised images by dynamic thresholding. The package's own solvers do so only on request
(`erk_guid.solvers.multistep.dynamic_threshold`).

``scripts/check_programs.py --diff-sampler CHECKOUT`` runs the toolbox's driver with its own
functions and with these, and compares the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from erk_guid.guidance import ERKGuidance
from erk_guid.sampling import StepInfo, sample
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import DEIS, DPMpp, Solver, UniPC, make_solver
from erk_guid.solvers.multistep import MultistepStep

__all__ = [
    "deis_sampler",
    "dpm_2_sampler",
    "dpm_pp_sampler",
    "euler_sampler",
    "heun_sampler",
    "ipndm_sampler",
    "ipndm_v_sampler",
    "unipc_sampler",
]

DRIVER_OPTIONS = frozenset({
    "w_stiff", "w_con", "r", "solver", "num_steps", "afs", "guidance_type", "guidance_rate",
    "denoise_to_zero", "return_inters", "use_fp16", "max_order", "predict_x0",
    "lower_order_final", "variant", "deis_mode", "model_path", "prompt", "sigma_min", "sigma_max",
    "schedule_type", "schedule_rho", "t_steps", "nfe", "model_source", "coeff_list",
})  # fmt: skip
"""Options that the toolbox's driver passes to every sampler."""


class ToolboxNetwork(Protocol):
    """A network of the toolbox: called with labels or conditions, and knows its own time."""

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at a time."""
        ...

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Return the time of a noise level."""
        ...


Sampled = Any
"""The end points. With `return_inters` the trajectory; with `return_eps` too (except UniPC), the
pair of trajectory and drifts."""


def _sampler(name: str, *takes: str) -> Callable[..., Sampled]:
    """Return the function for our solver `name`, which uses these of the toolbox's options."""

    def sampler(
        net: ToolboxNetwork,
        latents: Tensor,
        class_labels: Tensor | None = None,
        condition: Any = None,
        unconditional_condition: Any = None,
        num_steps: int | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80,
        schedule_type: str | None = "polynomial",
        schedule_rho: float | None = 7,
        afs: bool = False,
        denoise_to_zero: bool = False,
        return_inters: bool = False,
        return_eps: bool = False,
        t_steps: Tensor | Sequence[float] | None = None,
        *,
        w_stiff: float = 0.0,
        w_con: float = 0.0,
        **options: Any,
    ) -> Sampled:
        unknown = sorted(set(options) - DRIVER_OPTIONS)
        if unknown:
            raise TypeError(f"{sampler.__name__}() has no option {unknown[0]!r}")
        if t_steps is None:
            if num_steps is None:
                raise ValueError("give num_steps (how many noise levels) or t_steps")
            if schedule_type is None or schedule_rho is None:
                raise ValueError("give schedule_type and schedule_rho, or t_steps")
            t_steps = _schedule(
                net, num_steps, sigma_min, sigma_max, schedule_type, schedule_rho, latents.device
            )
        levels = torch.as_tensor(t_steps).detach().to("cpu", torch.float64)
        if denoise_to_zero:
            levels = torch.cat([levels, levels.new_zeros(1)])
        points: list[Tensor] = []
        drifts: list[Tensor] = []

        def remember(info: StepInfo) -> None:
            points.append(info.x)
            drifts.append((info.x_before - info.denoised) / info.sigma)

        x = latents * levels[0].to(latents)
        found = sample(
            _denoiser(net, class_labels, condition, unconditional_condition),
            x, levels,
            solver=_solver(name, {k: options.get(k) for k in takes}, x.dtype),
            guidance=ERKGuidance(w_stiff, w_con),
            afs=afs,
            callback=remember if return_inters else None,
        )  # fmt: skip
        if not return_inters:
            return found
        trajectory = torch.stack([x, *points])
        if not return_eps or name == "unipc":
            return trajectory
        # In the toolbox the step to 0 is a call of the network, and has no drift.
        return trajectory, torch.stack(drifts[:-1] if denoise_to_zero else drifts)

    return sampler


def _schedule(
    net: ToolboxNetwork,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    kind: str,
    rho: float,
    device: torch.device,
) -> Tensor:
    if kind != "discrete":
        return make_sigmas(kind, num_steps, sigma_min, sigma_max, rho)[:-1]
    # Equal steps in the network's own time; the network turns times into noise levels.
    # With rho other than 1 the toolbox's expression does not begin at sigma_max; it is kept.
    first, last = (
        float(net.sigma_inv(torch.tensor(float(s), device=device))) for s in (sigma_max, sigma_min)
    )
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    times = (first + ramp * (last ** (1 / rho) - first)) ** rho
    found = [float(net.sigma(t.to(device, torch.float32))) for t in times]
    return torch.as_tensor(found, dtype=torch.float64)


def _denoiser(
    net: ToolboxNetwork, class_labels: Tensor | None, condition: Any, unconditional_condition: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    if hasattr(net, "guidance_type"):
        return lambda x, t: net(
            x, t, condition=condition, unconditional_condition=unconditional_condition
        )
    return lambda x, t: net(x, t, class_labels=class_labels)


class _InFloat32:
    """Log-SNRs in float32, as the toolbox computes them in a float32 run.

    This moves the weights by up to 1e-6, which decides the last grey level of one pixel in a
    hundred. With the same rounding the images agree.
    """

    @staticmethod
    def _rounded(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).item()


class _DPMpp(_InFloat32, DPMpp):
    pass


class _UniPC(_InFloat32, UniPC):
    pass


_IN_FLOAT32: dict[str, Any] = {"dpmpp": _DPMpp, "unipc": _UniPC}

_NAMES = {"max_order": "order"}
"""The toolbox's name of an option, and ours."""


def _solver(name: str, options: dict[str, Any], dtype: torch.dtype) -> Solver:
    coefficients = options.pop("coeff_list", None)
    if "predict_x0" in options:
        options["threshold"] = options["predict_x0"] is not False
    solver = make_solver(name, **{_NAMES.get(k, k): v for k, v in options.items()})
    if dtype == torch.float32 and isinstance(solver, (DPMpp, UniPC)):
        settings = {field.name: getattr(solver, field.name) for field in fields(solver)}
        return _IN_FLOAT32[name](**settings)
    if coefficients is None:
        return solver
    assert isinstance(solver, DEIS)
    return _GivenDEIS(solver, coefficients)


@dataclass(frozen=True)
class _GivenDEIS(Solver):
    """DEIS with coefficients that were computed elsewhere; an empty list is an Euler step."""

    solver: DEIS
    coefficients: Sequence[Sequence[float]]

    has_pair = True

    def steps(self, levels: Sequence[float]) -> list[MultistepStep]:
        planned = self.solver.steps(levels)
        if len(self.coefficients) != len(planned):
            raise ValueError(
                f"coeff_list has {len(self.coefficients)} entries for {len(planned)} steps"
            )
        return [
            replace(own, weights=tuple(float(c) for c in given) or own.weights, lower=())
            for own, given in zip(planned, self.coefficients, strict=True)
        ]


euler_sampler = _sampler("euler")
heun_sampler = _sampler("heun")
dpm_2_sampler = _sampler("dpm2", "r")
ipndm_sampler = _sampler("ipndm", "max_order")
ipndm_v_sampler = _sampler("ipndm_v", "max_order")
deis_sampler = _sampler("deis", "max_order", "deis_mode", "coeff_list")
dpm_pp_sampler = _sampler("dpmpp", "max_order", "predict_x0", "lower_order_final")
unipc_sampler = _sampler("unipc", "max_order", "predict_x0", "variant", "lower_order_final")
for _name in __all__:
    globals()[_name].__name__ = globals()[_name].__qualname__ = _name
