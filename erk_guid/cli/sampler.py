"""Options that say how images are made, shared by every command that makes images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from erk_guid.churn import NUMBERS, Churn
from erk_guid.cli.common import NumberOr
from erk_guid.cli.derived import described, options_of_classes
from erk_guid.common.errors import printable
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.process_groups import launched_rank
from erk_guid.guidance import (
    FORMS,
    ERKGuidance,
    Guidance,
    make_guidance,
    nearest_paper_steps,
    settings_of,
)
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.models.encoders import GENERATION_VAE_BATCH
from erk_guid.sampling import check_churn
from erk_guid.schedules import SCHEDULES, edm_sigmas, make_sigmas
from erk_guid.solvers import SOLVERS, Solver, make_solver, names_of_solvers

F = TypeVar("F", bound=Callable[..., Any])
JOB = GenerationConfig  # these options' defaults are its field defaults
GUIDANCE_HELP = described(ERKGuidance)
SOLVER_OPTIONS = tuple(dict.fromkeys(f.name for kind in SOLVERS.values() for f in fields(kind)))  # type: ignore[arg-type]

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
        help="Noise levels; N steps take 2N-1 network evaluations.",
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
        type=click.Path(dir_okay=False, path_type=Path),
        help="Take --w_stiff, --w_con, the solver and the noise levels from the file that "
        "'erk-guid calibrate' wrote.",
    ),
    **options_of_classes({"": ERKGuidance}, ("w_stiff", "w_con"), with_defaults=True),
    "solver": click.option(
        "--solver",
        type=click.Choice(sorted(SOLVERS)),
        default="heun",
        show_default=True,
        help=f"Solver. ERK guidance works with {', '.join(names_of_solvers(has_pair=True))}.",
    ),
    **options_of_classes(SOLVERS),
    "schedule": click.option(
        "--schedule",
        metavar="|".join(SCHEDULES) + "|LIST|FILE",
        default=JOB.schedule,
        show_default=True,
        callback=lambda ctx, param, value: _schedule(value),
        help="Spacing of the noise levels, or the levels themselves: 80,20,5,1,0.1 or a file.",
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


def config_fields(
    preset: str | None,
    w_stiff: float | str,
    w_con: float | None,
    bound: float | None,
    gate: str | None,
    settings: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Check what the user asked for, and return it as fields of a `GenerationConfig`.

    Raises:
        click.UsageError: naming the option at fault.
    """
    options = preset_fields(preset, options)
    try:
        if settings is not None:
            erk, options = _from_file(settings, options)
        else:
            erk = _erk(w_stiff, w_con, bound, gate, options["num_steps"], preset)
        _check_levels(options)
        solver = make_solver(
            options.pop("solver"), **{name: options.pop(name, None) for name in SOLVER_OPTIONS}
        )
        erk.check(solver)
        churn = _churn(options, solver, erk)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return {**options, "solver": solver, "erk": erk, "churn": churn}


def _churn(options: dict[str, Any], solver: Solver, erk: Guidance) -> Churn:
    """Remove the options of added noise from `options` and return them as a `Churn`.

    Raises:
        ValueError: naming the option at fault.
    """
    given = {name: options.pop(name) for name in NUMBERS if name in options}
    churn = Churn(**given)
    check_churn(churn, solver, erk)
    if not churn.active:
        for name in NUMBERS[1:]:
            if name in given and given[name] != getattr(Churn, name):
                raise ValueError(f"--{name} has nothing to act on: --S_churn is 0")
    return churn


