"""``scripts/reproduce.sh`` and ``erk-guid reproduce``: the paper's tables, measured."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from erk_guid.cli.common import (
    Names,
    PathType,
    SeedList,
    load_plugins,
    name_and_path,
    reporting_errors,
)
from erk_guid.cli.options import chosen_options
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import check_writable
from erk_guid.metrics.comparison import REAL
from erk_guid.studies.reproduce.planning import Reproduction, commands, settled
from erk_guid.studies.reproduce.report import write_report
from erk_guid.studies.reproduce.runner import LINES, RESULTS, check_inputs, check_plans, run
from erk_guid.studies.reproduce.tables import (
    PAPER_NUM,
    PAPER_TABLES,
    TABLES,
    choose_rows,
    settings_row,
)

JOB = Reproduction


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--table",
    "tables",
    metavar="LIST",
    type=Names(list(TABLES)),
    help="Tables: 2, 3, 4 of the paper, or digits, a sweep on the shipped model.  [default: 2,3,4]",
)
@click.option("--row", "ids", metavar="LIST", type=Names(), help="These rows only (see --dry-run).")
@click.option(
    "--settings",
    "settings",
    metavar="FILE",
    multiple=True,
    type=PathType(dir_okay=False, path_type=Path),
    help="A row of your own: what 'erk-guid fit' or 'erk-guid calibrate' wrote. Tables are then "
    "made only where --table or --row names them.",
)
@click.option(
    "--model", metavar="STR", help="Preset or file in place of the paper's models, e.g. digits."
)
@click.option(
    "--gnet",
    metavar="STR",
    help="Weaker network for the rows with autoguidance.",
)
@click.option(
    "--num",
    metavar="INT",
    type=click.IntRange(min=2, max=10_000_000),
    help=f"Images per row.  [default: {PAPER_NUM}, or as many as --seeds]",
)
@click.option(
    "--seeds", metavar="LIST", type=SeedList(), help="Seeds of the images.  [default: from 100000]"
)
@click.option(
    "--batch",
    metavar="INT",
    type=click.IntRange(min=1),
    default=JOB.batch,
    show_default=True,
    help="Images at a time, per process.",
)
@click.option(
    "--gpus",
    metavar="INT",
    type=click.IntRange(min=1),
    help="Processes, one for each GPU.  [default: all GPUs present, else 1]",
)
@click.option("--device", metavar="STR", help="cuda, mps or cpu.  [default: the best present]")
@chosen_options("precision", "compile")
@click.option(
    "--metrics", metavar="LIST", type=Names(), help="[default: those of the model's data set]"
)
@click.option(
    "--ref", metavar="STR", help="Reference statistics.  [default: of the model's data set]"
)
@click.option(
    "--detector-weights",
    metavar="NAME=FILE",
    multiple=True,
    callback=name_and_path,
    help="Local weights of a detector.",
)
@click.option(
    "--plugin",
    metavar="MODULE|FILE.py",
    multiple=True,
    callback=load_plugins,
    is_eager=True,
    help="Python code to run first, to register your own detectors.",
)
@click.option(
    "--bootstrap",
    metavar="INT",
    type=click.IntRange(min=0, max=1_000_000),
    help="Resamples for standard errors.  [default: 200 with fd_digits alone, else none]",
)
@click.option(
    "--outdir",
    metavar="DIR",
    type=PathType(path_type=Path),
    default=JOB.outdir,
    show_default=True,
    help="Where results, report and images go.",
)
@click.option(
    "--w_stiff",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    help="Strength for the guided rows of table 4, whose settings are not known here.",
)
@click.option("--w_con", metavar="FLOAT", type=click.FloatRange(min=0), help="For the same rows.")
@click.option(
    "--skip-quality", is_flag=True, help="Leave out precision, recall and inception score."
)
@click.option(
    "--real",
    metavar="DIR",
    help="Real images for precision and recall: a folder, zip or .npz.  [default: "
    f"{REAL} for the img512 models, the shipped features for digits]",
)
@click.option("--keep-images", is_flag=True, help="Do not delete a row's images once scored.")
@click.option("--dry-run", is_flag=True, help="Print the commands and run nothing.")
@reporting_errors
def reproduce_command(
    tables: list[str] | None,
    ids: list[str] | None,
    settings: tuple[Path, ...],
    dry_run: bool,
    **fields: Any,
) -> None:
    """Measure the rows of the paper's tables: generate, score, compare, report.

    Every row gets its Frechet distances. It also gets precision, recall and inception score,
    which need the real images themselves (--real; --skip-quality leaves them out).

    Each row's scores are appended to result.txt and results.jsonl in --outdir. Rows found there
    are not made again: to continue a run that was killed, repeat its command.
    At the end report.html and report.md show the paper's numbers beside the measured ones.

    \b
    Examples:
      bash scripts/reproduce.sh --real=imagenet-val-512  # everything, on all GPUs
      bash scripts/reproduce.sh --table=4 --w_stiff=0.5 --w_con=0.1
      bash scripts/reproduce.sh --table=2 --dry-run    # only say what would be run
      bash scripts/reproduce.sh --row=2-8-plain,2-8-w0.5 --num=5000
      bash scripts/reproduce.sh --model=digits --num=500 --device=cpu   # on a laptop
      bash scripts/reproduce.sh --settings=output/fit/fit-8.json       # a fit of your own
    """
    if settings and tables is None and ids is None:
        tables = []
    rows = choose_rows(PAPER_TABLES if tables is None else tables, ids or ())
    rows += [settings_row(path, fields["model"]) for path in dict.fromkeys(settings)]
    twice = [row.id for row in rows if [r.id for r in rows].count(row.id) > 1]
    if twice:
        raise ErkGuidError(f"--settings: two files would both be the row {twice[0]}; rename one")
    for name in ("w_stiff", "w_con"):
        if fields[name] is not None and all(row.w_stiff is not None for row in rows):
            raise ErkGuidError(
                f"--{name} {fields[name]:g} has nothing to act on: it is for the guided rows of "
                "table 4"
            )
    if fields["model"] is not None and ids is None:
        for row in [r for r in rows if r.fitted and r.model != fields["model"]]:
            rows.remove(row)
            click.echo(
                f"{row.id} is left out: its levels were fitted to {row.model}, not to "
                f"{fields['model']}; 'erk-guid fit' fits yours, then give --settings",
                err=True,
            )
    job = Reproduction(rows=rows, **fields)
    check_inputs(job)
    if dry_run:
        check_plans(job)
        _print_plans(job)
        return
    if tables is None and ids is None and job.w_stiff is None:
        # The other rows need no such options.
        open_rows = [row for row in rows if row.w_stiff is None]
        for row in open_rows:
            click.echo(f"{row.id} is left out: it needs --w_stiff and --w_con", err=True)
        job = replace(job, rows=[row for row in rows if row not in open_rows])
    for name in ("report.html", "report.md", LINES):
        if (job.outdir / name).exists():
            check_writable(job.outdir / name)
    try:
        run(job)
    finally:
        # Report also what was measured before a row failed.
        if os.path.isfile(job.outdir / RESULTS):
            for path in write_report(replace(job, rows=rows)):
                click.echo(f"Report: {path}")


def _print_plans(job: Reproduction) -> None:
    for row in job.rows:
        paper = ", ".join(f"{name} {value:g}" for name, value in row.paper.items())
        click.echo(
            f"# {row.id}: {row.steps} steps, {row.title}" + (f"; paper: {paper}" if paper else "")
        )
        if row.note:
            click.echo(f"#   {row.note}")
        # A row whose settings are still to be chosen is there to be read, not to be pasted.
        mark = "" if settled(job, row).settled else "# "
        for line in commands(job, row):
            click.echo(mark + line)
