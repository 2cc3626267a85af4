"""Write the folder of the nodes: python -m erk_guid.integrations.comfyui ComfyUI/custom_nodes."""

from __future__ import annotations

from pathlib import Path

import click

from erk_guid.common.errors import ErkGuidError
from erk_guid.integrations.comfyui.pack import write_pack


@click.command()
@click.argument("custom_nodes", type=click.Path(path_type=Path))
@click.option("--publisher", default="", help="PublisherId, for ComfyUI's registry.")
@click.option("--repository", default="", help="Address of the repository, for the registry.")
def main(custom_nodes: Path, publisher: str, repository: str) -> None:
    """Write the node pack into CUSTOM_NODES, ComfyUI's folder of that name."""
    try:
        folder = write_pack(custom_nodes, publisher, repository)
    except ErkGuidError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {folder}; restart ComfyUI.")


if __name__ == "__main__":
    main(prog_name="python -m erk_guid.integrations.comfyui")
