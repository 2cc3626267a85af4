#!/usr/bin/env python3
"""EDM2-XS as it runs here against its plain form, and against what the processor can do.

The plain form (plain.py) normalizes every weight at every call, writes out the softmax of attention
and keeps tensors NCHW and float32. Both are called in turn (A B A B ...) with the same weights. The
peak is that of the fastest convolution of the network's own shapes.

    python benchmarks/network.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from common import edm2_xs, in_turn, machine
from plain import Plain
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from erk_guid.models import freeze
from erk_guid.models.networks.frozen import laid_out

SHAPES = ((128, 64), (256, 32), (384, 16), (512, 8))
"""Channels and resolution of the network's levels."""


def fastest(function: object, rounds: int) -> float:
    """Return the least seconds of a call."""
    assert callable(function)
    function()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def peak(dtype: torch.dtype, device: str, batch: int = 4, rounds: int = 20) -> tuple[float, float]:
    """Return the GFLOP/s of the fastest 3x3 convolution, and of a matrix product."""
    found = []
    for channels, side in SHAPES:
        x = laid_out(torch.randn(batch, channels, side, side, device=device).to(dtype))
        w = laid_out(torch.randn(channels, channels, 3, 3, device=device).to(dtype))
        seconds = fastest(lambda x=x, w=w: F.conv2d(x, w, padding=1), rounds)
        found.append(2 * 9 * batch * (channels * side) ** 2 / seconds / 1e9)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    return max(found), 2 * 2048**3 / fastest(lambda: a @ a, rounds) / 1e9


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True)
@click.option("--batches", default="1,4,8", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
@torch.no_grad()
def main(rounds: int, batches: str, device: str, to: Path | None) -> None:
    print(machine())
    trainable = edm2_xs(device)
    plain = Plain(trainable)
    dtypes = [torch.float32, torch.bfloat16]
    if device.startswith("cuda"):
        dtypes.append(torch.float16)
    rows = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        conv, product = peak(dtype, device)
        print(f"{name}: convolution {conv:.0f} GFLOP/s, matrix product {product:.0f} GFLOP/s")
        net = freeze(trainable, dtype)
        for batch in map(int, batches.split(",")):
            x = torch.randn(batch, 4, 64, 64, device=device)
            labels = torch.eye(1000, device=device)[:batch]
            sigma = torch.tensor(1.0, device=device)

            def ours(net=net, x=x, sigma=sigma, labels=labels) -> Tensor:  # type: ignore[no-untyped-def]
                found: Tensor = net(x, sigma, labels)
                return found

            def other(x=x, sigma=sigma, labels=labels) -> Tensor:  # type: ignore[no-untyped-def]
                found: Tensor = plain(x, sigma, labels)
                return found

            with FlopCounterMode(display=False) as counter:
                ours()
            a, b = other(), ours()
            apart = float((a - b).norm() / a.norm())
            times = in_turn(other, ours, rounds)
            ratios = sorted(p / q for p, q in zip(*times, strict=True))
            seconds = statistics.median(times[1])
            speed = counter.get_total_flops() / seconds / 1e9
            rows.append(
                {
                    "dtype": name, "batch": batch, "plain": statistics.median(times[0]),
                    "seconds": seconds, "ratio": statistics.median(ratios),
                    "lowest": ratios[0], "highest": ratios[-1], "apart": apart,
                    "gflops": speed, "of_peak": speed / conv, "peak": conv, "product": product,
                }
            )  # fmt: skip
            print(
                f"  batch {batch}: plain {statistics.median(times[0]):.3f} s, ours {seconds:.3f} s,"
                f" {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to "
                f"{ratios[-1]:.2f}); {speed:.0f} GFLOP/s, {speed / conv:.0%} of the peak; outputs "
                f"{apart:.1e} apart",
                flush=True,
            )
    if to:
        to.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
