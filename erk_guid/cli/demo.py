"""``erk-guid demo``."""

from __future__ import annotations

from pathlib import Path

import click

from erk_guid.cli.common import PathType, reporting_errors
from erk_guid.common.files import check_writable


@click.command()
@click.option(
    "--outdir",
    type=PathType(file_okay=False, path_type=Path),
    default=Path("output/demo"),
    show_default=True,
)
@click.option("--device", help="cuda, mps or cpu.  [default: the best present]")
@reporting_errors
def demo_command(outdir: Path, device: str | None) -> None:
    """Sample the shipped model in six ways with the same few evaluations, and draw them."""
    from erk_guid.studies.demo import BEGINS, FILES, run_demo

    for name in FILES:
        check_writable(outdir / name, BEGINS.get(name, ()))
    run_demo(outdir, device)
