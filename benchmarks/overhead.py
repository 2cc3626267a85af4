#!/usr/bin/env python3
"""Measure what a solver step costs beside the network: microseconds a step, trivial denoiser.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --against ANOTHER_CHECKOUT    # A B A B, and the ratios

Each measurement is a process of its own with one thread; latents of 4x4x16x16, 32 steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from common import machine

ROOT = Path(__file__).resolve().parents[1]
CASES = [
    ("euler", 0.0), ("heun", 0.0), ("heun", 0.5), ("dpm2", 0.0), ("dpm2", 0.5), ("deis", 0.0),
    ("deis", 0.2), ("ipndm", 0.0), ("dpmpp", 0.0), ("unipc", 0.0), ("res", 0.0), ("modal", 0.0),
]  # fmt: skip
STEPS = 32


def measured(repeats: int) -> dict[str, float]:
    """Return microseconds a step, the median of some runs, by solver and strength."""
    import torch

    import erk_guid

    torch.set_num_threads(1)
    torch.manual_seed(0)
    noise = torch.randn(4, 4, 16, 16)

    def net(x: torch.Tensor, sigma: torch.Tensor, labels: object = None) -> torch.Tensor:
        return x * (0.25 / (0.25 + sigma**2))

    found = {}
    with torch.no_grad():
        for solver, w_stiff in CASES:
            times = []
            for _ in range(repeats + 3):  # the first few warm up
                begun = time.perf_counter()
                erk_guid.edm_sampler(
                    net, noise, num_steps=STEPS, solver=solver, w_stiff=w_stiff, w_con=0.1
                )
                times.append(time.perf_counter() - begun)
            found[f"{solver}, w_stiff {w_stiff:g}"] = statistics.median(times[3:]) / STEPS * 1e6
    return found


def in_process(checkout: Path, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--inside", "--repeats", str(repeats)]
    path = os.pathsep.join([str(checkout), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


@click.command(help=__doc__)
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--rounds", default=4, show_default=True)
@click.option("--repeats", default=15, show_default=True, help="Runs in each process.")
@click.option("--inside", is_flag=True, hidden=True)
def main(against: Path | None, rounds: int, repeats: int, inside: bool) -> None:
    if inside:
        print(json.dumps(measured(repeats)))
        return
    print(machine())
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    for _ in range(rounds):
        ours.append(in_process(ROOT, repeats))
        if against is not None:
            theirs.append(in_process(against.resolve(), repeats))
    for name in ours[0]:
        line = f"  {name:<22} {statistics.median(one[name] for one in ours):7.1f} us a step"
        if theirs:
            ratios = sorted(a[name] / b[name] for a, b in zip(ours, theirs, strict=True))
            line += (
                f"   over the other: median {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        print(line)


if __name__ == "__main__":
    main()
