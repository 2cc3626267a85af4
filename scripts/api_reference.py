#!/usr/bin/env python3
"""Write docs/api.md from the docstrings (needs griffe, one of the [dev] packages).

python scripts/api_reference.py docs/api.md
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import griffe

from erk_guid.common.files import write_bytes

ROOT = Path(__file__).parents[1]

MODULES = {
    "erk_guid": "What most programs need; `import erk_guid` asks for torch alone.",
    "erk_guid.solvers": "The solvers with their options, and what a loop of your own needs.",
    "erk_guid.guidance": "Guidance: the paper's form, the parameter-free form, their protocol.",
    "erk_guid.processes": "What x is: processes, and the way to sigma and back.",
    "erk_guid.schedules": "Noise levels.",
    "erk_guid.churn": "Noise added before steps.",
    "erk_guid.models.flops": "What one evaluation of a network costs.",
    "erk_guid.generation.settings": "The file that `erk-guid calibrate` leaves.",
    "erk_guid.integrations.edm2": "What EDM2's users script against.",
    "erk_guid.integrations.k_diffusion": "Samplers in k-diffusion's signature.",
    "erk_guid.integrations.diffusers": "Schedulers; needs the extra `[diffusers]`.",
    "erk_guid.metrics": "Scores; detectors need the extra `[metrics]`.",
}
"""The modules of the page, each with its first line. The names are those it exports or defines."""

HEAD = """# API reference

Made from the docstrings by `python scripts/api_reference.py docs/api.md`; a test compares. \
Names that begin with an underscore, and modules that are not here, may change without notice.
"""


def reference() -> str:
    """Return the page."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    package = griffe.load("erk_guid", search_paths=[ROOT], docstring_parser="google")
    parts = [HEAD]
    seen: set[str] = set()
    for path, line in MODULES.items():
        module = package if path == "erk_guid" else package[path.removeprefix("erk_guid.")]
        parts.append(f"## {path}\n\n{line}\n")
        for name in _names(module):
            target: Any = module[name]
            target = target.final_target if target.is_alias else target
            if target.is_module:  # a function with the module's name, which hides it
                target = target[name]
            if target.path in seen or not target.has_docstring:
                continue
            seen.add(target.path)
            parts.extend(_object(name, target))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _names(module: Any) -> list[str]:
    if module.exports:
        names = (str(name) for name in module.exports)
        return sorted((n for n in names if f"{module.path}.{n}" not in MODULES), key=str.lower)
    return [
        name
        for name, member in module.members.items()
        if not name.startswith("_")
        and not member.is_alias
        and (member.is_function or member.is_class)
    ]


def _object(name: str, target: Any) -> Iterator[str]:
    yield f"### {name}\n"
    if target.is_function:
        yield f"```python\n{_signature(name, target)}\n```\n"
        yield from _docstring(target)
        return
    made = target.members.get("__init__")
    if made is not None and not made.is_alias:
        yield f"```python\n{_signature(name, made)}\n```\n"
    elif fields := _fields(target):
        yield "```python\n" + _wrapped(f"{name}(", fields, ")") + "\n```\n"
    yield from _docstring(target)
    for inner, member in target.members.items():
        if inner.startswith("_") or member.is_alias or not member.has_docstring:
            continue
        if member.is_function:
            yield f"**{_signature(inner, member, code=False)}**\n"
            yield from _docstring(member)
        elif "property" in member.labels:
            yield f"**.{inner}**: {_text(member.docstring.value)}\n"


def _fields(target: Any) -> list[str]:
    """Return the fields of a dataclass or a NamedTuple."""
    return [
        f"{name}: {member.annotation}" + (f" = {member.value}" if member.value is not None else "")
        for name, member in target.members.items()
        if not name.startswith("_")
        and member.is_attribute
        and member.annotation is not None
        and "property" not in member.labels
    ]


def _signature(name: str, function: Any, code: bool = True) -> str:
    shown = []
    keyword_only = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.name if parameter.kind else ""
        if kind == "keyword_only" and not keyword_only:
            keyword_only = True
            shown.append("*")
        star = {"var_positional": "*", "var_keyword": "**"}.get(kind, "")
        text = f"{star}{parameter.name}"
        if code and parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not star:
            default = _default(function, str(parameter.default))
            text += f" = {default}" if code else f"={default}"
        shown.append(text)
    if not code:
        return f".{name}({', '.join(shown)})".replace("*", r"\*").replace("_", r"\_")
    made = function.name == "__init__" or function.is_class
    returns = "" if made or function.returns is None else f" -> {function.returns}"
    return _wrapped(f"{name}(", shown, f"){returns}")


def _default(function: Any, text: str) -> str:
    """Return a default as its value if it is given by name: GATES[0] is "stiffness"."""
    if not re.fullmatch(r"[A-Z_]+(\[\d\])?", text):
        return text
    value = eval(text, vars(importlib.import_module(function.module.path)))
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _wrapped(before: str, parts: list[str], after: str) -> str:
    line = before + ", ".join(parts) + after
    if len(line) <= 96:
        return line
    return before + "\n" + "".join(f"    {part},\n" for part in parts) + after


def _docstring(target: Any) -> Iterator[str]:
    for section in target.docstring.parsed:
        kind, value = section.kind.value, section.value
        if kind == "text":
            yield _text(value) + "\n"
        elif kind == "examples":
            for what, example in value:
                yield f"```python\n{example}\n```\n" if what.value == "examples" else f"{example}\n"
        elif kind in ("parameters", "attributes"):
            title = "Arguments" if kind == "parameters" else "Attributes"
            yield f"{title}:\n"
            yield (
                "\n".join(f"- `{_name(item)}`: {_flat(item.description)}" for item in value) + "\n"
            )
        elif kind == "returns":
            yield "Returns: " + " ".join(_flat(item.description) for item in value) + "\n"
        elif kind == "raises":
            yield "Raises:\n"
            yield (
                "\n".join(f"- `{item.annotation}`: {_flat(item.description)}" for item in value)
                + "\n"
            )


def _name(item: Any) -> str:
    # 'a, b: what they are': griffe takes b for the type of an attribute.
    return f"{item.name} {item.annotation}" if item.name.endswith(",") else str(item.name)


def _text(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text)


def _flat(text: str) -> str:
    return _text(" ".join(text.split()))


@click.command(help=__doc__)
@click.argument("dest", type=click.Path(dir_okay=False, path_type=Path))
def main(dest: Path) -> None:
    write_bytes(dest, reference().encode())


if __name__ == "__main__":
    main()
