"""Classifier-free guidance with one network: a doubled batch against two calls.

Times both, in turn (A B A B ...), over batch sizes. The rule of `Unconditional.pair` comes from
this table, which is in docs/performance.md.

    python benchmarks/doubled.py
"""

from __future__ import annotations

import statistics
from typing import Any

import click
import torch
from common import edm2_xs, in_turn, machine

import erk_guid
from erk_guid.generation.devices import choose_device
from erk_guid.models import freeze


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", help="[default: the best present]")
@click.option("--largest", default=16, show_default=True, help="Largest batch.")
@torch.no_grad()
def main(rounds: int, device: str | None, largest: int) -> None:
    where = choose_device(device)
    print(machine(), where)
    nets: dict[str, Any] = {
        "digits": erk_guid.load("digits", where).net,
        "EDM2-XS": freeze(edm2_xs(str(where))),
        "EDM2-XS, bfloat16": freeze(edm2_xs(str(where)), torch.bfloat16),
    }
    for name, net in nets.items():
        batch = 1
        while batch <= largest:
            shape = (net.img_channels, net.img_resolution, net.img_resolution)
            x = torch.randn(batch, *shape, device=where)
            labels = torch.eye(net.label_dim, device=where)[:1].expand(batch, -1)
            none = torch.zeros_like(labels)
            sigma = torch.tensor(1.0, device=where)

            def doubled(net=net, x=x, labels=labels, none=none, sigma=sigma) -> None:  # type: ignore[no-untyped-def]
                net(torch.cat([x, x]), sigma, torch.cat([labels, none])).chunk(2)

            def two(net=net, x=x, labels=labels, sigma=sigma) -> None:  # type: ignore[no-untyped-def]
                net(x, sigma, labels), net(x, sigma, None)

            times = in_turn(doubled, two, rounds * (4 if name == "digits" else 1))
            ratios = sorted(a / b for a, b in zip(*times, strict=True))
            print(
                f"{name}, {batch} images: doubled {statistics.median(times[0]):.4f} s, two calls "
                f"{statistics.median(times[1]):.4f} s, ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
            batch *= 2


if __name__ == "__main__":
    main()
