#!/usr/bin/env python3
"""Run the benchmarks of time and memory, and print one table of them beside their targets.

About twenty minutes on two cores; docs/performance.md explains the table.

    python benchmarks/bench.py                # or: make bench
    python benchmarks/bench.py --out FILE     # also as Markdown
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
from common import machine

HERE = Path(__file__).parent
PARTS = ("startup", "loading", "network", "guidance", "run", "pipeline")
RATIOS = {
    ("float32", 1): 1.35, ("float32", 4): 1.2, ("float32", 8): 1.12,
    ("bfloat16", 1): 2.2, ("bfloat16", 4): 2.2, ("bfloat16", 8): 2.2,
}  # fmt: skip
OF_PEAK = {("float32", 4): 0.85, ("bfloat16", 4): 0.75}


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    target: str
    met: bool


def at_least(what: str, found: float, least: float, shown: str = "{:.2f}", more: str = "") -> Row:
    return Row(what, shown.format(found) + more, f"at least {shown.format(least)}", found >= least)


def at_most(what: str, found: float, most: float, shown: str = "{:.2f}", more: str = "") -> Row:
    return Row(what, shown.format(found) + more, f"at most {shown.format(most)}", found <= most)


def spread(row: dict[str, Any]) -> str:
    return f" ({row['lowest']:.2f} to {row['highest']:.2f})"


def startup(found: Any) -> Iterator[Row]:
    for name in list(found)[:4]:
        yield at_most(f"seconds of `{name}`", found[name], 0.4)
    beyond = found["import erk_guid; load('digits')"] - found["import torch"]
    yield at_most("seconds of the first load beyond importing torch", beyond, 0.3)


def loading(found: Any) -> Iterator[Row]:
    for row in found:
        if row["how"] == "ours":
            what = f"peak memory of loading over the weights, snapshot in {row['stored']}"
            yield at_most(what, row["peak"], 1.25)


def network(found: Any) -> Iterator[Row]:
    for row in found:
        key = row["dtype"], row["batch"]
        what = f"EDM2-XS, {row['dtype']}, batch {row['batch']}"
        yield at_least(f"{what}: speed over the plain form", row["ratio"], RATIOS[key],
                       more=spread(row))  # fmt: skip
        if key in OF_PEAK:
            yield at_least(f"{what}: share of the convolution peak", row["of_peak"], OF_PEAK[key])
        if key == ("float32", 4):
            yield at_most("EDM2-XS, float32: outputs apart", row["apart"], 1e-5, "{:.1e}")


def guidance(found: Any) -> Iterator[Row]:
    yield at_most("guidance, share of a step", found["of_a_step"], 0.001, "{:.3%}")
    yield at_most("guidance, temporaries in batches of latents", found["batches"], 2)


def run(found: Any) -> Iterator[Row]:
    for row in found:
        what = f"whole run, stored in {row['stored']}, computed in {row['precision']}"
        least = 1.15 if row["precision"] == "float32" else 2.0
        yield at_least(f"{what}: speed over the plain form", row["ratio"], least, more=spread(row))
        yield at_most(f"{what}: peak memory over it", row["peak"] / row["plain_peak"], 0.9)


def pipeline(found: Any) -> Iterator[Row]:
    for name in list(found)[:2]:
        yield at_least(
            f"{name}: images a second of a job over sampling alone",
            statistics.median(found[name]), 0.97,
            more=f" ({found[name][0]:.2f} to {found[name][-1]:.2f})",
        )  # fmt: skip
    ratio = statistics.median(b / a for a, b in zip(found["split"], found["queue"], strict=True))
    yield at_most("one of two ranks slowed by 3: queue over fixed shares (0.5 is the least)",
                  ratio, 0.6)  # fmt: skip


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| what | found | target | |", "|---|---|---|---|"]
    for row in rows:
        verdict = "" if row.met else "missed"
        lines.append(f"| {row.what} | {row.found} | {row.target} | {verdict} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--only", help=f"Some of {','.join(PARTS)}.")
@click.option("--rounds", type=int, help="For each of them.  [default: its own]")
@click.option("--out", type=click.Path(path_type=Path), help="Write the table to a file.")
def main(only: str | None, rounds: int | None, out: Path | None) -> None:
    chosen = only.split(",") if only else list(PARTS)
    unknown = set(chosen) - set(PARTS)
    if unknown:
        raise click.UsageError(f"--only: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            path = Path(folder) / f"{name}.json"
            print(f"\n{name}", flush=True)
            command = [sys.executable, str(HERE / f"{name}.py"), f"--json={path}"]
            if rounds:
                command.append(f"--rounds={rounds}")
            subprocess.run(command, check=True)
            rows += globals()[name](json.loads(path.read_text()))
    print(f"\n{machine()}\n\n{table(rows)}")
    if out:
        out.write_text(f"{machine()}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
