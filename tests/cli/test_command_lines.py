"""The command lines are a promise to those who have scripts: a stored list of all options."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import DATA, ROOT

from erk_guid.cli import COMMANDS, command_named, main, outline


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
        # The commands themselves, not their outlines.
        sub = command_named(name) if command is main else command.get_command(context, name)
        assert sub is not None
        found |= command_lines(sub, *path, name)
    return found


def test_every_option_is_as_it_was() -> None:
    # Made from the last release's code. An entry changes only when that is meant.
    stored = json.loads((DATA / "command_lines.json").read_text())
    assert command_lines(main, "erk-guid") == stored


def test_the_list_says_what_the_commands_say() -> None:
    for name, said in COMMANDS.items():
        command = command_named(name)
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


# Earlier versions list no arguments, such as SOURCE, in the help.
newest_help = pytest.mark.skipif(
    tuple(map(int, version("click").split(".")[:2])) < (8, 5),
    reason="the outlines are those of click 8.5",
)


@newest_help
def test_the_outlines_are_those_of_the_commands() -> None:
    stored = (ROOT / "erk_guid" / "cli" / outline.FILE).read_text()
    assert stored == outline.text(), "run 'python scripts/outline.py'"


LINES = [[*line.split(" ")[1:]] for line in json.loads((DATA / "command_lines.json").read_text())]


def without_outlines() -> click.Group:
    return click.Group(
        commands={name: command_named(name) for name in COMMANDS},
        context_settings=main.context_settings,
    )


@newest_help
@pytest.mark.parametrize("line", [*LINES, ["metrics"]], ids=" ".join)
@pytest.mark.parametrize("width", [50, 100])
def test_outlines_show_the_same_help(line: list[str], width: int) -> None:
    whole = without_outlines()
    found = [
        CliRunner().invoke(each, [*line, "--help"], terminal_width=width, prog_name="erk-guid")
        for each in (main, whole)
    ]
    assert found[0].output == found[1].output
    assert found[0].exit_code == 0


WRONG = [
    "generate --solver=rk4", "generate --stps 3", "generate --batch 0", "generate --steps",
    "generate --rho x", "generate --w_stiff", "generate --resume=3", "generate more",
    "generate --dtype float16 --batch 3", "metrics calc", "metrics gen --num x", "metrics clac",
    "convert", "convert a", "convert a b c", "accuracy --batch -1", "fit --samples -1",
    "reproduce --table x", "precision-recall", "presets more", "toy --nothing", "demo -x",
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_outlines_report_the_same_errors(line: str) -> None:
    whole = without_outlines()
    found = [
        CliRunner().invoke(each, line.split(" "), prog_name="erk-guid") for each in (main, whole)
    ]
    assert found[0].output == found[1].output
    assert found[0].exit_code == found[1].exit_code == 2


@pytest.mark.parametrize(
    "program",
    [
        *(f"from erk_guid.cli import main; main({line.split(' ')!r})" for line in WRONG[:6]),
        "from erk_guid.cli import main; main(['generate', '--help'])",
        "import sys, runpy; sys.argv = ['x', '--solver=rk4']; "
        "runpy.run_path('generate_images.py', run_name='__main__')",
        "import sys, runpy; sys.argv = ['x', 'calc']; "
        "runpy.run_path('calculate_metrics.py', run_name='__main__')",
    ],
)
def test_errors_in_options_need_no_torch(program: str) -> None:
    code = (
        "import sys\n"
        "try:\n"
        f"    {program}\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    expected = "0 False False" if "--help" in program else "2 False False"
    assert done.stdout.splitlines()[-1] == expected, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", [True, False])
def test_what_the_outline_passes_is_run(script: bool, tmp_path: Path) -> None:
    args = ["--preset=digits", f"--outdir={tmp_path / 'o'}", "--seeds=3", "--steps=2"]
    command = ["generate_images.py"] if script else ["-m", "erk_guid", "generate"]
    done = subprocess.run(
        [sys.executable, *command, *args], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "000003.png").is_file()
    failing = subprocess.run(
        [sys.executable, "calculate_precision_recall_is.py", str(tmp_path / "n"), "--real=n.zip"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert failing.returncode == 1
    assert failing.stderr.startswith("Error: ")
