#!/usr/bin/env python3
"""Compare solvers on a flow-matching model, made from the shipped network.

x = (1 - t) clean + t noise, so that D(x; t) is the network's D(x / (1 - t); t / (1 - t)), with
1 - t held at 1 / 80 where the network's noise levels end. The times are evenly spaced from t = 1
and shifted, as SD3 and FLUX do. The last step, to t = 0, is Euler's. The table shows the mean
distance to a fine solution, as a multiple of plain Heun's at the same number of evaluations.

    python benchmarks/flow.py
"""

from __future__ import annotations

import click
import torch
from common import machine
from torch import Tensor

import erk_guid
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.integrations.flow import flow_process
from erk_guid.solvers import DPM2, Euler, Heun, Modal, Solver


def shifted(steps: int, shift: float) -> Tensor:
    """Return the times of a run of that many steps: 1 to 1 / steps before the shift, then 0."""
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return torch.cat([shift * even / (1 + (shift - 1) * even), even.new_zeros(1)])


@click.command(help=__doc__)
@click.option("--num", default=64, show_default=True, help="Images.")
def main(num: int) -> None:
    print(machine())
    net = erk_guid.load("digits").net
    labels = torch.eye(10)[torch.arange(num) % 10]
    noise = torch.randn(num, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        rest = (1 - t).clamp_min(1 / 80)
        return net(x / rest, t / rest, labels)

    fine = erk_guid.sample(
        denoiser, noise, shifted(150, 3.0), solver="modal", process=erk_guid.RectifiedFlow()
    )

    def error(
        steps: int,
        shift: float,
        solver: Solver,
        guidance: Guidance | None = None,
        told: bool = True,
    ) -> Tensor:
        made = erk_guid.sample(
            denoiser, noise, shifted(steps, shift), solver=solver, guidance=guidance,
            process=flow_process(solver, guidance) if told else None,
        )  # fmt: skip
        return (made - fine).flatten(1).norm(dim=1)

    print(
        "| shift | evaluations | plain Heun | published 0.5, gate step 0.3 | auto "
        "| DPM-Solver-2 | its auto | Euler | modal | modal, not told |"
    )
    print("|" + "---:|" * 10)
    for shift in (1.0, 3.0):
        for steps in (4, 6, 10, 16):
            one = 2 * steps - 1  # steps of a solver with one evaluation each
            plain = error(steps, shift, Heun()).mean()
            cells = [
                error(steps, shift, Heun(), ERKGuidance(0.5, 0.3, gate="step")),
                error(steps, shift, Heun(), ParameterFreeGuidance()),
                error(steps, shift, DPM2()),
                error(steps, shift, DPM2(), ParameterFreeGuidance()),
                error(one, shift, Euler()),
                error(one, shift, Modal()),
                error(one, shift, Modal(), told=False),
            ]
            ratios = " | ".join(f"{float(cell.mean() / plain):.2f}" for cell in cells)
            print(f"| {shift:g} | {one} | {plain:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
