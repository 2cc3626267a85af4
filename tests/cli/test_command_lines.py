"""The command lines are a promise to those who have scripts: a stored list of all options."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import DATA

from erk_guid.cli import COMMANDS, main


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
    context = click.Context(command)
    for name in command.list_commands(context):
        sub = command.get_command(context, name)
        assert sub is not None
        found |= command_lines(sub, *path, name)
    return found


def test_every_option_is_as_it_was() -> None:
    # Made from the last release's code. An entry changes only when that is meant.
    stored = json.loads((DATA / "command_lines.json").read_text())
    assert command_lines(main, "erk-guid") == stored


def test_the_list_says_what_the_commands_say() -> None:
    context = click.Context(main)
    for name, said in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(limit=200) == said
    unknown = CliRunner().invoke(main, ["paint"])
    assert unknown.exit_code == 2
    assert "No such command 'paint'" in unknown.output


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["paint"], []])
def test_the_list_of_commands_needs_no_torch(args: list[str]) -> None:
    # Importing torch takes seconds.
    program = (
        "import sys\n"
        "from erk_guid.cli import main\n"
        "try:\n"
        f"    main({args!r}, prog_name='erk-guid')\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_every_help_text_is_whole() -> None:
    for line, options in json.loads((DATA / "command_lines.json").read_text()).items():
        shown = CliRunner().invoke(main, [*line.split()[1:], "--help"])
        assert shown.exit_code == 0, shown.output
        for names in options:
            if names.startswith("-"):
                assert names.split("/")[0] in shown.output, (line, names)