def preset_fields(preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with `net`, `gnet` and `guidance` filled from the preset and checked.

    Raises:
        click.UsageError: naming the option at fault.
    """
    if preset is not None:
        options = _with_preset(preset, options)
    if options["net"] is None:
        raise click.UsageError(
            "name a network with --net or --preset (--preset=digits ships with the package)"
        )
    strength = JOB.guidance if options["guidance"] is None else options["guidance"]
    if not math.isfinite(strength):
        raise click.UsageError(
            f"--guidance must be a finite number, got {strength}; 1 switches it off"
        )
    if strength != 1 and options["gnet"] is None:
        raise click.UsageError(
            f"--guidance {strength:g} needs a guiding network: give --gnet, or a preset "
            "that has one, or leave out --guidance"
        )
    return {**options, "guidance": strength}


def _schedule(value: str) -> str | tuple[float, ...]:
    """Read a schedule's name, or noise levels from a list or a file (a 0 at the end is implied)."""
    if value in SCHEDULES:
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
        try:
            text = path.read_text(errors="replace")
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


def _check_levels(options: dict[str, Any]) -> None:
    schedule = options["schedule"]
    count = options["num_steps"] if isinstance(schedule, str) else len(schedule)
    if count == 1 and not options.get("denoise_to_zero", True):
        raise ValueError("--no-denoise-to-zero needs two noise levels at least, got --steps 1")
    if isinstance(schedule, str):
        names = ("num_steps", "sigma_min", "sigma_max", "rho")
        values = [options[name] for name in names]
        make_sigmas(schedule, *values)
        if schedule == "polynomial":
            edm_sigmas(*values, dtype=getattr(torch, options.get("dtype", JOB.dtype)))
        return
    falling = all(a > b for a, b in pairwise([*schedule, 0.0]))
    if not falling or not all(math.isfinite(level) for level in schedule):
        raise ValueError(f"--schedule: noise levels must fall and stay above 0, got {schedule}")
    # These are not used any more, but the record should say what was done.
    options["num_steps"] = len(schedule)
    options["sigma_max"], options["sigma_min"] = schedule[0], schedule[-1]


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
            # The preset's name means the same network, and reads better in run.json.
            filled[key] = name if key == "net" else value
    return filled


def _from_file(path: Path, options: dict[str, Any]) -> tuple[Guidance, dict[str, Any]]:
    """Return a settings file's guidance, and the options with those it was made for.

    Raises:
        ValueError: an option on the command line contradicts the file.
        ErkGuidError: see `read_settings`.
    """
    from erk_guid.studies.calibration.settings import read_settings

    found = read_settings(path)
    shown = {"num_steps": "steps"}
    for name in ("w_stiff", "w_con", "bound", "gate"):
        if _given(name):
            raise ValueError(f"--{name} and --settings both say how to guide; leave one out")
    for name, value in found.made_for.items():
        if _given(name) and options[name] != value:
            option = f"--{shown.get(name, name)}"
            raise ValueError(
                f"{option} {options[name]}: {path} was made for {option} {value}; leave {option} "
                "out, or calibrate for it"
            )
    options = {**options, **found.made_for}
    if launched_rank() == 0:
        # Options it was made for are set; what it was measured on can only be reported.
        for name, what in (("net", "network"), ("guidance", "strength of model guidance")):
            there = found.measured.get(name, options[name])
            if there != options[name]:
                click.echo(
                    f"{path} was measured with the {what} {printable(there, 100)}, this is "
                    f"{options[name]}",
                    err=True,
                )
        g = settings_of(found.guidance)
        chosen = g["w_stiff"]
        if not isinstance(chosen, str):
            chosen = f"{chosen:g}, w_con {g['w_con']:g}"
        click.echo(
            f"--settings {path}: w_stiff {chosen}, solver {options['solver']}, steps "
            f"{options['num_steps']}"
        )
    return found.guidance, options


def _given(name: str) -> bool:
    """Return whether the user gave this option."""
    source = click.get_current_context().get_parameter_source(name)
    return source != click.core.ParameterSource.DEFAULT


def _erk(
    w_stiff: float | str,
    w_con: float | None,
    bound: float | None,
    gate: str | None,
    num_steps: int,
    preset: str | None,
) -> Guidance:
    """Return the guidance that the options ask for.

    Raises:
        ValueError: naming an option that has nothing to act on.
    """
    given = {
        name: value
        for name, value in (("w_con", w_con), ("bound", bound), ("gate", gate))
        if _given(name) and value is not None
    }
    if isinstance(w_stiff, str) and w_stiff in FORMS:
        for name, value in given.items():
            shown = value if isinstance(value, str) else f"{value:g}"
            raise ValueError(f"--{name} {shown} has no part in --w_stiff {w_stiff}; leave it out")
        return make_guidance(w_stiff)
    if not isinstance(w_stiff, str):
        if "w_con" in given and not _given("w_stiff"):
            raise ValueError(f"--w_con {w_con:g} has nothing to act on: give --w_stiff, too")
        chosen = ERKGuidance(float(w_stiff))
    else:
        chosen = _by_word(w_stiff, w_con, num_steps, preset)
    if not chosen.active:
        for name in ("bound", "gate"):
            if name in given:
                raise ValueError(f"--{name} has nothing to act on: --w_stiff is 0")
    return replace(chosen, **given)  # type: ignore[arg-type]


def _by_word(word: str, w_con: float | None, num_steps: int, preset: str | None) -> ERKGuidance:
    """Return the paper's settings, or those measured for a preset, and print which they are."""
    if word == "paper":
        chosen = ERKGuidance.paper(num_steps)
        whose = f"the paper's settings for {nearest_paper_steps(num_steps)} steps"
    else:
        measured = PRESETS[preset].erk if preset else None
        if measured is None:
            known = ", ".join(name for name, value in PRESETS.items() if value.erk)
            raise ValueError(
                f"--w_stiff preset: no settings were measured for {preset or 'this network'}, only "
                f"for {known}; give a number, or 'paper'"
            )
        chosen = ERKGuidance(*measured)
        whose = f"the settings measured for {preset}"
    if launched_rank() == 0:
        click.echo(
            f"--w_stiff {word}: {whose}, w_stiff {chosen.w_stiff:g}, w_con {chosen.w_con:g}"
            + ("" if w_con is None else f"; --w_con {w_con:g} as given")
        )
    return chosen
