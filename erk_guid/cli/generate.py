"""``generate_images.py`` and ``erk-guid generate``: EDM2's command line, with options added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from erk_guid.cli.common import PathType, SeedList, refuse_inputs, reporting_errors
from erk_guid.cli.options import sampler_options
from erk_guid.cli.sampler import config_fields
from erk_guid.common.errors import printable
from erk_guid.generation.jobs import GenerationJob, run_job
from erk_guid.generation.peers import launched_rank


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--outdir",
    metavar="DIR",
    required=True,
    type=PathType(path_type=Path),
    help="Where to put the images.",
)
@click.option("--subdirs", is_flag=True, help="Make a folder for every 1000 seeds.")
@click.option(
    "--seeds",
    metavar="LIST",
    type=SeedList(),
    default="16-19",
    show_default=True,
    help="Seeds, one image each, e.g. 1,2,5-10.",
)
@sampler_options
@click.option("--resume", is_flag=True, help="Make only what is missing in --outdir.")
@click.option(
    "--overwrite", is_flag=True, help="Delete images of other settings that are in --outdir."
)
@click.option(
    "--trace",
    metavar="FILE",
    type=PathType(dir_okay=False, path_type=Path),
    help="Write per-step diagnostics of the images made to FILE (.csv or .npz).",
)
@click.option(
    "--grid",
    metavar="FILE",
    type=PathType(dir_okay=False, path_type=Path),
    help="Write a contact sheet of the images to FILE.",
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(["stop", "skip"]),
    default=GenerationJob.on_nonfinite,
    show_default=True,
    help="When an image comes out as NaN or infinity: stop, or leave it out and go on.",
)
@click.option(
    "--rank-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=GenerationJob.rank_timeout,
    show_default=True,
    help="End a process that makes no progress for so long; 0: never.",
)
@click.option("--refresh", is_flag=True, help="Download the networks again, though in the cache.")
@reporting_errors
def generate_command(
    outdir: Path,
    subdirs: bool,
    seeds: list[int],
    resume: bool,
    overwrite: bool,
    trace: Path | None,
    grid: Path | None,
    on_nonfinite: Literal["stop", "skip"],
    rank_timeout: float,
    refresh: bool,
    **options: Any,
) -> None:
    """Generate images with a diffusion model, with or without ERK guidance.

    \b
    Examples:
      # The model that ships with the package, 64 digits in 8 steps, on any machine
      python generate_images.py --preset=digits --outdir=out --seeds=0-63 --steps=8 \\
          --w_stiff=paper --grid=out.png
    \b
      # EDM2-S with classifier-free guidance and ERK guidance
      python generate_images.py --preset=edm2-img512-s-guid-fid --outdir=out --subdirs \\
          --seeds=0-49999 --steps=32 --w_stiff=1.0 --w_con=0.5
    \b
      # The same on 8 GPUs; give --resume to continue after an interruption
      torchrun --standalone --nproc_per_node=8 generate_images.py ... --resume
    """
    job = GenerationJob(
        outdir=outdir,
        subdirs=subdirs,
        seeds=seeds,
        resume=resume,
        overwrite=overwrite,
        trace=trace,
        grid=grid,
        on_nonfinite=on_nonfinite,
        rank_timeout=rank_timeout,
        refresh=refresh,
        **config_fields(**options),
    )
    refuse_inputs(trace=trace, grid=grid)
    made = run_job(job)
    if launched_rank() == 0:
        calls = job.evaluations()
        images = "image" if made == 1 else "images"
        click.echo(
            f"{made} {images} made in {printable(outdir)}, network evaluations each: {calls}"
        )
