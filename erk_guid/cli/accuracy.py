"""``erk-guid accuracy``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from erk_guid.cli.common import (
    Names,
    PathType,
    SeedList,
    note_input,
    refuse_inputs,
    reporting_errors,
)
from erk_guid.cli.options import chosen_options
from erk_guid.cli.sampler import preset_fields, refuse_interval
from erk_guid.common.errors import MissingExtraError
from erk_guid.common.files import check_writable, write_bytes
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.locks import locked
from erk_guid.generation.process_groups import ProcessGroup

if TYPE_CHECKING:
    from erk_guid.studies.accuracy import Method
    from erk_guid.studies.accuracy.measuring import Table
    from erk_guid.studies.accuracy.nearness import Nearness

MOST = 10_000
"""Largest number of evaluations of a run."""
NETWORK_OPTIONS = (
    "gnet", "guidance", "guidance_interval", "class_idx", "fine", "batch",
    "sigma_min", "sigma_max", "device", "dtype", "precision", "compile", "trust_pickle",
)  # fmt: skip
"""Options that an exact problem does not use."""
RECORDED = (
    "net_sha256", "gnet_sha256", "guidance", "guidance_interval", "class", "sigma_min",
    "sigma_max", "dtype", "precision", "device",
)  # fmt: skip


@click.command()
@chosen_options("net", "preset", "gnet", "guidance", "guidance_interval", "class_idx")
@click.option(
    "--problem",
    "problem_name",
    metavar="NAME",
    help="Exact problem in place of a network: tree5, tree80, gauss, mixture64, wide, discrete.",
)
@click.option(
    "--num",
    metavar="INT",
    type=click.IntRange(min=2, max=1_000_000),
    help="Number of points.  [default: 32, or 200 with --problem]",
)
@click.option(
    "--seeds", metavar="LIST", type=SeedList(), help="Seeds of the images, in place of --num."
)
@click.option(
    "--evaluations",
    metavar="LIST",
    type=SeedList(),
    default="6,10,14,20,30",
    show_default=True,
    help="Network evaluations a run may take; even numbers.",
)
@click.option(
    "--methods",
    metavar="LIST",
    type=Names(),
    help="Beginnings of methods' names, e.g. heun,modal.  [default: all]",
)
@click.option(
    "--settings",
    metavar="FILE",
    multiple=True,
    type=PathType(dir_okay=False, path_type=Path),
    help="Settings that 'erk-guid fit' wrote, as the row 'fitted'; give one for each number of "
    "evaluations.",
)
@click.option(
    "--as-near-as",
    "as_near_as",
    metavar="INT",
    type=click.IntRange(min=0),
    default=GenerationConfig.num_steps,
    show_default=True,
    help="Find how many evaluations each method takes to be as near as plain Heun with this many "
    "noise levels; 0 leaves that out, and takes about half the time.",
)
@click.option("--list", "list_them", is_flag=True, help="List the methods and exit.")
@click.option(
    "--outside/--no-outside",
    default=True,
    show_default=True,
    help="Run diffusers' schedulers too, as an independent check.",
)
@click.option(
    "--fine",
    metavar="INT",
    type=click.IntRange(min=8),
    default=256,
    show_default=True,
    help="Evaluations of the fine solution, used as the exact one.",
)
@chosen_options(
    "batch", "sigma_min", "sigma_max", "device", "dtype", "precision", "compile", "trust_pickle"
)
@click.option(
    "--outdir",
    type=PathType(file_okay=False, path_type=Path),
    default=Path("output/accuracy"),
    show_default=True,
    help="For accuracy.csv, .md, .svg and .json, and as-near.csv, .md and .svg.",
)
@reporting_errors
def accuracy_command(
    net: str | None,
    preset: str | None,
    gnet: str | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    class_idx: int | None,
    problem_name: str | None,
    num: int | None,
    seeds: list[int] | None,
    evaluations: list[int],
    methods: list[str] | None,
    settings: tuple[Path, ...],
    as_near_as: int,
    list_them: bool,
    outside: bool,
    fine: int,
    batch: int,
    sigma_min: float,
    sigma_max: float,
    device: str | None,
    dtype: str,
    precision: str | None,
    compile: bool,
    trust_pickle: bool,
    outdir: Path,
) -> None:
    """Measure how near each solver comes to the exact solution, on your own network.

    Every method starts from the same noise and gets the same number of network evaluations. The
    table shows the mean distance of its images (latents) to those of a fine solution. A second
    table says how many evaluations, and seconds, each one takes to be as near as plain Heun with
    the number of noise levels that --as-near-as names. This measures fidelity to the ODE, not which
    images look better.

    \b
    Examples:
      erk-guid accuracy --net=digits
      erk-guid accuracy --preset=edm2-img512-s-guid-fid --num=16 --methods=heun,modal,dpmpp
      erk-guid accuracy --problem=tree80
    """
    from erk_guid.studies.accuracy import METHODS, PROBLEMS, as_near, make_problem, measure
    from erk_guid.studies.accuracy.methods import choose_methods, fitted_row
    from erk_guid.studies.accuracy.network import network_problem
    from erk_guid.studies.accuracy.writing import (
        BEGINS,
        NEARNESS_FILES,
        TABLE_FILES,
        write_nearness,
        write_table,
    )

    if list_them:
        click.echo("\n".join(METHODS))
        return
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "the plot")
    if outside and find_spec("diffusers") is None:
        click.echo("diffusers is not installed: its schedulers are left out", err=True)
        outside = False
    try:
        chosen = choose_methods(methods or [], outside)
        for path in settings:
            note_input(path)
        if settings:
            row = fitted_row(settings, sigma_min, sigma_max)
            unused = sorted(set(row.fits) - set(evaluations))
            odd = [count for count in unused if count % 2]
            if odd:
                raise ValueError(
                    f"--settings: one is for {odd[0]} evaluations; here even numbers are compared, "
                    "for some methods take two at a time"
                )
            if unused:
                raise ValueError(
                    f"--settings: one is for {unused[0]} evaluations, which --evaluations lacks"
                )
            chosen.append(row)
        bad = [count for count in evaluations if not 2 <= count <= MOST or count % 2]
        if bad:
            raise ValueError(f"--evaluations: {bad[0]} is not an even number of 2 to {MOST}")
        if as_near_as == 1 or as_near_as > MOST:
            raise ValueError(f"--as-near-as {as_near_as} is not 0 or a number of 2 to {MOST}")
        longest = max(*evaluations, 2 * (as_near_as - 1))
        if problem_name is None and fine < 4 * longest:
            of = " (--as-near-as)" if longest > max(evaluations) else ""
            raise ValueError(
                f"--fine {fine} is too coarse to judge runs of {longest} evaluations{of} by; "
                f"take {4 * longest} or more"
            )
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"--sigma_min {sigma_min:g} must be above 0 and below --sigma_max {sigma_max:g}"
            )
        if (problem_name is None) == (net is None and preset is None):
            raise ValueError("name a network with --net or --preset, or an exact --problem")
        if seeds is not None and (num is not None or problem_name is not None):
            raise ValueError("--seeds stands in place of --num, and goes with a network")
        if problem_name is not None:
            source = click.get_current_context().get_parameter_source
            for name in NETWORK_OPTIONS:
                if source(name) == click.core.ParameterSource.COMMANDLINE:
                    shown = {"class_idx": "class"}.get(name, name)
                    shown = shown if name.startswith("sigma") else shown.replace("_", "-")
                    raise ValueError(f"--{shown} goes with a network, not with --problem")
        if problem_name is not None and problem_name not in PROBLEMS:
            raise ValueError(f"--problem {problem_name!r}: known are {', '.join(PROBLEMS)}")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    recorded: dict[str, Any]
    fields = None
    if problem_name is None:
        given = {
            "net": net, "gnet": gnet, "guidance": guidance,
            "guidance_interval": guidance_interval, "class_idx": class_idx,
        }  # fmt: skip
        fields = preset_fields(preset, given)
        if guidance_interval is not None:
            try:
                refuse_interval(guidance_interval, None, [sigma_max, sigma_min])
            except ValueError as error:
                raise click.UsageError(str(error)) from error
    written = (*TABLE_FILES, *(NEARNESS_FILES if as_near_as else ()))
    for name in written:
        refuse_inputs(outdir=outdir / name)
        check_writable(outdir / name, BEGINS.get(name, ()))
    for names, what in ((written, ", until this run replaces it"), (NEARNESS_FILES, "")):
        stale = [n for n in names if (outdir / n).exists() and (what or n not in written)]
        if stale:
            click.echo(f"Note: {', '.join(stale)} in {outdir}: of an earlier run{what}", err=True)
    click.get_current_context().with_resource(locked(outdir))
    if fields is None:
        assert problem_name is not None  # checked above
        count = num or 200
        problem = make_problem(problem_name, count)
        recorded = {"problem": problem_name, "points": count}
    else:
        config = GenerationConfig(
            **fields, batch=batch, sigma_min=sigma_min, sigma_max=sigma_max, dtype=dtype,
            device=device, precision=precision, compile=compile,
            trust_pickle=trust_pickle,
        )  # fmt: skip
        models = config.open(config.choose_device(), ProcessGroup(), decoding=False)
        numbers = seeds or list(range(num or 32))
        problem = network_problem(
            preset or config.net, models.loaded.net, numbers,
            gnet=models.guide.net if models.guide else None, guidance=config.guidance,
            guidance_interval=config.guidance_interval, class_idx=class_idx, batch=batch,
            sigma_min=sigma_min, sigma_max=sigma_max,
            dtype=getattr(torch, dtype), fine=fine,
        )  # fmt: skip
        record = {name: models.record()[name] for name in RECORDED}
        recorded = {**record, "seeds": numbers, "fine": fine}
    from tqdm import tqdm

    def showing(what: str) -> Callable[[Iterable[Method]], Iterable[Method]]:
        return lambda rows: tqdm(rows, desc=what, unit="method", file=sys.stderr)

    def keep(table: Table) -> None:
        write_bytes(outdir / "accuracy.csv", table.csv().encode())

    def keep_near(nearness: Nearness) -> None:
        write_bytes(outdir / "as-near.csv", nearness.csv().encode())

    table = measure(problem, chosen, evaluations, showing("Methods"), keep)
    recorded |= {
        "settings": list(map(str, settings)),
        "evaluations": evaluations,
        "as_near_as": as_near_as,
        "torch": torch.__version__,
    }
    click.echo(table.markdown())
    write_table(table, outdir, recorded)
    files = "accuracy.csv, .md, .svg and .json"
    if as_near_as:
        heading = f"As near as Heun's {as_near_as} levels"
        nearness = as_near(
            problem, chosen, table, steps=as_near_as, progress=showing(heading), note=keep_near
        )
        click.echo(nearness.markdown())
        write_nearness(nearness, outdir)
        files += "; as-near.csv, .md and .svg"
    click.echo(f"Written to {outdir}: {files}")
