"""Write the folder of the nodes: python -m erk_guid.integrations.comfyui ComfyUI/custom_nodes."""

from __future__ import annotations

from pathlib import Path

import click

from erk_guid.common.errors import ErkGuidError
from erk_guid.integrations.comfyui.pack import write_pack


@click.command()
@click.argument("custom_nodes")
@click.option("--publisher", default="", help="PublisherId, for ComfyUI's registry.")
@click.option("--repository", default="", help="Address of the repository, for the registry.")
def main(custom_nodes: str, publisher: str, repository: str) -> None:
    """Write the node pack into CUSTOM_NODES, ComfyUI's folder of that name."""
    if not custom_nodes:  # as a path it would be the current folder
        raise click.BadParameter("it is empty; name ComfyUI's custom_nodes")
    try:
        folder = write_pack(Path(custom_nodes), publisher, repository)
    except ErkGuidError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {folder}; restart ComfyUI.")


if __name__ == "__main__":
    main(prog_name="python -m erk_guid.integrations.comfyui")
