"""``erk-guid convert``."""

from __future__ import annotations

from pathlib import Path

import click

from erk_guid.cli.common import PathType, reporting_errors
from erk_guid.models.checkpoints import convert
from erk_guid.models.checkpoints.presets import PRESETS


@click.command()
@click.argument("source")
@click.argument("dest", type=PathType(dir_okay=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace DEST if it is there.")
@reporting_errors
def convert_command(source: str, dest: Path, overwrite: bool) -> None:
    """Turn SOURCE (.pkl file, URL or preset) into the safetensors file DEST.

    The new file holds the network's settings and its encoder. It runs no code when it is opened,
    opens faster, and computes the same as the old one, bit for bit.

    \b
    Example: erk-guid convert edm2-img512-xs-fid edm2-xs.safetensors
    """
    if dest.suffix != ".safetensors":
        raise click.BadParameter(f"{dest} must end in .safetensors", param_hint="DEST")
    loaded = convert(source, dest, overwrite=overwrite)
    count = sum(p.numel() for p in loaded.net.parameters())
    click.echo(f"{dest}: {type(loaded.net).__name__}, {count / 1e6:.1f} M parameters")
    preset = PRESETS.get(source)
    if preset is not None and preset.gnet is not None:
        click.echo(
            f"Note: the guiding network of {source} stays apart: generate with --net={dest} "
            f"--gnet={preset.gnet} --guidance={preset.guidance:g}",
            err=True,
        )
