#!/usr/bin/env python3
"""Find the ERK-Guid settings that bring few steps nearest to many, on your own network.

For each step count, every pair of w_stiff and w_con is sampled from the same noise, and its mean
distance to a fine solution is printed as a multiple of plain Heun's. This measures fidelity to the
ODE, not which images look better.

    python benchmarks/settings.py --net digits --steps 5,6,8,12
"""

from __future__ import annotations

from typing import Any

import click
import torch
from common import machine

import erk_guid
from erk_guid.generation.devices import choose_device


@click.command(help=__doc__)
@click.option("--net", "source", default="digits", show_default=True)
@click.option("--steps", default="5,6,8,12", show_default=True)
@click.option("--w_stiff", default="0.25,0.408,0.5,0.75,1.0", show_default=True)
@click.option("--w_con", default="0,0.1,0.3,0.5,1.0", show_default=True)
@click.option("--reference", default=64, show_default=True, help="Steps of the fine solution.")
@click.option("--device", help="cuda, mps or cpu.  [default: the best present]")
@click.option("--seeds", default=64, show_default=True, help="Images; their seeds begin at 10000.")
def main(
    source: str,
    steps: str,
    w_stiff: str,
    w_con: str,
    reference: int,
    device: str | None,
    seeds: int,
) -> None:
    where = choose_device(device)
    loaded = erk_guid.load(source, where)
    model: dict[str, Any] = {}
    if loaded.preset is not None and loaded.preset.gnet is not None:
        gnet = erk_guid.load(loaded.preset.gnet, where).net
        model = {"gnet": gnet, "guidance": loaded.preset.guidance}
    numbers = range(10_000, 10_000 + seeds)

    def sampled(num_steps: int, **settings: Any) -> torch.Tensor:
        batches = erk_guid.generate(
            loaded.net, numbers, num_steps=num_steps, batch_size=64, **model, **settings
        )
        return torch.cat([batch.latents.cpu() for batch in batches]).flatten(1)

    fine = sampled(reference)
    print(f"{source}, {seeds} images against {reference} steps of Heun; {machine()}")
    for num_steps in map(int, steps.split(",")):
        plain = (sampled(num_steps) - fine).norm(dim=1)
        error = plain.std() / len(plain) ** 0.5
        print(f"\n{num_steps} steps: plain Heun {plain.mean():.3f} (standard error {error:.3f})")
        print("  w_stiff \\ w_con " + "".join(f"{c:>8}" for c in w_con.split(",")))
        for w in w_stiff.split(","):
            row = []
            for c in w_con.split(","):
                guided = sampled(num_steps, w_stiff=float(w), w_con=float(c))
                row.append((guided - fine).norm(dim=1).mean() / plain.mean())
            print(f"  {w:>15} " + "".join(f"{ratio:8.2f}" for ratio in row))


if __name__ == "__main__":
    main()
