"""Command lines without what they run: help and errors in options, at once.

A command's options are derived from the classes that they fill, which import torch. That takes a
second or more. So what is said about a command line is stored in outline.json, which
scripts/outline.py writes from the commands. An outline parses a command line as the
command does, and hands on to the command what it finds nothing wrong with.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import click

FILE = "outline.json"

_NUMBERS: dict[str, type[click.ParamType]] = {
    "int": click.types.IntParamType,
    "float": click.types.FloatParamType,
}
_RANGES: dict[str, type[click.ParamType]] = {"int": click.IntRange, "float": click.FloatRange}


def described(command: click.Command) -> dict[str, Any]:
    """Return what is stored of a command, in JSON's types."""
    context = click.Context(command)
    common = {
        # Python 3.13 strips the indentation of docstrings.
        "help": None if command.help is None else inspect.cleandoc(command.help),
        "no_args_is_help": command.no_args_is_help,
        "help_option_names": command.context_settings.get("help_option_names"),
    }
    if isinstance(command, click.Group):
        inner = {
            name: command.get_command(context, name) for name in command.list_commands(context)
        }
        return {**common, "commands": {k: described(v) for k, v in inner.items() if v is not None}}
    return {**common, "params": [_parameter(p, context) for p in command.params]}


def _parameter(parameter: click.Parameter, context: click.Context) -> dict[str, Any]:
    record = parameter.get_help_record(context)
    found: dict[str, Any] = {
        "name": parameter.name,
        "argument": isinstance(parameter, click.Argument),
        "opts": parameter.opts,
        "secondary": parameter.secondary_opts,
        "nargs": parameter.nargs,
        "required": parameter.required,
        "multiple": parameter.multiple,
        "flag": bool(getattr(parameter, "is_flag", False)),
        "record": list(record) if record else None,
        "metavar": parameter.metavar,
        **_type(parameter.type),
    }
    return found


def _type(kind: click.ParamType) -> dict[str, Any]:
    if isinstance(kind, click.Choice):
        return {"type": "choice", "choices": list(kind.choices)}
    for name in _RANGES:
        if type(kind) is _RANGES[name]:
            limits = ("min", "max", "min_open", "max_open")
            return {"type": name, "range": {each: getattr(kind, each) for each in limits}}
        if type(kind) is _NUMBERS[name]:
            return {"type": name}
    return {"type": "text"}  # checked by the command itself


def _made_type(stored: dict[str, Any]) -> click.ParamType:
    if stored["type"] == "choice":
        return click.Choice(stored["choices"])
    if stored["type"] == "text":
        return click.STRING
    if "range" in stored:
        return _RANGES[stored["type"]](**stored["range"])
    return _NUMBERS[stored["type"]]()


class _Option(click.Option):
    """An option whose line in the help is stored."""

    record: tuple[str, str] | None = None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return self.record


class _Argument(click.Argument):
    """An argument whose line in the help, if it has one, is stored."""

    record: tuple[str, str] | None = None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:  # type: ignore[override]
        return self.record


class Outline(click.Command):
    """A command by what is stored of it.

    Args:
        name: of the command.
        stored: see `described`.
        command: gives the command itself.
    """

    def __init__(
        self, name: str, stored: dict[str, Any], command: Callable[[], click.Command]
    ) -> None:
        settings = {"help_option_names": stored["help_option_names"]}
        super().__init__(
            name,
            help=stored["help"],
            no_args_is_help=stored["no_args_is_help"],
            context_settings=settings if stored["help_option_names"] else None,
            params=[_made_parameter(each) for each in stored["params"]],
        )
        self._command = command

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        # A copy: parsing consumes the list. What is wrong is raised here, before the imports.
        super().make_context(info_name, list(args), parent, **extra)
        return self._command().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return ctx.command.invoke(ctx)  # the command's context, see above


def _made_parameter(stored: dict[str, Any]) -> click.Parameter:
    kind = _made_type(stored)
    record = (stored["record"][0], stored["record"][1]) if stored["record"] else None
    if stored["argument"]:
        argument = _Argument(
            [stored["name"]], type=kind, nargs=stored["nargs"], required=stored["required"],
            metavar=stored["metavar"],
        )  # fmt: skip
        argument.record = record
        return argument
    names = "/".join([stored["opts"][0], *stored["secondary"][:1]])
    more: dict[str, Any] = {"is_flag": True} if stored["flag"] else {"type": kind}
    option = _Option(
        [stored["name"], names, *stored["opts"][1:]],
        nargs=stored["nargs"], required=stored["required"], multiple=stored["multiple"],
        hidden=stored["record"] is None, **more,
    )  # fmt: skip
    option.record = record
    return option


def outlined(name: str, command: Callable[[], click.Command]) -> click.Command:
    """Return the outline of a command (a group's has those of its commands)."""
    stored = _stored()[name]
    if "commands" not in stored:
        return Outline(name, stored, command)
    settings = {"help_option_names": stored["help_option_names"]}
    group = click.Group(
        name, help=stored["help"], context_settings=settings,
        no_args_is_help=stored["no_args_is_help"],
    )  # fmt: skip

    def inner(child: str) -> Callable[[], click.Command]:
        def find() -> click.Command:
            parent = command()
            assert isinstance(parent, click.Group)
            return parent.commands[child]

        return find

    for child, what in stored["commands"].items():
        group.add_command(Outline(child, what, inner(child)))
    return group


@cache
def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(files("erk_guid.cli").joinpath(FILE).read_text())
    return stored


def text() -> str:
    """Return what outline.json should be."""
    from erk_guid.cli import COMMANDS, command_named

    return json.dumps({name: described(command_named(name)) for name in COMMANDS}, indent=1) + "\n"
