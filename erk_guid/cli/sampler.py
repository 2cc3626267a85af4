"""From what the user typed to a `GenerationConfig`, with every mistake named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.resources import as_file
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from erk_guid.churn import NUMBERS, Churn
from erk_guid.cli.common import note_input
from erk_guid.cli.options import JOB, SOLVER_OPTIONS
from erk_guid.common.errors import printable
from erk_guid.denoisers import within
from erk_guid.generation.fits import FITTED, shipped_fit
from erk_guid.generation.peers import launched_rank
from erk_guid.guidance import (
    FORMS,
    ERKGuidance,
    Guidance,
    make_guidance,
    nearest_paper_steps,
    settings_of,
)
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.sampling import check_churn
from erk_guid.schedules import edm_sigmas, make_sigmas
from erk_guid.solvers import Solver, Step, make_solver, same_as_recorded

NOISE = "eta"
"""Option of solvers that may be added to settings: the levels stay those of the same solver."""


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
        if options["schedule"] == FITTED:
            if settings is not None:
                raise ValueError(
                    f"--schedule {FITTED} and --settings both say which levels; leave one out"
                )
            with as_file(shipped_fit(preset, options["num_steps"])) as path:
                erk, options = _from_file(path, options, leave_out=("num_steps", "schedule"))
        elif settings is not None:
            erk, options = _from_file(settings, options)
        else:
            _refuse_other_count(options)
            erk = _erk(w_stiff, w_con, bound, gate, preset, options)
        _refuse_idle(options)
        levels = _checked_levels(options)
        name = options.pop("solver")
        solver = make_solver(name, **{o: options.pop(o, None) for o in SOLVER_OPTIONS})
        try:
            erk.check(solver)
        except ValueError as error:
            raise ValueError(f"--solver {name}: {error}") from error
        plan = solver.plan(levels)  # raises where options do not fit the levels
        # Of commands that choose the number of steps themselves nothing is known here.
        if isinstance(erk, ERKGuidance) and erk.active and _given("w_stiff") and _has("num_steps"):
            _refuse_unguided(plan, erk, name)
        if options.get("afs") and len(plan) == 1 and not (solver.two_stages and levels[-1] > 0):
            raise ValueError("--afs with one step would never ask the network; take more --steps")
        churn = _churn(options, solver, erk, levels)
        if options.get("guidance_interval") and not churn.active:
            # Of commands that choose the number of steps themselves the range is known alone.
            called = _called(plan) if _has("num_steps") else None
            refuse_interval(options["guidance_interval"], called, levels)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return {**options, "solver": solver, "erk": erk, "churn": churn}


def _refuse_idle(options: dict[str, Any]) -> None:
    """Refuse options of a spacing that the noise levels do not follow.

    Raises:
        ValueError: naming the option at fault.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return
    schedule = options["schedule"]
    idle: tuple[str, ...] = ("sigma_min", "sigma_max", "rho")
    beside = "beside a list of noise levels"
    if isinstance(schedule, str):
        idle, beside = ("rho",) if schedule == "logsnr" else (), f"with --schedule {schedule}"
    for name in idle:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--{name} has nothing to act on {beside}; leave it out")


def _refuse_other_count(options: dict[str, Any]) -> None:
    """Refuse a number of steps that is not that of the noise levels on the command line.

    Raises:
        ValueError: naming both.
    """
    schedule = options["schedule"]
    if isinstance(schedule, str) or click.get_current_context(silent=True) is None:
        return
    if _given("num_steps") and options["num_steps"] != len(schedule):
        raise ValueError(
            f"--steps {options['num_steps']} and {len(schedule)} noise levels in --schedule "
            "contradict each other; leave --steps out"
        )


def _called(plan: Sequence[Step]) -> list[float]:
    """Return the noise levels at which a run calls its network."""
    called: list[float] = []

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        called.append(float(sigma))
        return torch.zeros_like(x)

    memory, x = None, torch.zeros(1, 1, dtype=torch.float64)
    for step in plan:
        _, memory = step(denoised, x, memory)
    return called


def refuse_interval(
    interval: tuple[float, float], called: list[float] | None, levels: Sequence[float]
) -> None:
    """Refuse an interval of model guidance in which a run never calls the network.

    Args:
        interval: (low, high).
        called: the noise levels at which it does; None is not known.
        levels: of a run over the same range.

    Raises:
        ValueError: naming the option at fault.
    """
    ends = [min(level for level in levels if level > 0), levels[0]]
    if called is None:
        acts = interval[0] < ends[1] and interval[1] >= ends[0]
    else:
        acts = any(within(interval, torch.tensor(s, dtype=torch.float64)) for s in called)
        ends = [min(called), max(called)]
    if not acts:
        raise ValueError(
            f"--guidance-interval {interval[0]:g},{interval[1]:g} has nothing to act on: the run "
            f"calls its network from {ends[0]:.4g} to {ends[1]:.4g}, and at no noise level in it"
        )


