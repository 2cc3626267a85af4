"""``erk-guid presets``."""

from __future__ import annotations

import click

from erk_guid.checkpoints.presets import PRESETS


@click.command()
def presets_command() -> None:
    """List the names that --preset, --net and load() take."""
    width = max(map(len, PRESETS))
    click.echo(f"{'preset':<{width}}  guidance  published")
    for name, preset in PRESETS.items():
        guidance = f"{preset.guidance:g}" if preset.gnet else "-"
        click.echo(f"{name:<{width}}  {guidance:<8}  {preset.published or '-'}")
    click.echo(
        "\nPublished scores are their authors'. The edm2-* weights are NVIDIA's, CC BY-NC-SA 4.0."
    )
