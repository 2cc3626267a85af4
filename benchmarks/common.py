"""Shared by the benchmarks: the network they time, and timing in turn."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from erk_guid.models.networks.edm2 import Precond


def edm2_xs(device: str = "cpu", channels: int = 4) -> Precond:
    """Return EDM2-XS with random weights: 128 channels, 64x64 latents, 1000 classes.

    It is the form that can be trained; `erk_guid.models.freeze` makes the one for inference.
    """
    torch.manual_seed(0)
    net = Precond(64, channels, 1000, model_channels=128)
    with torch.no_grad():
        # The initial gains are 0, which would multiply much of the network away.
        for name, parameter in net.named_parameters():
            if name.endswith("_gain"):
                parameter.fill_(0.5)
    return net.eval().requires_grad_(False).to(device)


def in_turn(
    a: Callable[[], object], b: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Measure the seconds of a and b, in turn (A B A B ...), after one warm-up of each."""
    a(), b()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, into in zip((a, b), times, strict=True):
            begun = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            into.append(time.perf_counter() - begun)
    return times


def report_ratio(names: tuple[str, str], times: tuple[list[float], list[float]]) -> None:
    """Print the medians of both, and the median of the ratios A / B taken pair by pair."""
    for name, values in zip(names, times, strict=True):
        print(f"  {name:<44} median {statistics.median(values):8.3f} s")
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    print(
        f"  ratio, pair by pair: median {statistics.median(ratios):.3f} "
        f"(from {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def machine() -> str:
    """Return one line about where this ran."""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {platform.system()}, CUDA {torch.cuda.is_available()}"
    )
