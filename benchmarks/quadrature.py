#!/usr/bin/env python3
"""Measure the best weight of the denoised image at the end of a step, on the shipped model.

Over a step from sigma to sigma_next an exact solution moves by a weighted mean of the denoised
images on the way. With only the values at both ends, there is one best weight for the far one
(least squares over all pixels). It is printed beside the weights that solvers use. The images
themselves come from a fine solution, so only the quadrature is measured.

    python benchmarks/quadrature.py --steps 16
"""

from __future__ import annotations

from itertools import pairwise

import click
import torch
from common import machine

import erk_guid
from erk_guid.quadrature import modal_weights


@click.command(help=__doc__)
@click.option("--net", "source", default="digits", show_default=True)
@click.option("--steps", default=16, show_default=True, help="Noise levels.")
@click.option("--num", default=24, show_default=True, help="Images.")
@click.option("--substeps", default=8, show_default=True, help="Of the fine solution, a step.")
def main(source: str, steps: int, num: int, substeps: int) -> None:
    net = erk_guid.load(source).net
    sigmas = erk_guid.karras_sigmas(steps)[:-1]
    roots = sigmas ** (1 / 7)
    shares = torch.arange(substeps, dtype=torch.float64) / substeps
    between = [(a + (b - a) * shares) ** 7 for a, b in pairwise(roots)]
    fine = torch.cat([*between, sigmas[-1:]])
    noise = torch.randn(num, net.img_channels, net.img_resolution, net.img_resolution,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    labels = torch.eye(net.label_dim)[torch.arange(num) % net.label_dim] if net.label_dim else None
    denoised: list[torch.Tensor] = []
    points: list[torch.Tensor] = []

    def note(info: erk_guid.StepInfo) -> None:
        if info.step % substeps == 0:
            points.append(info.x_before)
            denoised.append(net(info.x_before, fine[info.step].float(), labels))
        if info.step == info.num_steps - 1:
            points.append(info.x)
            denoised.append(net(info.x, sigmas[-1].float(), labels))

    with torch.no_grad():
        erk_guid.sample(
            lambda x, s: net(x, s, labels), fine[0] * noise, fine.float(), solver="modal",
            callback=note,
        )  # fmt: skip
    print(f"{source}, {num} images, {steps} noise levels; {machine()}")
    print("   sigma -> sigma_next    best  modal  trapezoid(D)  trapezoid(drift)")
    for i, (s, t) in enumerate(pairwise(sigmas.tolist())):
        r = t / s
        moved = points[i + 1] - r * points[i] - (1 - r) * denoised[i]
        change = denoised[i + 1] - denoised[i]
        best = float((moved * change).sum() / (change * change).sum())
        modal = modal_weights([t, s], s, t)[0]
        print(f"{s:9.4f} -> {t:9.4f} {best:7.3f} {modal:6.3f} {(1 - r) / 2:13.3f} "
              f"{(1 - r) / 2 / r:17.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
