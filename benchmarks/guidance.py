#!/usr/bin/env python3
"""Measure the cost of ERK guidance: sampling with and without it, and the correction alone.

    python benchmarks/guidance.py

Guided and unguided sampling of EDM2-XS are timed in turn and their peak memory is compared, each
in its own process. Then the correction alone is timed against one solver step.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import click
import torch
from common import edm2_xs, in_turn, machine, report_ratio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import erk_guid
from erk_guid.models import freeze


def peak_bytes(device: str) -> int:
    """Return the peak memory so far: of the GPU's allocator, or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.nbytes
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=3, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
@click.option("--peak-of", type=float, hidden=True, help="Sample once, print the peak memory.")
@torch.no_grad()
def main(rounds: int, steps: int, device: str, to: Path | None, peak_of: float | None) -> None:
    net = freeze(edm2_xs(device), inplace=True)
    noise = torch.randn(1, 4, 64, 64, device=device)
    labels = torch.eye(1000, device=device)[:1]

    def sampled(w_stiff: float) -> torch.Tensor:
        return erk_guid.edm_sampler(net, noise, labels, num_steps=steps, w_stiff=w_stiff, w_con=0)

    if peak_of is not None:
        sampled(peak_of)
        print(peak_bytes(device))
        return

    print(f"EDM2-XS, batch 1, {steps} steps, float32; {machine()}")
    times = in_turn(lambda: sampled(0.5), lambda: sampled(0.0), rounds)
    report_ratio(("guided sampling (gate open)", "unguided sampling"), times)
    peaks = {}
    for w_stiff in (0.5, 0.0):
        command = [sys.executable, __file__, "--steps", str(steps), "--device", device]
        out = subprocess.run(
            [*command, "--peak-of", str(w_stiff)], check=True, capture_output=True, text=True
        )
        peaks[w_stiff] = int(out.stdout)
    print(
        f"  peak memory: guided {peaks[0.5] / 2**20:.0f} MiB, "
        f"unguided {peaks[0.0] / 2**20:.0f} MiB, "
        f"ratio {peaks[0.5] / peaks[0.0]:.3f}"
    )

    # The correction alone, relative to one solver step (two evaluations).
    x_high, x_low, f_high, f_low = (torch.randn_like(noise) for _ in range(4))
    guidance = erk_guid.ERKGuidance(0.5, 0.0)
    h = torch.tensor(0.5, device=device)
    begun = time.perf_counter()
    repeats = 200
    for _ in range(repeats):
        guidance.correction(erk_guid.Pair(x_high, x_low, f_high, f_low, h))
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    alone = (time.perf_counter() - begun) / repeats
    calls = in_turn(lambda: net(noise, 1.0, labels), lambda: None, rounds)[0]
    step = 2 * statistics.median(calls)
    print(
        f"  the correction alone {alone * 1e6:.0f} us, one step {step * 1e3:.0f} ms: "
        f"{alone / step:.3%} of a step"
    )

    # What it holds at once, besides its inputs and its result.
    pair = erk_guid.Pair(x_high, x_low, f_high, f_low, h)
    with Held() as held:
        guidance.correction(pair)
    held_batches = held.peak / noise.nbytes - 1
    print(f"  largest temporaries at once: {held_batches:.2f} batches of latents")
    if to:
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        numbers = {"ratio": ratio, "of_a_step": alone / step, "batches": held_batches}
        to.write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
