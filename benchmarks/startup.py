"""Time what a user waits for before anything is computed, here and in another checkout.

Each is a process of its own, in turn (A B A B ...): the list of commands, an error in an option,
the first load of a network. `import torch` alone is the floor of the last one.

    python benchmarks/startup.py --against CHECKOUT
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

HERE = Path(__file__).parents[1]
PROGRAMS = {
    "erk-guid --help": ["-m", "erk_guid", "--help"],
    "erk-guid --version": ["-m", "erk_guid", "--version"],
    "erk-guid generate --help": ["-m", "erk_guid", "generate", "--help"],
    "erk-guid generate --solver=rk4 (an error)": ["-m", "erk_guid", "generate", "--solver=rk4"],
    "import torch": ["-c", "import torch"],
    "import erk_guid; load('digits')": ["-c", "import erk_guid; erk_guid.load('digits')"],
}


def seconds(checkout: Path, arguments: list[str]) -> float:
    """Return the time of a Python process that imports the package from a checkout."""
    begun = time.perf_counter()
    # Before a package that may be installed.
    subprocess.run(
        [sys.executable, *arguments], cwd=checkout, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    return time.perf_counter() - begun


@click.command(help=__doc__)
@click.option(
    "--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkout."
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write the numbers to a file.")
def main(against: Path | None, rounds: int, to: Path | None) -> None:
    print(machine())
    medians = {}
    for name, arguments in PROGRAMS.items():
        checkouts = [HERE, *([against.resolve()] if against else [])]
        times: list[list[float]] = [[] for _ in checkouts]
        for k in range(rounds + 1):
            for found, checkout in zip(times, checkouts, strict=True):
                spent = seconds(checkout, arguments)
                if k:  # the first fills the file cache
                    found.append(spent)
        line = f"{name:<44} {statistics.median(times[0]):6.2f} s"
        if against:
            ratios = sorted(a / b for a, b in zip(*times, strict=True))
            line += (
                f", the other {statistics.median(times[1]):6.2f} s, ratio "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        print(line, flush=True)
        medians[name] = statistics.median(times[0])
    if to:
        to.write_text(json.dumps(medians))


if __name__ == "__main__":
    main()
