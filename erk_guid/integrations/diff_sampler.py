"""The sampler functions of the diff-sampler toolbox, under its names and signatures.

In a checkout of that toolbox one line in ``solvers.py`` puts these in place of its own::

    from erk_guid.integrations.diff_sampler import *

Every function takes all options that the toolbox's driver passes; those that do not concern a
solver are ignored, and any other name is an error. ``w_stiff`` and ``w_con`` default to 0, as
there. Unlike the toolbox's, DPM-Solver++ and UniPC in data prediction do not threshold the
denoised images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erk_guid.guidance import Guidance
from erk_guid.multistep import DEIS, MultistepStep
from erk_guid.sampling import StepInfo, sample
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import Solver, make_solver
from erk_guid.steps import Step

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
    "lower_order_final", "variant", "deis_mode", "sigma_min", "sigma_max", "schedule_type",
    "schedule_rho", "t_steps", "nfe", "model_source", "prompt", "coeff_list",
})  # fmt: skip
"""What that toolbox's driver passes to every sampler."""

Sampled = Any
"""The end points, or with `return_inters` the trajectory, or with `return_eps` also the drifts."""


def _sampler(name: str, *takes: str) -> Callable[..., Sampled]:
    """The function for our solver `name`, which takes these of the toolbox's options."""

    def sampler(
        net: Any,
        latents: Tensor,
        class_labels: Tensor | None = None,
        condition: Any = None,
        unconditional_condition: Any = None,
        num_steps: int | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80,
        schedule_type: str = "polynomial",
        schedule_rho: float = 7,
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
            t_steps = _schedule(net, num_steps, sigma_min, sigma_max, schedule_type, schedule_rho)
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
            solver=_solver(name, {k: options.get(k) for k in takes}),
            guidance=Guidance(w_stiff, w_con),
            afs=afs,
            callback=remember if return_inters or return_eps else None,
        )  # fmt: skip
        if not return_inters and not return_eps:
            return found
        trajectory = torch.stack([x, *points])
        return (trajectory, torch.stack(drifts)) if return_eps else trajectory

    return sampler


def _schedule(
    net: Any, num_steps: int, sigma_min: float, sigma_max: float, kind: str, rho: float
) -> Tensor:
    if kind != "discrete":
        return make_sigmas(kind, num_steps, sigma_min, sigma_max, rho)[:-1]
    # Equal steps in the network's own time, which it turns into noise levels itself.
    first, last = (float(net.sigma_inv(s)) for s in (sigma_max, sigma_min))
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    times = (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return torch.as_tensor([float(net.sigma(t)) for t in times], dtype=torch.float64)


def _denoiser(
    net: Any, class_labels: Tensor | None, condition: Any, unconditional_condition: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    if hasattr(net, "guidance_type"):
        return lambda x, t: net(
            x, t, condition=condition, unconditional_condition=unconditional_condition
        )
    return lambda x, t: net(x, t, class_labels=class_labels)


_NAMES = {"max_order": "order"}
"""The toolbox's name of an option, and ours."""


def _solver(name: str, options: dict[str, Any]) -> Solver:
    coefficients = options.pop("coeff_list", None)
    solver = make_solver(name, **{_NAMES.get(k, k): v for k, v in options.items()})
    if coefficients is None:
        return solver
    assert isinstance(solver, DEIS)
    return _GivenDEIS(solver, coefficients)


@dataclass(frozen=True)
class _GivenDEIS:
    """DEIS with coefficients that were computed elsewhere; an empty list is an Euler step."""

    solver: DEIS
    coefficients: Sequence[Sequence[float]]
    has_pair = True
    blends = False

    def plan(self, levels: Sequence[float]) -> list[Step]:
        steps: list[Step] = []
        planned = self.solver.plan(levels)
        if len(self.coefficients) != len(planned):
            raise ValueError(
                f"coeff_list has {len(self.coefficients)} entries for {len(planned)} steps"
            )
        for own, given in zip(planned, self.coefficients, strict=True):
            assert isinstance(own, MultistepStep)
            weights = tuple(float(c) for c in given) or own.weights
            steps.append(MultistepStep(weights, pair_h=own.pair_h))
        return steps


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
