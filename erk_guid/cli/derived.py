"""Command-line options from the fields of dataclasses: name, type, choices, default and help.

The help is what the class's docstring says about the field under ``Args:``. So a solver's option,
its default and its text are written only in the solver's file.
"""

from __future__ import annotations

import inspect
import re
import types
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from erk_guid.cli.common import Numbers

F = TypeVar("F", bound=Callable[..., Any])


def described(kind: type) -> Mapping[str, str]:
    """Return a class's docstring text about each argument, with a capital first letter.

    Nothing is said where Python has removed the docstrings (-OO).
    """
    text = inspect.getdoc(kind) or ""
    found = re.search(r"^Args:\n((?:[ ].*\n?|\n)+)", text, re.MULTILINE)
    entries = re.split(r"^    (?=\w)", found[1], flags=re.MULTILINE)[1:] if found else []
    described: dict[str, str] = defaultdict(str)
    for entry in entries:
        names, _, said = entry.partition(":")
        said = " ".join(said.split())
        for name in names.split(","):
            described[name.strip()] = said[:1].upper() + said[1:]
    return described


def options_of_classes(
    classes: Mapping[str, type], leave_out: Collection[str] = (), with_defaults: bool = False
) -> dict[str, Callable[[F], F]]:
    """Return a click option for each field that one or more of the classes have.

    An option that is not given is None, and the class uses its default. With `with_defaults` the
    option itself has that default.

    Args:
        classes: dataclasses by the name that the help uses; an empty name is not shown.
        leave_out: names of fields that get no option.
        with_defaults: whether the options have the fields' defaults.
    """
    having: dict[str, dict[str, type]] = {}
    for name, kind in classes.items():
        for field in fields(kind):
            if field.name not in leave_out:
                having.setdefault(field.name, {})[name] = kind
    return {field: _option(field, kinds, with_defaults) for field, kinds in having.items()}


def _option(name: str, kinds: Mapping[str, type], with_default: bool) -> Callable[[F], F]:
    types_found = {_type(get_type_hints(kind)[name]) for kind in kinds.values()}
    if len(types_found) != 1:
        raise TypeError(f"--{name} has several types: {', '.join(map(str, types_found))}")
    found = types_found.pop()
    kind: Any = click.Choice(list(found)) if isinstance(found, tuple) else found
    kind = Numbers() if found is list else kind
    metavar = {bool: "BOOL", int: "INT", float: "FLOAT", str: "STR"}.get(kind)
    default = _field(next(iter(kinds.values())), name).default if with_default else None
    return click.option(
        f"--{name}", metavar=metavar, type=kind, default=default, help=_help(name, kinds)
    )


def _type(hint: Any) -> type | tuple[str, ...]:
    """Return int, float, bool, str, list (of numbers), or a Literal's choices; not ``| None``."""
    if get_origin(hint) in (Union, types.UnionType):
        kept = [part for part in get_args(hint) if part is not type(None)]
        if len(kept) == 1:
            return _type(kept[0])
    if get_origin(hint) is Literal:
        return tuple(get_args(hint))
    if hint in (bool, int, float, str):
        return hint
    if hint == tuple[float, ...]:
        return list
    raise TypeError(f"no command-line option can be made of the type {hint}")


def _help(name: str, kinds: Mapping[str, type]) -> str:
    """Return the classes' texts, each with the names of those that share it, and the defaults."""
    texts: dict[str, list[str]] = {}
    defaults: dict[str, list[str]] = {}
    for shown, kind in kinds.items():
        texts.setdefault(described(kind).get(name, ""), []).append(shown)
        defaults.setdefault(_default(kind, name), []).append(shown)
    said = "  ".join(
        f"{', '.join(names)}: {text}" if any(names) else text for text, names in texts.items()
    )
    if len(defaults) == 1:
        default = next(iter(defaults))
    else:
        default = ", ".join(f"{value} ({', '.join(names)})" for value, names in defaults.items())
    return f"{said}  [default: {default}]"


def _default(kind: type, name: str) -> str:
    value = _field(kind, name).default
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _field(kind: type, name: str) -> Field[Any]:
    return next(field for field in fields(kind) if field.name == name)
