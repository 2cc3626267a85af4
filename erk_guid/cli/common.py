"""What the commands share: option types, and errors without tracebacks."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from erk_guid.errors import ErkGuidError
from erk_guid.runtime import OtherRankError

F = TypeVar("F", bound=Callable[..., Any])


class SeedList(click.ParamType):
    """'1,2,5-10' to [1, 2, 5, 6, 7, 8, 9, 10]; repeated seeds count once."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, list):
            return value
        seeds: dict[int, None] = {}
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if match is None:
                self.fail(
                    f"{part.strip()!r} in {value!r} is neither a whole number nor a range such as "
                    "5-10",
                    param,
                    ctx,
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(
                    f"the range {part.strip()!r} runs backwards; write {last}-{first}", param, ctx
                )
            if last - first >= 10_000_000:
                self.fail(f"the range {part.strip()!r} has more than ten million seeds", param, ctx)
            seeds.update(dict.fromkeys(range(first, last + 1)))
        return list(seeds)


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


def reporting_errors(command: F) -> F:
    """Turn the user's errors into one line and exit code 1; leave our own with a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except OtherRankError:
            sys.exit(1)  # rank 0 has said why
        except ErkGuidError as error:
            raise click.ClickException(str(error)) from error

    return wrapped  # type: ignore[return-value]
