"""``erk-guid presets``."""

from __future__ import annotations

import click

from erk_guid.models.checkpoints.presets import PRESETS


@click.command()
def presets_command() -> None:
    """List the names that --preset, --net and load() take."""
    width = max(map(len, PRESETS))
    click.echo(f"{'preset':<{width}}  guidance  ERK-Guid   published")
    for name, preset in PRESETS.items():
        guidance = f"{preset.guidance:g}" if preset.gnet else "-"
        erk = "{:g} / {:g}".format(*preset.erk) if preset.erk else "-"
        click.echo(f"{name:<{width}}  {guidance:<8}  {erk:<9}  {preset.published or '-'}")
    click.echo(
        "\nERK-Guid: w_stiff / w_con that were measured here; '--w_stiff preset' takes them. "
        "Published scores are their authors'. The edm-* and edm2-* weights are NVIDIA's, "
        "CC BY-NC-SA 4.0."
    )
    from erk_guid.guidance.erk import PAPER_SETTINGS  # it needs torch: behind the list

    pairs = ", ".join(f"{n} steps {s:g} / {c:g}" for n, (s, c) in PAPER_SETTINGS.items())
    click.echo(
        f"The paper's pairs for EDM2-S at 512x512: {pairs}; '--w_stiff paper' takes the nearest."
    )
