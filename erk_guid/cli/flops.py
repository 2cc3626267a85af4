"""``erk-guid flops``."""

from __future__ import annotations

import click

from erk_guid.cli.common import reporting_errors
from erk_guid.cli.options import chosen_options


@click.command()
@chosen_options("net", "trust_pickle")
@reporting_errors
def flops_command(net: str | None, trust_pickle: bool) -> None:
    """Count the parameters of a network and the multiply-adds of one evaluation for one image.

    \b
    Examples:
      erk-guid flops --net=digits
      erk-guid flops --net=edm2-img512-s-fid
    """
    from erk_guid.models.checkpoints import load
    from erk_guid.models.flops import count

    if net is None:
        raise click.UsageError("name a network with --net (--net=digits ships with the package)")
    loaded = load(net, trust=trust_pickle)
    cost = count(loaded.net)
    size = loaded.net.img_resolution
    click.echo(
        f"{net}: {type(loaded.net).__name__}, {loaded.net.img_channels} x {size} x {size}\n"
        f"parameters       {cost.parameters / 1e6:12.3f} million\n"
        f"multiply-adds    {cost.multiply_adds / 1e9:12.3f} billion for one evaluation of one image"
    )
    for name, value in sorted(cost.by_operation.items(), key=lambda item: -item[1]):
        click.echo(f"  {name:<14} {value / 1e9:12.3f}")
