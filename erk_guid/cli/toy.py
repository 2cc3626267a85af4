"""``erk-guid toy``."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from erk_guid.cli.common import PathType, reporting_errors
from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.common.files import check_writable, write_bytes
from erk_guid.common.npz import npz_names
from erk_guid.guidance import ERKGuidance


@click.command()
@click.option(
    "--outdir",
    type=PathType(file_okay=False, path_type=Path),
    default=Path("output/toy"),
    show_default=True,
    help="For toy.png and toy.npz.",
)
@click.option(
    "--steps", metavar="INT", type=click.IntRange(min=3, max=1000), default=8, show_default=True,
    help="Noise levels of the trajectories.",
)  # fmt: skip
@click.option(
    "--w_stiff", metavar="FLOAT", type=click.FloatRange(min=0), default=0.5, show_default=True,
    help="Strength of the published guidance.",
)  # fmt: skip
@click.option(
    "--w_con", metavar="FLOAT", type=click.FloatRange(min=0), default=0.5, show_default=True,
    help="Stiffness above which guidance acts.",
)  # fmt: skip
@click.option(
    "--sigma", metavar="FLOAT", type=click.FloatRange(min=0.005, max=5), default=0.1,
    show_default=True, help="Noise level of the map and of the drift.",
)  # fmt: skip
@click.option(
    "--paths", metavar="INT", type=click.IntRange(min=1, max=400), default=24, show_default=True,
    help="Trajectories drawn.",
)  # fmt: skip
@click.option(
    "--seed", metavar="INT", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True
)
@click.option(
    "--html", metavar="FILE", type=PathType(dir_okay=False, path_type=Path),
    help="Write a page to play with to FILE, in place of the picture: one file, for any browser. "
    "It takes a minute or two.",
)  # fmt: skip
@reporting_errors
def toy_command(
    outdir: Path,
    steps: int,
    w_stiff: float,
    w_con: float,
    sigma: float,
    paths: int,
    seed: int,
    html: Path | None,
) -> None:
    """Draw what guidance does on the 2-D tree, where everything is known exactly.

    The picture shows stiffness over the plane, the drift across a stiff and a calm place,
    trajectories with and without guidance, and the error of single steps. The numbers behind it
    are written too.

    With --html it is a page instead, with sliders for the steps and the strength.
    """
    if html is not None:
        _write_page(html, w_con, paths, seed)
        return
    import numpy as np

    from erk_guid.studies.toy import compute_toy, draw_toy

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "the figure")
    try:
        ERKGuidance(w_stiff, w_con)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not math.isfinite(sigma):
        raise click.UsageError(f"--sigma must be a number from 0.005 to 5, got {sigma}")
    for name in ("toy.png", "toy.npz"):
        check_writable(outdir / name)
    toy = compute_toy(steps, w_stiff, w_con, sigma, paths, seed=seed)
    buffer = io.BytesIO()
    arrays: Any = {name: value.numpy() for name, value in toy.arrays.items()}
    there = outdir / "toy.npz"
    if there.is_file() and "error_0" not in npz_names(there):
        raise ErkGuidError(f"{there} is there, and holds other arrays; write elsewhere")
    np.savez(buffer, **arrays)
    write_bytes(outdir / "toy.npz", buffer.getvalue())
    write_bytes(outdir / "toy.png", draw_toy(toy))
    for k, kind in enumerate(toy.kinds):
        apart = float(toy.arrays[f"error_{k}"][-1])
        click.echo(f"{kind.name}: mean distance to the exact solution at the end {apart:.4g}")
    click.echo(f"Written to {outdir}: toy.png and toy.npz")


def _write_page(path: Path, w_con: float, paths: int, seed: int) -> None:
    """Write the page, and refuse options that it does not depend on.

    Raises:
        click.UsageError: naming the option at fault.
        ErkGuidError: the file cannot be written.
    """
    from erk_guid.studies.toy_page import SAMPLES, page

    context = click.get_current_context()
    for name in ("outdir", "steps", "w_stiff", "sigma"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} has no part in --html; leave it out")
    if paths > SAMPLES:
        raise click.UsageError(f"--paths {paths}: the page has at most {SAMPLES}")
    try:
        ERKGuidance(w_con=w_con)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if path.suffix.lower() != ".html":
        raise click.UsageError(f"--html={path}: it writes a web page; end its name in .html")
    check_writable(path)
    write_bytes(path, page(w_con, paths, SAMPLES, seed).encode())
    click.echo(f"Written: {path}")
