"""Command lines: ``erk-guid`` (also ``python -m erk_guid``) and the scripts' entry points."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import click

from erk_guid._version import __version__
from erk_guid.cli.outline import outlined
from erk_guid.common.signals import end_at_once, handle
from erk_guid.common.streams import checked_output, open_streams

COMMANDS: Mapping[str, str] = {
    "generate": "Generate images with a diffusion model, with or without ERK guidance.",
    "metrics": (
        "Compute Frechet distances between images and a reference data set (FID, FD-DINOv2, ...)."
    ),
    "precision-recall": "Compute precision, recall and inception score of the images in GEN_DIR.",
    "reproduce": "Measure the rows of the paper's tables: generate, score, compare, report.",
    "accuracy": "Measure how near each solver comes to the exact solution, on your own network.",
    "fit": "Find the noise levels and the solver with which a model needs the fewest evaluations.",
    "calibrate": "Find the settings of ERK guidance for a model, a solver and a number of steps.",
    "plot-trace": "Draw what a run's guidance measured and did, from the TRACE that --trace wrote.",
    "toy": "Draw what guidance does on the 2-D tree, where everything is known exactly.",
    "convert": "Turn SOURCE (.pkl file, URL or preset) into the safetensors file DEST.",
    "flops": (
        "Count the parameters of a network and the multiply-adds of one evaluation for one image."
    ),
    "presets": "List the names that --preset, --net and load() take.",
    "play": (
        "Try solvers and guidance on a page in the browser, beside plain Heun and a fine reference."
    ),
    "demo": "Sample the shipped model in six ways with the same few evaluations, and draw them.",
}
"""What the list of commands says of each.

A command's module is imported when the command is run: help and errors in options need no torch.
"""


def command_named(name: str) -> click.Command:
    """Return a command itself, and import what it runs."""
    module = import_module(f"erk_guid.cli.{name.replace('-', '_')}")
    command: click.Command = getattr(module, f"{name.replace('-', '_')}_command")
    return command


def run_script(name: str) -> NoReturn:
    """Run a command as a script's main program."""
    open_streams()
    handle(end_at_once)
    with checked_output():
        outlined(name, partial(command_named, name))(prog_name=os.path.basename(sys.argv[0]))
    raise SystemExit(0)  # not reached: the command ends the process


class _Commands(click.Group):
    """The commands, each imported when it is run."""

    def main(self, *args: Any, **options: Any) -> Any:
        with checked_output():
            return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return outlined(cmd_name, partial(command_named, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="erk-guid")
def main() -> None:
    """ERK-Guid: better diffusion samples for no extra network evaluation."""
    open_streams()
    handle(end_at_once)
