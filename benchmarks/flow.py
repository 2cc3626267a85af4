#!/usr/bin/env python3
"""Compare solvers on a flow-matching model, made from the shipped network.

x = (1 - t) clean + t noise, so that D(x; t) is the network's D(x / (1 - t); t / (1 - t)), with
1 - t held at 1 / 80 where the network's noise levels end. The times are evenly spaced from t = 1
and shifted, as SD3 and FLUX do. The last step, to t = 0, is Euler's. The table shows the mean
distance to a fine solution, as a multiple of plain Heun's at the same number of evaluations. In
the column "to 0.02" the times are evenly spaced down to 0.02, before the shift, in place of one
over the number of steps. With --fits a last column is modal of order 2 at levels that
`erk_guid.fit` finds on other noise, its last level, too; they depend on no shift.

    python benchmarks/flow.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import click
import torch
from common import machine
from torch import Tensor

import erk_guid
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.integrations.flow import flow_process
from erk_guid.solvers import DPM2, Euler, Heun, Modal, Solver

LAST = 0.02


def shifted(steps: int, shift: float, last: float | None = None) -> Tensor:
    """Return the times of a run: 1 to 1 / steps (or `last`) before the shift, then 0."""
    even = torch.linspace(1, 1 / steps if last is None else last, steps, dtype=torch.float64)
    return torch.cat([shift * even / (1 + (shift - 1) * even), even.new_zeros(1)])


STEPS = (4, 6, 10, 16)
FLOOR = 0.002
"""Last time of the fine solution."""


@click.command(help=__doc__)
@click.option("--num", default=64, show_default=True, help="Images.")
@click.option("--fits", is_flag=True, help="Fit levels, too (half an hour).")
def main(num: int, fits: bool) -> None:
    print(machine())
    net = erk_guid.load("digits").net
    labels = torch.eye(10)[torch.arange(num) % 10]
    noise = torch.randn(num, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    flow = erk_guid.RectifiedFlow()

    def denoiser(x: Tensor, t: Tensor, of: Tensor = labels) -> Tensor:
        rest = (1 - t).clamp_min(1 / 80)
        return net(x / rest, t / rest, of)

    def fitted_error(evaluations: int) -> Tensor:
        def spaced(shift: float) -> Callable[[int], list[float]]:
            return lambda n: [flow.level(t).sigma for t in shifted(n + 1, shift)[:-1].tolist()]

        others = torch.randn(128, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        found = erk_guid.fit(
            denoiser, others, evaluations=evaluations, solver=Modal(2), process=flow,
            labels=torch.eye(10)[torch.arange(128) % 10], denoise_to_zero=True, batch=16,
            sigma_min=flow.level(1 / evaluations).sigma, floor=flow.level(FLOOR).sigma,
            spacings={f"shift {shift:g}": spaced(shift) for shift in (1.0, 3.0)},
        )  # fmt: skip
        print(found, flush=True)
        made = erk_guid.sample(denoiser, noise, found.sigmas, solver=found.solver, process=flow)
        return (made - fine).flatten(1).norm(dim=1)

    levels = shifted(150, 3.0)[:-1]
    ending = torch.logspace(math.log10(levels[-1]), math.log10(FLOOR), 9, dtype=torch.float64)[1:]
    fine = erk_guid.sample(
        denoiser, noise, torch.cat([levels, ending, ending.new_zeros(1)]), solver="modal",
        process=flow,
    )  # fmt: skip

    def error(
        steps: int,
        shift: float,
        solver: Solver,
        guidance: Guidance | None = None,
        told: bool = True,
        last: float | None = None,
    ) -> Tensor:
        made = erk_guid.sample(
            denoiser, noise, shifted(steps, shift, last), solver=solver, guidance=guidance,
            process=flow_process(solver, guidance) if told else None,
        )  # fmt: skip
        return (made - fine).flatten(1).norm(dim=1)

    by_fit = {2 * n - 1: fitted_error(2 * n - 1) for n in STEPS} if fits else {}
    print(
        "| shift | evaluations | plain Heun | published 0.5, gate step 0.3 | auto "
        "| DPM-Solver-2 | its auto | Euler | modal | modal, not told "
        "| modal, to 0.02 | Heun, to 0.02 |" + (" modal, fitted |" if fits else "")
    )
    print("|" + "---:|" * (12 + fits))
    for shift in (1.0, 3.0):
        for steps in STEPS:
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
                error(one, shift, Modal(), last=LAST),
                error(steps, shift, Heun(), last=LAST),
                *([by_fit[one]] if fits else []),
            ]
            ratios = " | ".join(f"{float(cell.mean() / plain):.2f}" for cell in cells)
            print(f"| {shift:g} | {one} | {plain:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
