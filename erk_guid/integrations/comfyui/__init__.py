"""A node for ComfyUI: a sampler with ERK guidance, for "SamplerCustom" and its kin.

Install `erk-guid` into ComfyUI's Python, then copy or link this folder into its `custom_nodes`:

    ln -s "$(python -c 'import erk_guid.integrations.comfyui as m; print(m.__path__[0])')" \\
        ComfyUI/custom_nodes/erk_guid

The node appears under sampling / custom_sampling / samplers as "ERK-Guid sampler".
"""

from __future__ import annotations

from typing import Any

from erk_guid.integrations.k_diffusion import sample_erk_dpm_2, sample_erk_heun, sample_modal

SOLVERS = {"heun": sample_erk_heun, "dpm_2": sample_erk_dpm_2, "modal": sample_modal}
FORMS = ("auto", "published")


class ERKGuidSampler:
    """Makes a SAMPLER of ComfyUI's."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    DESCRIPTION = (
        "ERK-Guid. 'auto' is the parameter-free form and ignores w_stiff and w_con; 'published' "
        "is the paper's, with w_con in units of 1/sigma. The modal solver takes no guidance."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "w_stiff": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 10.0, "step": 0.01}),
                "w_con": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 100.0, "step": 0.01}),
            },
            "optional": {
                "form": (list(FORMS), {"default": FORMS[0]}),
                "solver": (list(SOLVERS), {"default": "heun"}),
            },
        }

    def get_sampler(
        self, w_stiff: float, w_con: float, form: str = FORMS[0], solver: str = "heun"
    ) -> tuple[Any]:
        """The sampler, for ComfyUI to call."""
        import comfy.samplers  # there when ComfyUI calls this, and nowhere else

        options: dict[str, Any] = {}
        if solver != "modal":
            options = {"w_stiff": "auto" if form == "auto" else w_stiff, "w_con": w_con}
        return (comfy.samplers.KSAMPLER(SOLVERS[solver], options),)


NODE_CLASS_MAPPINGS = {"ERKGuidSampler": ERKGuidSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"ERKGuidSampler": "ERK-Guid sampler"}
