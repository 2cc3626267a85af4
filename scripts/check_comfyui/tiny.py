"""Tiny random models of five kinds, as ComfyUI wraps real ones; made inside that program."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

CONTEXT, POOLED = 16, 24
"""Widths of a prompt's two encodings."""
KINDS = {"eps": "sigma", "v": "sigma", "unet-flow": "flow", "sd3": "flow", "flux": "flow"}
"""The models, and what their x is."""


def model(name: str) -> Any:
    """Return a ModelPatcher with a random network that the name decides."""
    torch.manual_seed(1)
    base = MAKERS[name]()
    # Buffers as well as parameters: SD3's position embedding is empty memory.
    generator = torch.Generator().manual_seed(2)
    for tensor in (*base.diffusion_model.parameters(), *base.diffusion_model.buffers()):
        if tensor.is_floating_point():
            spread = 1 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
            tensor.data = spread * torch.randn(tensor.shape, generator=generator)
    base.requires_grad_(False)
    cpu = torch.device("cpu")
    return import_module("comfy.model_patcher").ModelPatcher(base, cpu, cpu)


def _config(name: str, unet: dict[str, Any]) -> Any:
    config = getattr(import_module("comfy.supported_models"), name)(
        {**unet, "dtype": torch.float32}
    )
    config.unet_config["dtype"] = torch.float32
    return config


def _unet(kind: str) -> Any:
    config = _config(
        "SD15",
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
            "num_res_blocks": [1, 1], "channel_mult": (1, 2), "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
            "use_spatial_transformer": True, "context_dim": CONTEXT, "legacy": False,
        },
    )  # fmt: skip
    base = import_module("comfy.model_base")
    return base.BaseModel(config, model_type=base.ModelType[kind], device="cpu")


def _sd3() -> Any:
    config = _config(
        "SD3",
        {
            "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
            "adm_in_channels": POOLED, "num_patches": 64, "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None, "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": CONTEXT, "out_features": 128},
            },
        },
    )  # fmt: skip
    return import_module("comfy.model_base").SD3(config, device="cpu")


def _flux() -> Any:
    config = _config(
        "Flux",
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED,
            "context_in_dim": CONTEXT, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2,
            "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000,
            "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
        },
    )  # fmt: skip
    return import_module("comfy.model_base").Flux(config, device="cpu")


MAKERS: dict[str, Callable[[], Any]] = {
    "eps": lambda: _unet("EPS"),
    "v": lambda: _unet("V_PREDICTION"),
    "unet-flow": lambda: _unet("FLOW"),
    "sd3": _sd3,
    "flux": _flux,
}


def prompt(seed: int) -> list[Any]:
    """Return a CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 6, CONTEXT, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, POOLED, generator=generator)}]]


def latent(patcher: Any, batch: int = 1) -> torch.Tensor:
    """Return an empty latent for a model."""
    channels = patcher.get_model_object("latent_format").latent_channels
    return torch.zeros(batch, channels, 8, 8)


class TinyModel:
    """A node that makes one of the models with two prompts, for the check over HTTP."""

    CATEGORY = "check"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return ComfyUI's description of the inputs."""
        return {"required": {"name": (list(KINDS),)}}

    def make(self, name: str) -> tuple[Any, Any, Any, Any]:
        """Return the outputs; ComfyUI calls this."""
        made = model(name)
        return made, prompt(3), prompt(4), {"samples": latent(made)}
