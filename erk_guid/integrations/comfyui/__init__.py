"""A node for ComfyUI: a sampler with ERK guidance, for "SamplerCustom" and similar nodes.

Install `erk-guid` into ComfyUI's Python, then copy or link this folder into its `custom_nodes`:

    ln -s "$(python -c 'import erk_guid.integrations.comfyui as m; print(m.__path__[0])')" \\
        ComfyUI/custom_nodes/erk_guid

The node appears under sampling / custom_sampling / samplers as "ERK-Guid sampler".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.settings import read_settings
from erk_guid.guidance import FORMS, ERKGuidance, Gate, make_guidance
from erk_guid.integrations.k_diffusion import sample_erk_dpm_2, sample_erk_heun, sample_modal
from erk_guid.solvers import Modal

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "heun": sample_erk_heun,
    "dpm_2": sample_erk_dpm_2,
    "modal": sample_modal,
}
FORM_NAMES = (*FORMS, "published")
GATES: tuple[str, ...] = get_args(Gate)
MODEL_TYPES = ("detect", "sigma", "flow")
"""What the model's x is: clean plus sigma noise, or (1 - t) clean + t noise."""
NEXT_STREAM = 0x9E3779B97F4A7C15
"""Added to a seed for noise that has nothing to do with the first one."""


def sample_in_comfyui(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    solver: str,
    model_type: str,
    guidance: Mapping[str, Any],
    eta: float = 0.0,
) -> Tensor:
    """Sample with one of `SOLVERS`, for the model's kind of x.

    Args:
        model, x, sigmas, extra_args, callback, disable: as ComfyUI's KSAMPLER calls samplers.
        solver: a name of `SOLVERS`.
        model_type: one of `MODEL_TYPES`.
        guidance: w_stiff, w_con, bound and gate, for the solvers that take them.
        eta: noise in each step, for the modal solver. The node's seed draws it.
    """
    flow = is_flow(model) if model_type == "detect" else model_type == "flow"
    options: Mapping[str, Any] = guidance
    if solver == "modal":
        seed = (extra_args or {}).get("seed") if eta else None
        options = {"eta": eta, "noise_sampler": None if seed is None else _noise(x, int(seed))}
    return SOLVERS[solver](model, x, sigmas, extra_args, callback, disable, flow=flow, **options)


def _noise(x: Tensor, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a source of noise like x that the seed decides."""
    # Not the seed itself: on a CPU its first draw is the noise that x began as.
    generator = torch.Generator(x.device).manual_seed((seed + NEXT_STREAM) % 2**63)

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    return draw


def is_flow(model: Any) -> bool:
    """Return whether ComfyUI samples the model by flow matching (its model_sampling is a CONST)."""
    kind = getattr(sys.modules.get("comfy.model_sampling"), "CONST", None)
    inner = getattr(getattr(model, "inner_model", None), "inner_model", None)
    return kind is not None and isinstance(getattr(inner, "model_sampling", None), kind)


class ERKGuidSampler:
    """ComfyUI node that makes a SAMPLER."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    DESCRIPTION = (
        "ERK-Guid. 'auto' is the parameter-free form and ignores the numbers and the gate; "
        "'published' is the paper's. The modal solver takes no guidance."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return ComfyUI's description of the inputs."""

        def number(default: float, largest: float, tooltip: str) -> tuple[str, dict[str, Any]]:
            return "FLOAT", {
                "default": default, "min": 0.0, "max": largest, "step": 0.01, "tooltip": tooltip,
            }  # fmt: skip

        return {
            "required": {
                "w_stiff": number(0.5, 10.0, "Strength of the published form."),
                "w_con": number(
                    ERKGuidance.w_con, 100.0,
                    "The published form acts where the gate's quantity exceeds this.",
                ),
            },
            "optional": {
                "form": (list(FORM_NAMES), {"default": FORM_NAMES[0]}),
                "solver": (list(SOLVERS), {"default": "heun"}),
                "gate": (
                    list(GATES),
                    {
                        "default": GATES[0],
                        "tooltip": "What w_con is compared with: the stiffness, in units of "
                        "1/sigma, as published; or that times the step, which has no unit and "
                        "is what to take for flow models.",
                    },
                ),
                "bound": number(
                    0.0, 10.0,
                    "Limits the published correction to this share of what the step's two "
                    "solutions differ by; 0: no limit.",
                ),
                "model_type": (list(MODEL_TYPES), {"default": MODEL_TYPES[0]}),
                "eta": number(
                    0.0, 1.0, "Noise in each step of the modal solver: 0 none, 1 the reverse SDE."
                ),
            },
        }  # fmt: skip

    def get_sampler(
        self,
        w_stiff: float,
        w_con: float,
        form: str = FORM_NAMES[0],
        solver: str = "heun",
        gate: str = GATES[0],
        bound: float = 0.0,
        model_type: str = MODEL_TYPES[0],
        eta: float = 0.0,
    ) -> tuple[Any]:
        """Return the sampler; ComfyUI calls this.

        Raises:
            ValueError: a number out of range, or eta for a solver without it.
        """
        import comfy.samplers  # exists only inside ComfyUI

        # Every widget has a value; the parameter-free form ignores those of the published one.
        guidance: dict[str, Any] = {"w_stiff": form}
        if form == "published":
            guidance = {"w_stiff": w_stiff, "w_con": w_con, "bound": bound or None, "gate": gate}
        make_guidance(**guidance)  # raise at the node, not in mid-run
        Modal(eta=eta)
        if eta and solver != "modal":
            raise ValueError(f"eta must be 0 with the solver {solver}, got {eta}; modal takes it")
        options = {
            "solver": solver, "model_type": model_type, "guidance": guidance, "eta": eta,
        }  # fmt: skip
        return (comfy.samplers.KSAMPLER(sample_in_comfyui, options),)


class ERKGuidSigmas:
    """ComfyUI node that makes SIGMAS of a file that ``erk-guid fit`` wrote."""

    CATEGORY = "sampling/custom_sampling/schedulers"
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    DESCRIPTION = (
        "Noise levels that 'erk-guid fit' or 'erk_guid.fit' found for a model. Take them with the "
        "solver that they were fitted for."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return ComfyUI's description of the inputs."""
        text = {"default": "fit-8.json", "tooltip": "Path of the settings file."}
        return {"required": {"file": ("STRING", text)}}

    def get_sigmas(self, file: str) -> tuple[Tensor]:
        """Return the noise levels; ComfyUI calls this.

        Raises:
            ErkGuidError: the file cannot be read, or holds no noise levels.
        """
        made_for = read_settings(file).made_for
        levels = made_for.get("schedule")
        if not isinstance(levels, tuple):
            raise ErkGuidError(f"{file} holds no noise levels; 'erk-guid fit' writes such files")
        last = [0.0] if made_for.get("denoise_to_zero", True) else []
        return (torch.tensor([*levels, *last], dtype=torch.float32),)


NODE_CLASS_MAPPINGS = {"ERKGuidSampler": ERKGuidSampler, "ERKGuidSigmas": ERKGuidSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ERKGuidSampler": "ERK-Guid sampler",
    "ERKGuidSigmas": "ERK-Guid fitted sigmas",
}
