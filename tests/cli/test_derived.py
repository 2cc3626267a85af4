"""Options made of dataclasses: a new field is a new option, with its default and help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from erk_guid.cli.derived import described, options_of_classes


@dataclass(frozen=True)
class One:
    """A solver.

    Args:
        order: evaluations combined,
            in a step.
        mode: 'a' or 'b'.
        sharp, blunt: both of them.

    Raises:
        ValueError: never.
    """

    order: int = 2
    mode: Literal["a", "b"] = "a"
    sharp: bool = True
    blunt: float | None = None


@dataclass(frozen=True)
class Two:
    """Another.

    Args:
        order: evaluations combined, up to 9.
    """

    order: int = 3


def made(with_defaults: bool = False) -> click.Command:
    @click.command()
    def command(**given: Any) -> None:
        click.echo(repr(given))

    options = options_of_classes({"one": One, "two": Two}, with_defaults=with_defaults)
    for option in options.values():
        command = option(command)
    return command


def test_what_the_docstring_says_of_each_argument() -> None:
    assert described(One) == {
        "order": "Evaluations combined, in a step.",
        "mode": "'a' or 'b'.",
        "sharp": "Both of them.",
        "blunt": "Both of them.",
    }
    assert described(int) == {}


def test_names_types_choices_defaults_and_help() -> None:
    text = " ".join(CliRunner().invoke(made(), ["--help"]).output.split())
    assert "one: Evaluations combined, in a step. two: Evaluations combined, up to 9." in text
    assert "[default: 2 (one), 3 (two)]" in text
    assert "--mode [a|b]" in text
    assert "--sharp BOOL" in text
    assert "[default: true]" in text
    assert "[default: none]" in text
    run = CliRunner().invoke(made(), ["--order=5", "--sharp=false", "--blunt=0.5"])
    assert eval(run.output) == {"order": 5, "mode": None, "sharp": False, "blunt": 0.5}
    assert CliRunner().invoke(made(), ["--mode=c"]).exit_code == 2
    assert eval(CliRunner().invoke(made(True), []).output)["mode"] == "a"


def test_a_field_of_two_types_is_refused() -> None:
    @dataclass(frozen=True)
    class Other:
        order: str = "x"

    with pytest.raises(TypeError, match="--order has several types"):
        options_of_classes({"one": One, "other": Other})
