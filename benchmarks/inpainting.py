#!/usr/bin/env python3
"""What a scheduler's memory is worth where a pipeline edits the samples: in-painting.

    python benchmarks/inpainting.py

The shipped digit model fills in the lower half of its own digits. After each call the known half is
put back, with noise, as diffusers' in-painting pipelines do. Printed is the mean distance of the
unknown half to a run of many steps, for schedulers that keep what they remember of the values that
were not edited, and for the same ones that forget at each edit (as they did before).
"""

from __future__ import annotations

from typing import Any

import click
import torch
from common import machine
from diffusers import EulerDiscreteScheduler
from torch import Tensor

import erk_guid
from erk_guid.integrations.diffusers import ERKGuidHeunScheduler, ModalScheduler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "use_karras_sigmas": True}  # fmt: skip


class Forgetful(ModalScheduler):
    """Begins anew at each edited sample."""

    def _note(self, returned: Tensor) -> None:
        """Remember nothing."""


class ForgetfulHeun(ERKGuidHeunScheduler):
    """Has no pair at an edited sample."""

    def _note(self, returned: Tensor) -> None:
        super()._note(returned)
        if self._left is not None and self._step is None:
            self._left = None


@click.command(help=__doc__)
@click.option("--num", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--fine", type=click.IntRange(min=50), default=300, show_default=True)
def main(num: int, fine: int) -> None:
    torch.set_grad_enabled(False)
    net = erk_guid.load("digits").net
    labels = torch.eye(10)[torch.arange(num) % 10]
    known = erk_guid.sample(
        lambda x, s: net(x, s, labels),
        80 * torch.randn(num, 1, 32, 32, generator=torch.Generator().manual_seed(9)),
        erk_guid.karras_sigmas(16).float(),
    )
    noise = torch.randn(known.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:, :] = 1

    def filled(scheduler: Any, calls: int) -> Tensor:
        steps = (calls + 1) // 2 if scheduler.order == 2 else calls
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        x = noise * scheduler.sigmas[0]
        for k, time in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, time)
            sigma = scheduler.sigmas[k]
            output = (x - net(x, sigma, labels)) / sigma
            x = scheduler.step(output, time, x).prev_sample
            x = mask * x + (1 - mask) * (known + scheduler.sigmas[k + 1] * noise)
        return x

    rows = {
        "Euler": lambda: EulerDiscreteScheduler(**CONFIG),
        "modal, begun anew": lambda: Forgetful(**CONFIG),
        "modal": lambda: ModalScheduler(**CONFIG),
        "Heun": lambda: ERKGuidHeunScheduler(**CONFIG, w_stiff=0.0),
        "Heun auto, without pair": lambda: ForgetfulHeun(**CONFIG),
        "Heun auto": lambda: ERKGuidHeunScheduler(**CONFIG),
    }
    exact = filled(ModalScheduler(**CONFIG), fine)
    counts = (7, 11, 15, 21)
    print(f"{num} digits, {machine()}\n")
    print("| scheduler | " + " | ".join(f"{count} calls" for count in counts) + " |")
    print("|---|" + "---:|" * len(counts))
    for name, make in rows.items():
        found = []
        for count in counts:
            apart = (filled(make(), count) - exact)[..., 16:, :].flatten(1).norm(dim=1)
            found.append(f"{float(apart.mean()):.3f}")
        print(f"| {name} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
