"""``generate_images.py`` and ``erk-guid generate``: EDM2's command line, and ours on top."""

from __future__ import annotations

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from erk_guid.checkpoints.presets import PRESETS
from erk_guid.cli.common import NumberOr, SeedList, reporting_errors
from erk_guid.guidance import Guidance, nearest_paper_steps
from erk_guid.jobs import GenerationJob, launched_rank, run_job
from erk_guid.schedules import karras_sigmas
from erk_guid.steps import SOLVERS

JOB = GenerationJob  # its field defaults are the one home of this command's defaults


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--preset",
    metavar="STR",
    help="Published model with its settings; 'digits' ships with the package.",
)
@click.option("--net", metavar="PATH|URL", help="Network: .pkl, .safetensors, URL or preset name.")
@click.option(
    "--gnet", metavar="PATH|URL", help="Guiding network for model guidance (CFG, autoguidance)."
)
@click.option(
    "--outdir",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
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
@click.option(
    "--class",
    "class_idx",
    metavar="INT",
    type=click.IntRange(min=0),
    help="Make this class only.  [default: a random one per seed]",
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
    "--steps",
    "num_steps",
    metavar="INT",
    type=click.IntRange(min=1),
    default=JOB.num_steps,
    show_default=True,
    help="Noise levels; N steps take 2N-1 network evaluations.",
)
@click.option(
    "--sigma_min",
    metavar="FLOAT",
    type=float,
    default=JOB.sigma_min,
    show_default=True,
    help="Lowest noise level before 0.",
)
@click.option(
    "--sigma_max",
    metavar="FLOAT",
    type=float,
    default=JOB.sigma_max,
    show_default=True,
    help="Highest noise level.",
)
@click.option(
    "--rho",
    metavar="FLOAT",
    type=float,
    default=JOB.rho,
    show_default=True,
    help="Exponent of the noise levels.",
)
@click.option(
    "--guidance",
    metavar="FLOAT",
    type=float,
    help="Strength of model guidance.  [default: the preset's, else 1]",
)
@click.option(
    "--S_churn",
    "--s_churn",
    "s_churn",
    metavar="FLOAT",
    type=float,
    default=0.0,
    show_default=True,
    help="EDM2's stochasticity; must be 0 here.",
)
@click.option(
    "--S_min",
    "--s_min",
    "s_min",
    metavar="FLOAT",
    type=float,
    default=0.0,
    show_default=True,
    help="Belongs to --S_churn.",
)
@click.option(
    "--S_max",
    "--s_max",
    "s_max",
    metavar="FLOAT",
    type=float,
    default=float("inf"),
    show_default=True,
    help="Belongs to --S_churn.",
)
@click.option(
    "--S_noise",
    "--s_noise",
    "s_noise",
    metavar="FLOAT",
    type=float,
    default=1.0,
    show_default=True,
    help="Belongs to --S_churn.",
)
@click.option(
    "--w_stiff",
    metavar="FLOAT|paper",
    type=NumberOr("paper"),
    default=JOB.w_stiff,
    show_default=True,
    help="Strength of ERK guidance: 0 is the plain solver, 'paper' the paper's for these steps.",
)
@click.option(
    "--w_con",
    metavar="FLOAT",
    type=float,
    help=f"Stiffness above which it acts.  [default: {JOB.w_con:g}, with 'paper' the paper's]",
)
@click.option(
    "--solver",
    type=click.Choice(sorted(SOLVERS)),
    default=JOB.solver,
    show_default=True,
    help="How to step; euler has no embedded pair, so no ERK guidance.",
)
@click.option("--device", metavar="STR", help="cuda, mps or cpu.  [default: the best present]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    default=JOB.dtype,
    show_default=True,
    help="Precision of the sampling loop.",
)
@click.option("--resume", is_flag=True, help="Make only what is missing in --outdir.")
@click.option(
    "--encoder-batch",
    metavar="INT",
    type=click.IntRange(min=1),
    help="Latents decoded at a time by the VAE.  [default: the file's]",
)
@click.option(
    "--vae", metavar="DIR|NAME", help="Folder or hub name of the VAE, in place of the file's."
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write per-step diagnostics of the images made to FILE (.csv or .npz).",
)
@click.option(
    "--grid",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a contact sheet of the images to FILE.",
)
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Run the code inside a .pkl (for networks that are not ours; trusted files only).",
)
@reporting_errors
def generate_command(
    preset: str | None, w_stiff: float | str, w_con: float | None, **options: Any
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
    if options.pop("s_churn") != 0:
        raise click.UsageError(
            "--S_churn must be 0: ERK guidance compares two solutions at one noise level, and "
            "churn moves one of them; leave the option out"
        )
    for unused in ("s_min", "s_max", "s_noise"):
        del options[unused]
    if preset is not None:
        options = _with_preset(preset, options)
    if options["net"] is None:
        raise click.UsageError(
            "name a network with --net or --preset (--preset=digits ships with the package)"
        )
    if options["guidance"] is None:
        options["guidance"] = JOB.guidance
    if not math.isfinite(options["guidance"]):
        raise click.UsageError(
            f"--guidance must be a finite number, got {options['guidance']}; 1 switches it off"
        )
    if options["guidance"] != 1 and options["gnet"] is None:
        raise click.UsageError(
            f"--guidance {options['guidance']:g} needs a guiding network: give --gnet, or a preset "
            "that has one, or leave out --guidance"
        )
    try:
        guidance = _erk_guidance(w_stiff, w_con, options["num_steps"])
        karras_sigmas(
            options["num_steps"], options["sigma_min"], options["sigma_max"], options["rho"]
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if guidance.active and not SOLVERS[options["solver"]].has_pair:
        raise click.UsageError(
            f"--solver {options['solver']} has no embedded pair to guide with; use heun, or "
            "--w_stiff 0"
        )
    made = run_job(GenerationJob(**options, w_stiff=guidance.w_stiff, w_con=guidance.w_con))
    if launched_rank() == 0:
        click.echo(f"{made} images made in {options['outdir']}")


def _with_preset(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the command line leaves open."""
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "'erk-guid presets' lists them"
        raise click.UsageError(f"unknown --preset {name!r}; {hint}")
    preset = PRESETS[name]
    filled = dict(options)
    for key, value in (("net", preset.net), ("gnet", preset.gnet), ("guidance", preset.guidance)):
        if filled[key] is None:
            # The name itself, where it means the same: it reads better in run.json.
            filled[key] = name if key == "net" else value
    return filled


def _erk_guidance(w_stiff: float | str, w_con: float | None, num_steps: int) -> Guidance:
    if w_stiff != "paper":
        return Guidance(float(w_stiff), JOB.w_con if w_con is None else w_con)
    paper = Guidance.paper(num_steps)
    if launched_rank() == 0:
        click.echo(
            f"--w_stiff paper: the paper's settings for {nearest_paper_steps(num_steps)} steps, "
            f"w_stiff {paper.w_stiff:g}, w_con {paper.w_con:g}"
            + ("" if w_con is None else f"; --w_con {w_con:g} as given")
        )
    return paper if w_con is None else Guidance(paper.w_stiff, w_con)