def _refuse_unguided(plan: Sequence[Step], erk: ERKGuidance, solver: str) -> None:
    """Refuse a strength that no step of a run can use, or that a bound of 0 switches off.

    Raises:
        ValueError: naming the option at fault.
    """
    if erk.bound == 0:
        raise ValueError("--bound 0 switches --w_stiff off; 0.2 ends runaway samples")
    memory, x = None, torch.zeros(1, 1, dtype=torch.float64)
    for step in plan:
        result, memory = step(lambda x, sigma: torch.zeros_like(x), x, memory)
        if result.pair is not None:
            return
    raise ValueError(
        f"--w_stiff {erk.w_stiff:g} has nothing to act on: a run of {solver} with {len(plan)} "
        f"step{'s'[: len(plan) > 1]} makes no pair to compare; take more --steps"
    )


def _churn(options: dict[str, Any], solver: Solver, erk: Guidance, levels: list[float]) -> Churn:
    """Remove the options of added noise from `options` and return them as a `Churn`.

    Raises:
        ValueError: naming the option at fault.
    """
    given = {name: options.pop(name) for name in NUMBERS if name in options}
    churn = Churn(**given)
    check_churn(churn, solver, erk)
    # The last level is where the run ends: no step begins there.
    if churn.active and not any(churn.gamma(level, len(levels) - 1) for level in levels[:-1]):
        raise ValueError(
            f"--S_churn {churn.S_churn:g} has nothing to act on: no step begins from --S_min "
            f"{churn.S_min:g} to --S_max {churn.S_max:g}, the run has levels from "
            f"{levels[-2]:.4g} to {levels[0]:.4g}"
        )
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
    only_gnet = options["gnet"] is not None and options["guidance"] is None
    if preset is not None:
        options = _with_preset(preset, options)
    if options["net"] is None:
        raise click.UsageError(
            "name a network with --net or --preset (--preset=digits ships with the package)"
        )
    if only_gnet and options["guidance"] in (None, 1):
        raise click.UsageError(
            f"--gnet {options['gnet']} has nothing to act on: give --guidance, such as 1.5"
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
    interval = options.get("guidance_interval")
    if interval is not None and strength == 1:
        raise click.UsageError(
            f"--guidance-interval {interval[0]:g},{interval[1]:g} has nothing to act on: give "
            "--guidance, or a preset that has model guidance"
        )
    return {**options, "guidance": strength}


def _checked_levels(options: dict[str, Any]) -> list[float]:
    """Return the noise levels of a run.

    Raises:
        ValueError: naming the option at fault.
    """
    schedule, to_zero = options["schedule"], options.get("denoise_to_zero", True)
    count = options["num_steps"] if isinstance(schedule, str) else len(schedule)
    if count == 1 and not to_zero:
        raise ValueError("--no-denoise-to-zero needs two noise levels at least, got --steps 1")
    if isinstance(schedule, str):
        names = ("num_steps", "sigma_min", "sigma_max", "rho")
        values = [options[name] for name in names]
        levels: list[float] = make_sigmas(schedule, *values).tolist()
        if schedule == "polynomial":
            edm_sigmas(*values, dtype=getattr(torch, options.get("dtype", JOB.dtype)))
        return levels if to_zero else levels[:-1]
    falling = all(a > b for a, b in pairwise([*schedule, 0.0]))
    if not falling or not all(math.isfinite(level) for level in schedule):
        raise ValueError(f"--schedule: noise levels must fall and stay above 0, got {schedule}")
    # These are not used any more, but the record should say what was done.
    options["num_steps"] = len(schedule)
    options["sigma_max"], options["sigma_min"] = schedule[0], schedule[-1]
    return [*schedule, 0.0] if to_zero else list(schedule)


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


def _from_file(
    path: Path, options: dict[str, Any], leave_out: Sequence[str] = ()
) -> tuple[Guidance, dict[str, Any]]:
    """Return a settings file's guidance, and the options with those it was made for.

    Args:
        path: the file.
        options: those of the command line.
        leave_out: options that may differ from the file's.

    Raises:
        ValueError: an option on the command line contradicts the file.
        ErkGuidError: see `read_settings`.
    """
    from erk_guid.generation.settings import read_settings

    note_input(path)
    found = read_settings(path)
    shown = {"num_steps": "steps"}
    for name in ("w_stiff", "w_con", "bound", "gate"):
        if _given(name):
            raise ValueError(f"--{name} and --settings both say how to guide; leave one out")
    typed = {name: value for name, value in options.items() if _given(name)}
    made_for = same_as_recorded(found.made_for)
    typed = same_as_recorded({"solver": made_for.get("solver", options.get("solver")), **typed})
    solver = found.solver()
    # What a file leaves out of its solver's options is at its default.
    silent = {name: getattr(solver, name) for name in SOLVER_OPTIONS
              if "solver" in made_for and name != NOISE and hasattr(solver, name)}  # fmt: skip
    for name, value in {**silent, **found.made_for}.items():
        if name in leave_out:
            continue
        if name in typed and _given(name) and typed[name] != made_for.get(name):
            option = f"--{shown.get(name, name)}"
            raise ValueError(
                f"{option} {options[name]}: {path} was made for {option} {value}; leave {option} "
                "out, or fit for it"
            )
    options = {**options, **found.made_for}
    if launched_rank() == 0:
        # Options it was made for are set; what it was measured on can only be reported.
        for name, what in (
            ("net", "network"), ("gnet", "guiding network"),
            ("guidance", "strength of model guidance"),
            ("guidance_interval", "interval of model guidance"), ("precision", "precision"),
            ("class", "class"),
        ):  # fmt: skip
            here = options.get("class_idx" if name == "class" else name)
            there = found.measured.get(name, here)
            there = tuple(there) if isinstance(there, list) else there
            if name == "gnet" and 1 in (options.get("guidance"), found.measured.get("guidance")):
                continue  # it takes no part in one of them, which is said of the strength
            if there != here:
                click.echo(
                    f"{path} was measured with the {what} {printable(there, 100)}, this is {here}",
                    err=True,
                )
        g = settings_of(found.guidance)
        chosen = g["w_stiff"]
        if not isinstance(chosen, str):
            chosen = f"{chosen:g}, w_con {g['w_con']:g}"
        levels = options["schedule"]
        count = options["num_steps"] if isinstance(levels, str) else len(levels)
        noise = f" with eta {options['eta']:g}" if options.get("eta") else ""
        click.echo(
            f"--settings {path}: w_stiff {chosen}, solver {options['solver']}{noise}, "
            f"{count} noise levels",
            err=True,
        )
    return found.guidance, options


def _has(name: str) -> bool:
    """Return whether the command has this option."""
    return click.get_current_context().get_parameter_source(name) is not None


def _given(name: str) -> bool:
    """Return whether the command has this option and the user gave it."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)


def _erk(
    w_stiff: float | str,
    w_con: float | None,
    bound: float | None,
    gate: str | None,
    preset: str | None,
    options: dict[str, Any],
) -> Guidance:
    """Return the guidance that the options ask for.

    Raises:
        ValueError: naming an option that has nothing to act on.
    """
    given = {
        name: value
        for name, value in (("w_con", w_con), ("bound", bound), ("gate", gate))
        # A gate at its default says nothing, wherever it stands.
        if _given(name) and value is not None and (name, value) != ("gate", ERKGuidance.gate)
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
        chosen = _by_word(w_stiff, w_con, preset, options)
    if not chosen.active:
        for name in ("bound", "gate"):
            if name in given:
                raise ValueError(f"--{name} has nothing to act on: --w_stiff is 0")
    return replace(chosen, **given)  # type: ignore[arg-type]


def _but_not(name: str | None, options: dict[str, Any]) -> str:
    """Return what is said of options with which a preset's settings were not measured."""
    if name is None:
        return ""
    preset = PRESETS[name]
    own = {"net": (name, preset.net), "gnet": (preset.gnet,), "guidance": (preset.guidance,),
           "guidance_interval": (None,)}  # fmt: skip
    others = [option for option, values in own.items() if options.get(option) not in values]
    spelled = ", ".join(f"--{option.replace('_', '-')}" for option in others)
    return f" (not with the {spelled} that is given)" if others else ""


def _by_word(
    word: str, w_con: float | None, preset: str | None, options: dict[str, Any]
) -> ERKGuidance:
    """Return the paper's settings, or those measured for a preset, and print which they are."""
    num_steps = options["num_steps"]
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
        whose = f"the settings measured for {preset}{_but_not(preset, options)}"
    if launched_rank() == 0:
        click.echo(
            f"--w_stiff {word}: {whose}, w_stiff {chosen.w_stiff:g}, w_con {chosen.w_con:g}"
            + ("" if w_con is None else f"; --w_con {w_con:g} as given"),
            err=True,
        )
    return chosen
