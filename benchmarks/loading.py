#!/usr/bin/env python3
"""Memory and time of loading EDM2-XS from a snapshot of the published format.

Each load is a process of its own. Memory is the largest resident set less that before the load
(torch and all else imported), over the weights of the network that was made. Python's own
unpickler (``trust=True``) is the other side. Linux only.

    python benchmarks/loading.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from common import machine
from run import write

PROGRAM = """
import json, re, sys, time
import erk_guid
from erk_guid.models.checkpoints.trusted import read_trusted
erk_guid.load("digits")
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before, begun = status("VmRSS"), time.perf_counter()
if sys.argv[2] == "ours":
    net = erk_guid.load(sys.argv[1]).net
else:
    net = read_trusted(sys.argv[1])["ema"]
took = time.perf_counter() - begun
weights = sum(p.nbytes for p in net.parameters())
print(json.dumps([(status("VmHWM") - before) / weights, weights / 2**20, took]))
"""


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
def main(rounds: int, to: Path | None) -> None:
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stored in (torch.float32, torch.float16):
            path = Path(folder) / f"{str(stored).removeprefix('torch.')}.pkl"
            write(path, stored)
            for how in ("ours", "unpickler"):
                found = [
                    json.loads(
                        subprocess.run(
                            [sys.executable, "-c", PROGRAM, str(path), how],
                            capture_output=True, text=True, check=True,
                        ).stdout
                    )
                    for _ in range(rounds)
                ]  # fmt: skip
                peak, weights, seconds = (statistics.median(v) for v in zip(*found, strict=True))
                rows.append(
                    {
                        "stored": path.stem, "how": how, "peak": peak, "weights": weights,
                        "seconds": seconds,
                    }
                )  # fmt: skip
                print(
                    f"stored in {path.stem}, {how}: {weights:.0f} MiB of weights, peak {peak:.2f} "
                    f"of them, {seconds:.2f} s",
                    flush=True,
                )
    if to:
        to.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
