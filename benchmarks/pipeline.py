#!/usr/bin/env python3
"""From seeds to files against sampling alone; and two ranks of which one is slow.

First: images a second of a generation job, from its first batch to its last file, over those of
sampling alone, in turn (A B A B ...), for the shipped model and for EDM2-XS on 64x64 pixels. Then:
seconds of two processes that share images, one of them slowed by a factor, with a fixed share for
each and with the queue.

    python benchmarks/pipeline.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
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

import erk_guid
from erk_guid.generation import images, jobs
from erk_guid.generation.locks import locked
from erk_guid.generation.nonfinite import Watch
from erk_guid.generation.stopping import Stop
from erk_guid.generation.workers import workers
from erk_guid.models.checkpoints import save_network

SLOWED = 3


def ratios(net: str, count: int, batch: int, steps: int, rounds: int) -> list[float]:
    """Return images a second of a job over those of sampling alone, round by round."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        job = jobs.GenerationJob(
            net=net, outdir=Path(folder), seeds=range(count), batch=batch, num_steps=steps,
            device="cpu",
        )  # fmt: skip
        with workers() as group:
            models = job.open(torch.device("cpu"), group)
        made = images.generate(
            models.loaded.net, job.seeds, batch_size=batch, **models.generation_options
        )

        def alone() -> None:
            for part in made.shares:
                made.sample(part)

        def whole() -> None:
            with (
                contextlib.redirect_stderr(io.StringIO()),
                locked(job.outdir) as lock,
                workers() as group,
            ):
                jobs._generate(job, models, group, list(job.seeds), "", lock, Stop())

        alone()
        whole()
        for _ in range(rounds):
            times = []
            for function in (alone, whole):
                begun = time.perf_counter()
                function()
                times.append(time.perf_counter() - begun)
            found.append(times[0] / times[1])
    return sorted(found)


def share(how: str, count: int, batch: int, steps: int, outdir: Path) -> None:
    """One of two ranks: make images by a fixed share or from the queue."""
    rank = int(os.environ["RANK"])
    sample = images._Generation.sample

    def slowed(
        self: images._Generation, indices: Sequence[int], watch: Watch | None = None
    ) -> images.Sampled:
        begun = time.perf_counter()
        made = sample(self, indices, watch)
        if rank:
            time.sleep((SLOWED - 1) * (time.perf_counter() - begun))
        return made

    images._Generation.sample = slowed  # type: ignore[method-assign]
    torch.set_num_threads(1)
    net = erk_guid.load("digits").net
    begun = time.perf_counter()
    if how == "queue":
        job = jobs.GenerationJob(
            net="digits", outdir=outdir, seeds=range(count), batch=batch, num_steps=steps,
            device="cpu",
        )  # fmt: skip
        jobs.run_job(job)
    else:
        for _ in images.generate(
            net, range(count), batch_size=batch, num_steps=steps, rank=rank, world_size=2
        ):
            pass
    print(time.perf_counter() - begun)


def two_ranks(how: str, count: int, batch: int, steps: int) -> float:
    """Return the seconds of the slower of two ranks."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {
            **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [
            sys.executable, __file__, f"--share={how}", f"--count={count}", f"--batch={batch}",
            f"--steps={steps}", f"--outdir={folder}",
        ]  # fmt: skip
        processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        return max(float(p.communicate()[0].split()[-1]) for p in processes)


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--count", default=192, show_default=True, help="Images of the two ranks.")
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
@click.option("--share", "how", hidden=True)
@click.option("--outdir", hidden=True, type=click.Path(path_type=Path))
def main(
    rounds: int, count: int, batch: int, steps: int, to: Path | None, how: str | None,
    outdir: Path | None,
) -> None:  # fmt: skip
    if how:
        share(how, count, batch, steps, outdir or Path())
        return
    print(machine())
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        xs = Path(folder) / "xs.safetensors"
        save_network(xs, edm2_xs(channels=3))
        for name, net, number, size, levels in (
            ("digits", "digits", 256, 32, 6), ("EDM2-XS, 64x64 pixels", str(xs), 16, 4, 3),
        ):  # fmt: skip
            found[name] = ratios(net, number, size, levels, rounds)
            print(
                f"{name}: a job makes {statistics.median(found[name]):.3f} times the images a "
                f"second of sampling alone ({found[name][0]:.3f} to {found[name][-1]:.3f})",
                flush=True,
            )
    pairs = [(two_ranks("split", count, batch, steps), two_ranks("queue", count, batch, steps))
             for _ in range(rounds)]  # fmt: skip
    found["split"], found["queue"] = (list(values) for values in zip(*pairs, strict=True))
    print(
        f"two ranks, one slowed by {SLOWED}, {count} images: fixed shares "
        f"{statistics.median(found['split']):.1f} s, queue {statistics.median(found['queue']):.1f} "
        "s, ratio "
        f"{statistics.median(b / a for a, b in pairs):.2f}"
    )
    if to:
        to.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
