"""The function that ComfyUI calls for every sampler of this package, and its dropdown's entries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erk_guid.guidance import Guidance, ParameterFreeGuidance
from erk_guid.integrations.comfyui.kinds import DETECT, process_for
from erk_guid.integrations.comfyui.program import module
from erk_guid.integrations.k_diffusion import run
from erk_guid.processes import Process
from erk_guid.sampling import StepInfo
from erk_guid.solvers import DPM2, Heun, Modal, Solver

NEXT_STREAM = 0x9E3779B97F4A7C15
"""Added to a seed for noise that has nothing to do with the first one."""
Record = Callable[[StepInfo, Process | None], None]
"""Called after each step, with the process whose times the step's levels are."""


@torch.no_grad()
def sample_in_comfyui(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    solver: Solver,
    guidance: Guidance | None = None,
    model_type: str = DETECT,
    record: Record | None = None,
) -> Tensor:
    """Sample for the model's kind of x.

    Args:
        model, x, sigmas, extra_args, callback, disable: as ComfyUI's KSAMPLER calls samplers.
        solver, guidance: the method; noise of a solver with `eta` is drawn by the node's seed.
        model_type: one of `MODEL_TYPES`.
        record: told of each step.
    """
    process = process_for(solver, guidance, model, model_type)
    seed = (extra_args or {}).get("seed") if solver.noisy else None
    return run(
        solver, guidance, process, model, x, sigmas, extra_args, callback, disable,
        randn_like=torch.randn_like if seed is None else _noise(x, int(seed)),
        trace=None if record is None else lambda info: record(info, process),
    )  # fmt: skip


def _noise(x: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Return a source of noise like x that the seed decides."""
    # Not the seed itself: on a CPU its first draw is the noise that x began as.
    generator = torch.Generator(x.device).manual_seed((seed + NEXT_STREAM) % 2**63)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, device=x.device, generator=generator)

    return draw


def make_ksampler(
    solver: Solver,
    guidance: Guidance | None = None,
    model_type: str = DETECT,
    record: Record | None = None,
) -> Any:
    """Return ComfyUI's SAMPLER of a method; arguments as of `sample_in_comfyui`."""
    options = {"solver": solver, "guidance": guidance, "model_type": model_type, "record": record}
    return module("comfy.samplers").KSAMPLER(sample_in_comfyui, options)


@dataclass(frozen=True)
class Listed:
    """An entry of the ordinary dropdown, which has no options.

    Attributes:
        name: as users see it.
        solver, guidance: what it stands for.
        discards_penultimate: whether ComfyUI leaves out the level before the last, as it does for
            its own dpm_2.
    """

    name: str
    solver: Solver
    guidance: Guidance | None = None
    discards_penultimate: bool = False


LISTED = (
    Listed("erk_heun", Heun(), ParameterFreeGuidance()),
    Listed("erk_dpm_2", DPM2(), ParameterFreeGuidance(), discards_penultimate=True),
    Listed("modal", Modal()),
)


def register() -> None:
    """Put `LISTED` into the dropdown of KSampler and its like. To do so again changes nothing.

    A sampler of that name from somewhere else is left alone, with a warning in the log.
    """
    functions = module("comfy.k_diffusion.sampling")
    choice = module("comfy.samplers").KSampler
    for entry in LISTED:
        attribute = f"sample_{entry.name}"
        ours = _function_of(entry)
        there = getattr(functions, attribute, ours)
        if getattr(there, "__module__", None) != ours.__module__:
            logging.warning(
                "ERK-Guid: the sampler %s is not listed, there is another one of that name from %s",
                entry.name, there.__module__,
            )  # fmt: skip
            continue
        setattr(functions, attribute, ours)
        if entry.name not in choice.SAMPLERS:
            choice.SAMPLERS.append(entry.name)
        if entry.discards_penultimate:
            choice.DISCARD_PENULTIMATE_SIGMA_SAMPLERS.add(entry.name)


def _function_of(entry: Listed) -> Callable[..., Tensor]:
    def function(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        return sample_in_comfyui(
            model, x, sigmas, extra_args, callback, disable,
            solver=entry.solver, guidance=entry.guidance,
        )  # fmt: skip

    function.__name__ = function.__qualname__ = f"sample_{entry.name}"  # other packs look at it
    return function
