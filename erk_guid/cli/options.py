"""The options that say how images are made, shared by every command that makes some."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from erk_guid.churn import Churn
from erk_guid.cli.common import Interval, NumberOr, PathType, note_input
from erk_guid.cli.derived import described, options_of_classes
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.fits import FITTED
from erk_guid.guidance import (
    FORMS,
    ERKGuidance,
)
from erk_guid.models.checkpoints.loading import PRECISIONS
from erk_guid.models.encoders import GENERATION_VAE_BATCH
from erk_guid.schedules import SCHEDULES
from erk_guid.solvers import SOLVERS, names_of_options, names_of_solvers

F = TypeVar("F", bound=Callable[..., Any])
JOB = GenerationConfig  # these options' defaults are its field defaults
GUIDANCE_HELP = described(ERKGuidance)
SOLVER_OPTIONS = tuple(names_of_options())


def _options_of_solvers() -> dict[str, Callable[[Any], Any]]:
    """Return the solvers' options.

    Raises:
        TypeError: a solver's field has the name of another option.
    """
    taken = {
        "guidance",
        *(f.name for kind in (GenerationConfig, Churn, ERKGuidance) for f in fields(kind)),
    }
    for name in SOLVER_OPTIONS:
        if name in taken:
            raise TypeError(f"a solver's field cannot be called {name!r}: that is another option")
    return options_of_classes(SOLVERS)


_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "preset": click.option(
        "--preset",
        metavar="STR",
        help="Published model with its settings; 'digits' ships with the package.",
    ),
    "net": click.option(
        "--net",
        metavar="PATH|URL",
        help="Network: .pkl, .safetensors, URL, preset name, or a folder in diffusers' layout "
        "(also OWNER/NAME[/FOLDER][@REVISION] on the Hugging Face hub).",
    ),
    "gnet": click.option(
        "--gnet", metavar="PATH|URL", help="Guiding network for model guidance (CFG, autoguidance)."
    ),
    "class_idx": click.option(
        "--class",
        "class_idx",
        metavar="INT",
        type=click.IntRange(min=0),
        help="Make this class only.  [default: a random one per seed]",
    ),
    "batch": click.option(
        "--batch",
        metavar="INT",
        type=click.IntRange(min=1),
        default=JOB.batch,
        show_default=True,
        help="Images at a time, per process.",
    ),
    "num_steps": click.option(
        "--steps",
        "num_steps",
        metavar="INT",
        type=click.IntRange(min=1),
        default=JOB.num_steps,
        show_default=True,
        help="Noise levels. N steps take 2N-1 network evaluations with heun and dpm2, else N.",
    ),
    "sigma_min": click.option(
        "--sigma_min",
        metavar="FLOAT",
        type=float,
        default=JOB.sigma_min,
        show_default=True,
        help="Lowest noise level before 0.",
    ),
    "sigma_max": click.option(
        "--sigma_max",
        metavar="FLOAT",
        type=float,
        default=JOB.sigma_max,
        show_default=True,
        help="Highest noise level.",
    ),
    "rho": click.option(
        "--rho",
        metavar="FLOAT",
        type=float,
        default=JOB.rho,
        show_default=True,
        help="Exponent of the noise levels.",
    ),
    "guidance": click.option(
        "--guidance",
        metavar="FLOAT",
        type=float,
        help="Strength of model guidance.  [default: the preset's, else 1]",
    ),
    "guidance_interval": click.option(
        "--guidance-interval",
        metavar="LOW,HIGH",
        type=Interval(),
        help="Model guidance only where LOW < sigma <= HIGH; the guiding network is not run "
        "elsewhere.",
    ),
    "S_churn": click.option(
        "--S_churn",
        "--s_churn",
        "S_churn",
        metavar="FLOAT",
        type=float,
        default=Churn.S_churn,
        show_default=True,
        help="Noise added before the steps, as in EDM2; heun, euler, dpm2 without ERK guidance.",
    ),
    "S_min": click.option(
        "--S_min",
        "--s_min",
        "S_min",
        metavar="FLOAT",
        type=float,
        default=Churn.S_min,
        show_default=True,
        help="Lowest noise level at which --S_churn acts.",
    ),
    "S_max": click.option(
        "--S_max",
        "--s_max",
        "S_max",
        metavar="FLOAT",
        type=float,
        default=Churn.S_max,
        show_default=True,
        help="Highest noise level at which --S_churn acts.",
    ),
    "S_noise": click.option(
        "--S_noise",
        "--s_noise",
        "S_noise",
        metavar="FLOAT",
        type=float,
        default=Churn.S_noise,
        show_default=True,
        help="Standard deviation of the noise that --S_churn adds.",
    ),
    "w_stiff": click.option(
        "--w_stiff",
        metavar="|".join(["FLOAT", *FORMS, "paper", "preset"]),
        type=NumberOr(*FORMS, "paper", "preset"),
        default=ERKGuidance.w_stiff,
        show_default=True,
        help="Strength of ERK guidance: 0 is the plain solver, 'auto' the parameter-free form "
        f"({', '.join(names_of_solvers(two_stages=True))}), 'paper' the paper's choice, "
        "'preset' the one measured best for --preset.",
    ),
    "w_con": click.option(
        "--w_con",
        metavar="FLOAT",
        type=float,
        help=f"{GUIDANCE_HELP['w_con']}  [default: {ERKGuidance.w_con:g}, or as the word for "
        "--w_stiff sets it]",
    ),
    "settings": click.option(
        "--settings",
        metavar="FILE",
        type=PathType(dir_okay=False, path_type=Path),
        help="Take --w_stiff, --w_con, the solver and the noise levels from a file that "
        "'erk-guid fit' or 'erk-guid calibrate' wrote.",
    ),
    **options_of_classes({"": ERKGuidance}, ("w_stiff", "w_con"), with_defaults=True),
    "solver": click.option(
        "--solver",
        type=click.Choice(sorted(SOLVERS)),
        default="heun",
        show_default=True,
        help=f"Solver. ERK guidance works with {', '.join(names_of_solvers(has_pair=True))}.",
    ),
    **_options_of_solvers(),
    "schedule": click.option(
        "--schedule",
        metavar="|".join([*SCHEDULES, FITTED]) + "|LIST|FILE",
        default=JOB.schedule,
        show_default=True,
        callback=lambda ctx, param, value: _schedule(value, ctx),
        help="Spacing of the noise levels, or the levels themselves: 80,20,5,1,0.1 or a file. "
        "'fitted' is what was fitted for --preset and that number of steps, solver included.",
    ),
    "afs": click.option("--afs", is_flag=True, help="Analytical first step: saves one evaluation."),
    "denoise_to_zero": click.option(
        "--denoise-to-zero/--no-denoise-to-zero",
        default=JOB.denoise_to_zero,
        show_default=True,
        help="End with an Euler step to sigma = 0, or stop at the last noise level.",
    ),
    "device": click.option(
        "--device", metavar="STR", help="cuda, mps or cpu.  [default: the best present]"
    ),
    "dtype": click.option(
        "--dtype",
        type=click.Choice(["float32", "float64"]),
        default=JOB.dtype,
        show_default=True,
        help="Precision of the sampling loop.",
    ),
    "precision": click.option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="What the networks compute in; the sampling loop keeps --dtype. float16 is for CUDA."
        "  [default: what the file asks for]",
    ),
    "compile": click.option(
        "--compile",
        is_flag=True,
        help="Compile the networks with torch.compile; for long runs on a GPU. It takes about a "
        "minute for each network, and again for a last batch of another size. On a CPU it makes "
        "nothing faster.",
    ),
    "encoder_batch": click.option(
        "--encoder-batch",
        metavar="INT",
        type=click.IntRange(min=1),
        help=f"Latents decoded at a time by the VAE.  [default: {GENERATION_VAE_BATCH}]",
    ),
    "vae": click.option(
        "--vae", metavar="DIR|NAME", help="Folder or hub name of the VAE, in place of the file's."
    ),
    "trust_pickle": click.option(
        "--trust-pickle",
        is_flag=True,
        help="Run the code inside a .pkl (for networks that are not ours; trusted files only).",
    ),
}


def sampler_options(command: F) -> F:
    """Add all the options; the command passes their values to `config_fields`."""
    return chosen_options(*_OPTIONS)(command)


def chosen_options(*names: str) -> Callable[[F], F]:
    """Add some of the options, by their parameters' names, for commands that make no images."""

    def add(command: F) -> F:
        for name in reversed(names):
            command = _OPTIONS[name](command)
        return command

    return add


def _schedule(value: str, ctx: click.Context) -> str | tuple[float, ...]:
    """Read a schedule's name, or noise levels from a list or a file (a 0 at the end is implied)."""
    if value in SCHEDULES:
        return value
    if value == FITTED:
        if all(param.name != "settings" for param in ctx.command.params):
            raise click.BadParameter(f"{FITTED!r} is for commands that make images")
        return value
    path = Path(value)
    text = value
    if "," not in value:
        try:
            found = path.is_file()
        except OSError:  # too long for a file name
            found = False
        if not found:
            raise click.BadParameter(
                f"{value!r} is none of {', '.join(SCHEDULES)}, no list such as 80,5,0.1, no file"
            )
        note_input(path)
        try:
            text = path.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise click.BadParameter(f"cannot read {value}: {error.strerror}") from error
    try:
        levels = [float(part) for part in re.split(r"[\s,]+", text.strip())]
    except ValueError as error:
        raise click.BadParameter(f"noise levels are numbers: {error}") from error
    levels = levels[:-1] if levels[-1] == 0 else levels
    if not levels:
        raise click.BadParameter("a list of noise levels needs one above 0")
    return tuple(levels)
