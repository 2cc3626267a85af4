"""``erk-guid plot-trace``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import click

from erk_guid.cli.common import PathType, reporting_errors
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import check_writable, write_bytes


@click.command()
@click.argument("trace", type=PathType(dir_okay=False, path_type=Path))
@click.option(
    "--dest", metavar="FILE.png", type=PathType(dir_okay=False, path_type=Path),
    help="The picture; a .csv with one line per step goes beside it.  [default: next to TRACE]",
)  # fmt: skip
@click.option(
    "--title", metavar="STR", help="Title above the picture.  [default: the trace's name]"
)
@reporting_errors
def plot_trace_command(trace: Path, dest: Path | None, title: str | None) -> None:
    """Draw what a run's guidance measured and did, from the TRACE that --trace wrote.

    \b
    Example:
      python generate_images.py --preset=digits --outdir=out --seeds=0-63 --steps=8 \\
          --w_stiff=0.5 --trace=trace.csv
      erk-guid plot-trace trace.csv
    """
    from erk_guid.generation.trace import SUFFIXES, read_trace, united
    from erk_guid.generation.trace_plot import SUMMARY, draw_trace, summarize

    if trace.suffix not in SUFFIXES:
        raise ErkGuidError(f"{trace} is no trace: those end in {' or '.join(SUFFIXES)}")
    picture = dest or trace.with_suffix(".png")
    if picture.suffix != ".png":
        raise ErkGuidError(f"cannot draw to {picture}: end its name in .png")
    table = picture.with_name(picture.stem + "-steps.csv")
    if trace.resolve() in (picture.resolve(), table.resolve()):
        raise ErkGuidError(f"{table} would overwrite the trace; give another --dest")
    rows = read_trace(trace)
    found = united(rows)
    if len(found) < len(rows):
        click.echo(
            f"Note: {len(rows) - len(found)} rows of {trace} have a seed and a step that another "
            "row has; the last of them counts",
            err=True,
        )
    summary = summarize(found)
    check_writable(picture)
    check_writable(table, [",".join(SUMMARY).encode()])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SUMMARY)
    writer.writerows([f"{value:.6g}" if value == value else "" for value in row] for row in summary)
    write_bytes(table, text.getvalue().encode())
    write_bytes(picture, draw_trace(summary, title or trace.name))
    click.echo(f"Written: {picture} and {table}")
