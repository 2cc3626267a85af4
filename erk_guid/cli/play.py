"""``erk-guid play``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from erk_guid.cli.common import reporting_errors
from erk_guid.cli.options import chosen_options, sampler_options
from erk_guid.cli.sampler import config_fields
from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.fits import FITTED, shipped_fits
from erk_guid.guidance import ERKGuidance
from erk_guid.models.checkpoints.loading import UNCONDITIONAL
from erk_guid.models.checkpoints.presets import PRESETS

if TYPE_CHECKING:
    from erk_guid.play.choice import Choice, Fit

NETWORK = ("preset", "net", "gnet", "batch", "device", "dtype", "precision", "trust_pickle")
"""Options that say which networks, and how they are run."""
SHIPPED = "digits"
"""The preset that is shown where no network is named, without classes as its own guide."""
PORT = 7860
FROM_FILE = "settings file"


@click.command()
@chosen_options("preset", "net", "gnet", "guidance", "settings", *NETWORK[3:])
@click.option(
    "--port", metavar="INT", type=click.IntRange(1, 65535), default=PORT, show_default=True,
    help="The page is at http://127.0.0.1:PORT, for this machine alone.",
)  # fmt: skip
@click.option("--open", "open_page", is_flag=True, help="Open the page in the usual browser.")
@reporting_errors
def play_command(
    preset: str | None,
    net: str | None,
    gnet: str | None,
    guidance: float | None,
    settings: Path | None,
    port: int,
    open_page: bool,
    **options: Any,
) -> None:
    """Try solvers and guidance on a page in the browser, beside plain Heun and a fine reference.

    The page shows the same seeds three times, with distances to the reference, what guidance saw
    and did, and the command line that makes the images. It loads the networks and the settings
    that are named here, and nothing else. Without --net or --preset it shows the digits model that
    ships with the package. Ctrl-C ends it.

    \b
    Examples:
      erk-guid play
      erk-guid play --preset=digits-autog
      erk-guid play --net=network.safetensors --settings=output/fit/fit-8.json
    """
    if find_spec("gradio") is None:
        raise MissingExtraError("gradio", "app", "the page")
    from erk_guid.play.page import serve
    from erk_guid.play.session import Session

    network = _named()
    if preset is None and net is None and gnet is None:
        preset = SHIPPED
        network = [f"--preset={SHIPPED}", f"--gnet={UNCONDITIONAL}{SHIPPED}", *network]
        gnet = UNCONDITIONAL + SHIPPED
    known = PRESETS.get(preset or "")
    guided = gnet is not None or (known is not None and known.gnet is not None)
    fits = fits_of(preset, settings)
    strength = guidance
    if strength is None:
        strength = known.guidance if known is not None else GenerationConfig.guidance
    start = first_choice(preset, strength)
    start.arguments(guided, fits)  # raises where the strength has nothing to act on
    serve(Session.open(network, config_of, guided, fits), start, port, open_page)


def config_of(arguments: Sequence[str]) -> GenerationConfig:
    """Return the config that options of the command line ask for.

    Raises:
        ErkGuidError: an option at fault; the message names it.
    """
    try:
        config: GenerationConfig = _config.main(list(arguments), standalone_mode=False)
    except click.ClickException as error:
        raise ErkGuidError(error.format_message()) from error
    return config


@click.command(add_help_option=False)
@sampler_options
def _config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**config_fields(**options))


def first_choice(preset: str | None, strength: float) -> Choice:
    """Return what the controls show at first."""
    from erk_guid.play.choice import STEPS, Choice

    measured = PRESETS[preset].erk if preset in PRESETS else None
    erk = ERKGuidance(*measured) if measured else ERKGuidance.paper(STEPS)
    return replace(Choice(), w_stiff=erk.w_stiff, w_con=erk.w_con, strength=strength)


def fits_of(preset: str | None, settings: Path | None) -> dict[str, Fit]:
    """Return the sources of fitted settings: those that ship for a preset, and a file."""
    from erk_guid.play.choice import Fit

    found = {}
    if preset in shipped_fits():
        found[FITTED] = Fit(arguments=(f"--schedule={FITTED}",), takes_steps=True)
    if settings is not None:
        found[FROM_FILE] = Fit(arguments=(f"--settings={settings}",), takes_steps=False)
    return found


def _named() -> list[str]:
    """Return the options of `NETWORK` that the user gave, as they stand on a command line."""
    context = click.get_current_context()
    given = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in NETWORK or source is not ParameterSource.COMMANDLINE:
            continue
        option, value = parameter.opts[0], context.params[name]
        given.append(option if getattr(parameter, "is_flag", False) else f"{option}={value}")
    return given
