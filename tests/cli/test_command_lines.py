"""The command lines are a promise to those who have scripts: a stored list of all options."""

from __future__ import annotations

import json
from typing import Any

import click
from click.testing import CliRunner
from conftest import DATA

from erk_guid.cli import main


def options_of(command: click.Command) -> dict[str, Any]:
    found = {}
    for parameter in command.params:
        default = parameter.default
        # A flag that is off has no default in some versions of click.
        plain = isinstance(default, (str, int, float)) and default is not False
        choices = sorted(parameter.type.choices) if isinstance(parameter.type, click.Choice) else []
        found["/".join([*parameter.opts, *parameter.secondary_opts])] = {
            "default": str(default) if plain else None,
            "flag": bool(getattr(parameter, "is_flag", False)),
            "multiple": bool(getattr(parameter, "multiple", False)),
            **({"choices": choices} if choices else {}),
        }
    return found


def command_lines(command: click.Command, *path: str) -> dict[str, Any]:
    if not isinstance(command, click.Group):
        return {" ".join(path): options_of(command)}
    found: dict[str, Any] = {}
    for name, sub in command.commands.items():
        found |= command_lines(sub, *path, name)
    return found


def test_every_option_is_as_it_was() -> None:
    # Made from the last release's code. An entry changes only when that is meant.
    stored = json.loads((DATA / "command_lines.json").read_text())
    assert command_lines(main, "erk-guid") == stored


def test_every_help_text_is_whole() -> None:
    for line, options in json.loads((DATA / "command_lines.json").read_text()).items():
        shown = CliRunner().invoke(main, [*line.split()[1:], "--help"])
        assert shown.exit_code == 0, shown.output
        for names in options:
            if names.startswith("-"):
                assert names.split("/")[0] in shown.output, (line, names)
