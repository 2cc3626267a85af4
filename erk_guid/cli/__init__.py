"""Command lines: ``erk-guid`` (also ``python -m erk_guid``) and the scripts' entry points."""

from __future__ import annotations

import click

from erk_guid._version import __version__
from erk_guid.cli.accuracy import accuracy_command
from erk_guid.cli.calibrate import calibrate_command
from erk_guid.cli.convert import convert_command
from erk_guid.cli.demo import demo_command
from erk_guid.cli.fit import fit_command
from erk_guid.cli.flops import flops_command
from erk_guid.cli.generate import generate_command
from erk_guid.cli.metrics import metrics_command
from erk_guid.cli.plot_trace import plot_trace_command
from erk_guid.cli.precision_recall import precision_recall_command
from erk_guid.cli.presets import presets_command
from erk_guid.cli.reproduce import reproduce_command
from erk_guid.cli.toy import toy_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="erk-guid")
def main() -> None:
    """ERK-Guid: better diffusion samples for no extra network evaluation."""


main.add_command(generate_command, "generate")
main.add_command(metrics_command, "metrics")
main.add_command(precision_recall_command, "precision-recall")
main.add_command(reproduce_command, "reproduce")
main.add_command(accuracy_command, "accuracy")
main.add_command(fit_command, "fit")
main.add_command(calibrate_command, "calibrate")
main.add_command(plot_trace_command, "plot-trace")
main.add_command(toy_command, "toy")
main.add_command(convert_command, "convert")
main.add_command(flops_command, "flops")
main.add_command(presets_command, "presets")
main.add_command(demo_command, "demo")
