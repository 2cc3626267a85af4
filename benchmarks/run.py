#!/usr/bin/env python3
"""A whole run of generate_images.py against the same run in plain form: time and peak memory.

The network is EDM2-XS on 64x64 pixels with random weights, in a snapshot of the published format.
The plain run opens it with Python's own unpickler and calls the network's plain form (plain.py);
noise, sampler and files are the same. Each run is a process of its own, in turn (A B A B ...), from
its start to its end.

    python benchmarks/run.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from common import edm2_xs, machine
from plain import Plain

from erk_guid.common.pictures import save_png
from erk_guid.generation.images import generate
from erk_guid.models.checkpoints.trusted import read_trusted

ROOT = Path(__file__).parents[1]


def write(path: Path, dtype: torch.dtype) -> None:
    """Write the network as a published snapshot."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from check_programs import EDM2_SOURCE, write_snapshot  # type: ignore[import-not-found]

    write_snapshot(path, edm2_xs(channels=3).to(dtype), EDM2_SOURCE)


def peak() -> int:
    """Return the largest resident memory of this program so far, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise click.ClickException("this system has no /proc/self/status")


def plain_run(path: Path, outdir: Path, images: int, batch: int, steps: int) -> None:
    net = Plain(read_trusted(path)["ema"].eval().requires_grad_(False))
    outdir.mkdir(exist_ok=True)
    for made in generate(net, range(images), batch_size=batch, num_steps=steps):
        for seed, pixels in zip(made.seeds, made.images.numpy(), strict=True):
            save_png(outdir / f"{seed:06d}.png", pixels)


def our_run(arguments: Sequence[str]) -> None:
    from erk_guid.cli.generate import generate_command

    generate_command(list(arguments), standalone_mode=False)


def timed(arguments: list[str]) -> tuple[float, int]:
    """Return the seconds and the peak memory of this script in a mode."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(done.stderr[-1000:])
    return time.perf_counter() - begun, int(done.stdout.split()[-1])


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--rounds", default=3, show_default=True)
@click.option("--images", default=16, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
@click.option("--mode", hidden=True)
@click.argument("rest", nargs=-1)
def main(
    rounds: int, images: int, batch: int, steps: int, to: Path | None, mode: str | None,
    rest: tuple[str, ...],
) -> None:  # fmt: skip
    if mode == "plain":
        plain_run(Path(rest[0]), Path(rest[1]), images, batch, steps)
    elif mode == "ours":
        our_run(rest)
    if mode:
        print(peak())
        return
    print(machine())
    rows = []
    sizes = [f"--images={images}", f"--batch={batch}", f"--steps={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        for stored in (torch.float32, torch.float16):
            path = Path(folder) / f"{str(stored).removeprefix('torch.')}.pkl"
            write(path, stored)
            for precision in ("float32", "bfloat16"):
                ours = [
                    "--mode=ours", "--", f"--net={path}", f"--outdir={folder}/ours", "--device=cpu",
                    f"--seeds=0-{images - 1}", f"--batch={batch}", f"--steps={steps}",
                    f"--precision={precision}",
                ]  # fmt: skip
                plain = ["--mode=plain", *sizes, "--", str(path), f"{folder}/plain"]
                found = [(timed(plain), timed(ours)) for _ in range(rounds)]
                ratios = sorted(a[0] / b[0] for a, b in found)
                memory = [statistics.median(x[k][1] for x in found) for k in (0, 1)]
                seconds = [statistics.median(x[k][0] for x in found) for k in (0, 1)]
                rows.append(
                    {
                        "stored": path.stem, "precision": precision, "plain": seconds[0],
                        "seconds": seconds[1], "ratio": statistics.median(ratios),
                        "lowest": ratios[0], "highest": ratios[-1], "plain_peak": memory[0],
                        "peak": memory[1],
                    }
                )  # fmt: skip
                print(
                    f"stored in {path.stem}, computed in {precision}: plain {seconds[0]:.1f} s, "
                    f"ours {seconds[1]:.1f} s, {statistics.median(ratios):.2f} times as fast "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f}); peak memory {memory[0]:.0f} and "
                    f"{memory[1]:.0f} MiB, ratio {memory[1] / memory[0]:.2f}",
                    flush=True,
                )
    if to:
        to.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
