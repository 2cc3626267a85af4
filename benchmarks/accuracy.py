#!/usr/bin/env python3
"""Measure every solver's error against evaluations, on exact problems and the shipped model.

These are the tables of docs/accuracy.md. For one problem at a time, run
`erk-guid accuracy --problem tree5` or `erk-guid accuracy --net YOURS`.

    python benchmarks/accuracy.py --outdir output/accuracy
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from common import machine

RUNS = {
    "tree5": ["--problem=tree5", "--num=1000"],
    "tree80": ["--problem=tree80", "--num=1000"],
    "gauss": ["--problem=gauss", "--num=1000"],
    "mixture64": ["--problem=mixture64", "--num=200"],
    "wide": ["--problem=wide", "--num=500"],
    "discrete": ["--problem=discrete", "--num=500"],
    "digits": ["--net=digits", "--num=64"],
    "digits-cfg3": ["--preset=digits-guid", "--guidance=3", "--num=32", "--no-outside"],
    "digits-autog": ["--preset=digits-autog", "--num=32", "--no-outside"],
}


@click.command(help=__doc__)
@click.option("--outdir", default=Path("output/accuracy"), type=click.Path(path_type=Path))
@click.option("--only", type=click.Choice(list(RUNS)), help="One of them.")
def main(outdir: Path, only: str | None) -> None:
    print(machine())
    for name, options in RUNS.items():
        if only in (None, name):
            command = [sys.executable, "-m", "erk_guid", "accuracy", *options]
            subprocess.run([*command, f"--outdir={outdir / name}"], check=True)


if __name__ == "__main__":
    main()
