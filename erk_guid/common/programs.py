"""Which files a program of the user's consists of."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from erk_guid.common.files import sha256_of

OURS = "erk_guid"


def together(files: Iterable[Path]) -> str:
    """Return one SHA-256 of several files, wherever they lie; of a single one its own."""
    digests = sorted(sha256_of(path) for path in files if path.is_file())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def files_of_plugin(plugin: str) -> list[Path]:
    """Return the files of a plugin, see `files_of_program`; of a package all that it has.

    Args:
        plugin: the path of a .py file, or the name of a module.
    """
    if plugin.endswith(".py"):
        return files_of_program([Path(plugin)])
    spec = importlib.util.find_spec(plugin)
    if spec is None:
        return []
    folders = spec.submodule_search_locations
    files = [Path(spec.origin)] if spec.origin is not None and not folders else []
    files += [path for folder in folders or () for path in Path(folder).rglob("*.py")]
    return files_of_program(files)


def files_of_program(files: Iterable[Path]) -> list[Path]:
    """Return Python files and what they import, as far as it is not installed.

    It is read from the import statements, also those in functions. What a program reads otherwise
    (data, modules whose names it computes) is not known. Packages that are installed, and ours,
    are left out.

    Args:
        files: with which it begins.
    """
    found: dict[Path, None] = {}
    left = deque(files)
    while left:
        path = Path(os.path.abspath(left.popleft()))
        if path not in found and path.is_file():
            found[path] = None
            left.extend(_imported(path))
    return list(found)


def is_installed(path: str | Path) -> bool:
    """Return whether a file belongs to Python itself or to an installed package."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [os.path.realpath(sysconfig.get_path(name)) for name in names]
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(place) for place in places) or bool(
        {"site-packages", "dist-packages"}.intersection(real.parts)
    )


def _imported(path: Path) -> Iterator[Path]:
    """Yield the files that a file's import statements name."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # whoever imports it will say so
    searched = [Path(entry or ".") for entry in sys.path if not is_installed(entry or ".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name, searched)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the file's own folder.
            folders = [path.parents[node.level - 1]] if 0 < node.level <= len(path.parents) else []
            for alias in node.names:
                name = ".".join(part for part in (node.module, alias.name) if part)
                yield from _module(name, folders if node.level else searched)
            yield from (folder / "__init__.py" for folder in folders)


def _module(name: str, folders: Iterable[Path]) -> list[Path]:
    """Return the files of a module and of the packages it is in; of a name in it, those of it."""
    if name.partition(".")[0] == OURS:
        return []
    for folder in folders:
        here, files = folder, list[Path]()
        for part in name.split("."):
            suffixes = importlib.machinery.all_suffixes()
            plain = [here / f"{part}{suffix}" for suffix in suffixes]
            here = here / part
            files += [path for path in (here / "__init__.py", *plain) if _is_file(path)][:1]
            if not here.is_dir():
                break
        if files:
            return files
    return []


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that is too long
        return path.is_file()
    return False
