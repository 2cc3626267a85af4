"""Tiny random networks of diffusers' pipelines: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CosmosTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

SD: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
"""Stable Diffusion's config, with nothing left to defaults."""


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    """Half the image's size."""
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels,
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def tiny_conditional_unet(in_channels: int = 4, xl: bool = False) -> UNet2DConditionModel:
    """Stable Diffusion's network, or with `xl` SDXL's, for prompts of 16 numbers."""
    more: dict[str, Any] = {}
    if xl:  # six numbers of size and place, 8 features each, and the pooled prompt
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 16}  # fmt: skip
    return UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def tiny_unet() -> UNet2DModel:
    """The network of unconditional pipelines."""
    return UNet2DModel(
        sample_size=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


def tiny_dit() -> DiTTransformer2DModel:
    """DiT, which predicts a variance, too."""
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, num_embeds_ada_norm=1000, patch_size=2, norm_num_groups=4,
    )  # fmt: skip


def tiny_flux(in_channels: int = 4) -> FluxTransformer2DModel:
    """FLUX; its channels are four times those of the latents."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def tiny_sd3() -> SD3Transformer2DModel:
    """SD3, with the 16 channels that its in-painting pipeline asks for."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip


def tiny_cosmos() -> CosmosTransformer3DModel:
    """Cosmos 1, for videos."""
    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
    )  # fmt: skip


@contextmanager
def counting(network: torch.nn.Module) -> Iterator[list[int]]:
    """Count the calls of a network: the length of the list."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda *args: calls.append(1))
    yield calls
    hook.remove()
