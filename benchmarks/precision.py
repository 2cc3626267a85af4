"""What a network computes in: the error it makes, and the time it takes.

For the shipped model and for EDM2-XS with random weights: the relative error of the U-Net's output
over noise levels, and for the shipped model that of final images (modal, 12 evaluations) as a
distance, beside the distance of the float32 run from a fine solution. Times are of one evaluation,
in turn (A B A B ...). These are the tables of docs/settings.md.

    python benchmarks/precision.py
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import click
import torch
from common import edm2_xs, in_turn, machine
from torch import Tensor

import erk_guid
from erk_guid.generation.devices import choose_device
from erk_guid.generation.images import draw
from erk_guid.generation.seeds import SeededNoise
from erk_guid.models import freeze

SIGMAS = (40.0, 5.0, 1.0, 0.3, 0.05)


def output_error(nets: tuple[Any, Any], x: Tensor, labels: Tensor) -> list[float]:
    """Return how far the U-Net's outputs are apart, relative, at each of `SIGMAS`."""
    found = []
    for sigma in SIGMAS:
        outputs = []
        for each in nets:
            level = torch.tensor(sigma, device=x.device)
            noisy = x * (sigma**2 + 0.25) ** 0.5
            passed = noisy * 0.25 / (sigma**2 + 0.25)  # beside the network
            outputs.append(each(noisy, level, labels) - passed)
        found.append(float((outputs[1] - outputs[0]).norm() / outputs[0].norm()))
    return found


def images(net: Any, noise: Tensor, labels: Tensor | None, n: int) -> Tensor:
    """Return what `n` evaluations of modal make."""
    return erk_guid.edm_sampler(
        net, noise, labels, num_steps=n + 1, solver="modal", denoise_to_zero=False
    )


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", help="[default: the best present]")
def main(rounds: int, device: str | None) -> None:
    where = choose_device(device)
    print(machine(), where)
    dtypes = [torch.bfloat16, *([torch.float16] if where.type == "cuda" else [])]

    def opened(dtype: torch.dtype) -> tuple[Any, Any]:
        precision = str(dtype).removeprefix("torch.")
        digits: Any = erk_guid.load("digits", device=where, precision=precision).net
        return digits, freeze(edm2_xs(str(where)), dtype)

    digits, xs = opened(torch.float32)
    noise, labels = draw(digits, SeededNoise(range(32), where), None)
    assert labels is not None
    with torch.no_grad():
        for dtype in dtypes:
            low_digits, low_xs = opened(dtype)
            rows: list[tuple[str, tuple[Any, Any], Tensor, Tensor]] = [
                ("digits", (digits, low_digits), noise[:8], labels[:8]),
                ("EDM2-XS, random", (xs, low_xs), torch.randn(2, 4, 64, 64, device=where),
                 torch.eye(1000, device=where)[:2]),
            ]  # fmt: skip
            for name, nets, x, given in rows:
                errors = output_error(nets, x, given)
                said = ", ".join(f"{e:.2%} at {s:g}" for s, e in zip(SIGMAS, errors, strict=True))
                print(f"{name}, {dtype}: output off by {said}", flush=True)
            whole = images(digits, noise, labels, 12)
            fine = images(digits, noise, labels, 62)

            def apart(a: Tensor, b: Tensor) -> float:
                return float((a - b).flatten(1).norm(dim=1).mean())

            low = images(low_digits, noise, labels, 12)
            print(
                f"digits, {dtype}, 12 evaluations: {apart(low, whole):.3f} from the float32 "
                f"images; from the fine solution {apart(low, fine):.3f}, float32 "
                f"{apart(whole, fine):.3f}",
                flush=True,
            )
            for batch in (1, 4, 8):
                x = torch.randn(batch, 4, 64, 64, device=where)
                given = torch.eye(1000, device=where)[:batch]

                def run(net: Any, x: Tensor = x, given: Tensor = given) -> None:
                    net(x, torch.tensor(1.0, device=where), given)

                times = in_turn(partial(run, xs), partial(run, low_xs), rounds)
                ratios = sorted(a / b for a, b in zip(*times, strict=True))
                print(
                    f"EDM2-XS, batch {batch}: float32 {statistics.median(times[0]):.3f} s, {dtype} "
                    f"{statistics.median(times[1]):.3f} s, {statistics.median(ratios):.2f} times "
                    f"as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
