#!/usr/bin/env python3
"""Compare a diffusers pipeline with and without guidance. Nothing is downloaded.

    python scripts/compare_diffusers.py --out output/diffusers.png

The pipeline is diffusers' own `LDMPipeline`. Its network is the digit model that ships with the
package, made to look like a UNet of diffusers. Its VAE does nothing. The same noise is sampled by
plain Heun, by the published form, by the parameter-free form, and by the modal solver with as many
network calls. All are measured against a run of many small steps. With your own pipeline the lines
that matter are

    from erk_guid.integrations.diffusers import ERKGuidHeunScheduler
    pipe.scheduler = ERKGuidHeunScheduler.from_config(pipe.scheduler.config, w_stiff="auto")
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from diffusers import LDMPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from torch import Tensor

import erk_guid
from erk_guid.common.files import check_writable
from erk_guid.common.pictures import Panel, figure, save_picture, tile
from erk_guid.integrations.diffusers import ERKGuidHeunScheduler, ModalScheduler

FINE_STEPS = 64
SHOWN = 16
"""Digits in the picture."""


class DigitUNet(ModelMixin, ConfigMixin):
    """The shipped network as a UNet of diffusers.

    Takes a scaled sample and a timestep, and predicts the noise.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, sample_size: int = 32, in_channels: int = 1, count: int = 64) -> None:
        super().__init__()
        self.net = erk_guid.load("digits").net
        self.register_buffer("labels", torch.eye(10)[torch.arange(count) % 10])
        self.register_buffer("log_sigmas", torch.zeros(0))

    def know(self, scheduler: Any) -> None:
        """Store the noise level of each of the scheduler's timesteps."""
        kept = scheduler.alphas_cumprod.double()
        self.log_sigmas = ((1 - kept) / kept).sqrt().log()

    def forward(self, scaled: Tensor, timestep: Tensor) -> Any:
        at = timestep.double().clamp(0, len(self.log_sigmas) - 1)
        low = at.floor().long().clamp(max=len(self.log_sigmas) - 2)
        sigma = self.log_sigmas[low].lerp(self.log_sigmas[low + 1], at - low).exp().float()
        x = scaled * (1 + sigma**2).sqrt()
        denoised = self.net(x, sigma, self.labels[: len(x)])
        return SimpleNamespace(sample=(x - denoised) / sigma)


class NoVAE(ModelMixin, ConfigMixin):
    """A VAE whose latents are the pixels."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))  # a pipeline asks for its parts' device

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--steps", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--num", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--w_stiff", default=0.4, show_default=True, help="Of the published form.")
@click.option("--w_con", default=0.5, show_default=True, help="Of the published form.")
def main(out: Path, steps: int, num: int, w_stiff: float, w_con: float) -> None:
    check_writable(out)
    unet = DigitUNet(count=num)
    # Explicit: in from_config, values left to one class's defaults become the other's.
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = ERKGuidHeunScheduler(**betas, use_karras_sigmas=True)
    pipe: Any = LDMPipeline(NoVAE(), unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    unet.know(pipe.scheduler)

    def sampled(num_steps: int, kind: Any = ERKGuidHeunScheduler, **settings: Any) -> np.ndarray:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
        same_noise = torch.Generator().manual_seed(0)
        made = pipe(num, generator=same_noise, num_inference_steps=num_steps, output_type="np")
        return np.asarray(made.images)[..., 0]

    fine = sampled(FINE_STEPS, w_stiff=0.0)
    heun, modal = ERKGuidHeunScheduler, ModalScheduler
    calls = 2 * steps - 1
    panels = []
    for title, kind, settings in (
        ("Plain Heun", heun, {"w_stiff": 0.0}),
        ("ERK-Guid", heun, {"w_stiff": w_stiff, "w_con": w_con}),
        ("ERK-Guid, auto", heun, {"w_stiff": "auto"}),
        ("Modal", modal, {}),
        ("Fine solution", None, {}),
    ):
        if kind is None:
            made, lines = fine, [f"{FINE_STEPS} steps, {2 * FINE_STEPS - 1} network calls"]
        else:
            taken = steps if kind is heun else calls
            made = sampled(taken, kind, **settings)
            apart = np.linalg.norm((made - fine).reshape(num, -1), axis=1)
            error = apart.std(ddof=1) / num**0.5
            lines = [
                f"{taken} steps, {calls} network calls",
                ", ".join(f"{k} {v}" for k, v in settings.items()) or "nothing to set",
                f"distance {apart.mean():.2f} ± {error:.2f}",
            ]
            click.echo(f"{title}: {', '.join(lines)}")
        images = [Image.fromarray((255 * image).round().astype(np.uint8)) for image in made]
        panels.append(Panel(tile(images[:SHOWN], columns=4, scale=2), title, lines))
    save_picture(out, figure(panels))
    click.echo(f"Picture: {out}")


if __name__ == "__main__":
    main()
