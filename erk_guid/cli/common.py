"""Shared by the commands: option types, and errors without tracebacks."""

from __future__ import annotations

import errno
import functools
import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.signals import Interrupting, handled_by, number_of, said
from erk_guid.common.streams import from_writing
from erk_guid.denoisers import check_interval
from erk_guid.generation.peers import OtherRankError
from erk_guid.generation.seeds import seeds_in, unique

F = TypeVar("F", bound=Callable[..., Any])


class SeedList(click.ParamType):
    """List of seeds: '1,2,5-10' is [1, 2, 5, 6, 7, 8, 9, 10]; repeated seeds count once."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, list):
            return value
        try:
            return unique(seeds_in(str(value)))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def compact(seeds: Sequence[int]) -> str:
    """Write seeds as `SeedList` reads them: [1, 2, 3, 7] as '1-3,7'."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], seed]
        else:
            runs.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class PathType(click.Path):
    """A path, which is not empty: an empty one would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("it is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


class NumberOr(click.ParamType):
    """A number, or one of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(["float", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words or isinstance(value, float):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor {' nor '.join(self.words)}", param, ctx)


class Interval(click.ParamType):
    """Two noise levels: '0.2,5' is (0.2, 5.0)."""

    name = "low,high"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
            check_interval(found)  # type: ignore[arg-type]
        except ValueError:
            self.fail(
                f"{value!r} is no LOW,HIGH in sigma with 0 <= LOW < HIGH, such as 0.2,5", param, ctx
            )
        return found


class Numbers(click.ParamType):
    """List of numbers: '0.5,0.2' is (0.5, 0.2)."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 0.5,0.2", param, ctx)


class Names(click.ParamType):
    """List of names: 'fid,fd_dinov2' is ['fid', 'fd_dinov2'], each once, from `choice` if given."""

    name = "list"

    def __init__(self, choice: Sequence[str] = ()) -> None:
        self.choice = choice

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, list):
            return value
        names = [part.strip() for part in str(value).split(",")]
        for name in names:
            if not name or (self.choice and name not in self.choice):
                known = ", ".join(self.choice)
                hint = f"; choose from {known}" if known else "; separate names by single commas"
                self.fail(f"{name!r} in {value!r} is not one of its names{hint}", param, ctx)
        return list(dict.fromkeys(names))


def name_and_path(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """Read a repeatable option such as ``--detector-weights NAME=FILE`` (click callback)."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not name or not equals or not path:
            raise click.BadParameter(f"{value!r} is not NAME=FILE", ctx, param)
        if found.get(name, path) != path:
            raise click.BadParameter(f"{name} has two files, {found[name]} and {path}", ctx, param)
        found[name] = path
    return found


_INPUTS = "erk_guid.inputs"


def note_input(path: Path) -> None:
    """Remember a file that an option reads, for `refuse_inputs`."""
    click.get_current_context().meta.setdefault(_INPUTS, []).append(path)


def refuse_inputs(**outputs: Path | None) -> None:
    """Refuse an output that is a file which an option of this command read.

    Args:
        outputs: by the option's name, without its dashes.

    Raises:
        ErkGuidError: naming the output.
    """
    from erk_guid.common.datasets import refuse_overwriting  # needs numpy and Pillow

    named = {f"--{option}": path for option, path in outputs.items()}
    refuse_overwriting(named, click.get_current_context().meta.get(_INPUTS, []))


def load_plugins(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Import a module, or run a .py file, that registers things (callback of ``--plugin``)."""
    for value in values:
        try:
            if value.endswith(".py"):
                ctx.meta.setdefault(_INPUTS, []).append(Path(value))
                runpy.run_path(value)
            else:
                importlib.import_module(value)
        except Exception as error:  # the user's program may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise click.BadParameter(f"cannot import {value}: {reason}", ctx, param) from error
    return values


_OF_THE_SYSTEM = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG,
    errno.EMFILE, errno.ENFILE, errno.ESTALE,
)  # fmt: skip
"""What a system refuses in the middle of any work: a full disk, a limit, a lost file system."""


def _end(number: int) -> NoReturn:
    """End a command that a signal has stopped."""
    click.echo(said(number), err=True)
    sys.exit(128 + number)  # as shells count


def reporting_errors(command: F) -> F:
    """Show the user's errors as one line, and exit with their code; ours keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        interrupting = Interrupting()
        try:
            with handled_by(interrupting):
                return command(*args, **kwargs)
        except OtherRankError:
            sys.exit(1)  # rank 0 has said why
        except ErkGuidError as error:
            if interrupting.number is not None:  # the cause of what then went wrong
                _end(interrupting.number)
            click.ClickException(printable(error, 1000)).show()
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in _OF_THE_SYSTEM or from_writing(error):
                raise
            where = f" ({printable(error.filename, 200)})" if error.filename else ""
            click.ClickException(f"{error.strerror}{where}; mend that, then run it again").show()
            sys.exit(1)
        except KeyboardInterrupt as error:
            _end(number_of(error))

    return wrapped  # type: ignore[return-value]
