"""What a node is: inputs, outputs, a function. The classes of both APIs are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from erk_guid.common.errors import ErkGuidError, printable

WIDGETS = ("FLOAT", "INT", "STRING", "BOOLEAN", "COMBO")
"""Types of inputs that the user fills in; all others are connected."""


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: of the input, which saved workflows know it by.
        kind: ComfyUI's name of the type.
        tooltip: what it is, shown by ComfyUI.
        default: of a widget.
        options: of a COMBO.
        least, most, step: of a number.
        optional: whether ComfyUI may leave it out.
    """

    name: str
    kind: str
    tooltip: str
    default: Any = None
    options: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    step: float | None = None
    optional: bool = False

    def check(self, value: Any) -> None:
        """Refuse a value that is none of the options, or no number in range.

        ComfyUI checks widgets, but neither what is connected to them nor calls by other programs.

        Raises:
            ErkGuidError: it is; the message says what is possible.
        """
        if self.kind == "COMBO" and value not in self.options:
            known = ", ".join(self.options)
            raise ErkGuidError(f"{self.name} {printable(repr(value), 60)} is unknown; take {known}")
        if self.kind in ("FLOAT", "INT") and not self._in_range(value):
            raise ErkGuidError(
                f"{self.name} must be a number from {self.least:g} to {self.most:g}, got "
                f"{printable(repr(value), 60)}"
            )

    def _in_range(self, value: Any) -> bool:
        types = (int,) if self.kind == "INT" else (int, float)
        if isinstance(value, bool) or not isinstance(value, types):
            return False
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        return low <= value <= high


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes:
        name: shown beside it; no input of the node has the same one.
        kind: ComfyUI's name of the type.
        tooltip: what it is.
    """

    name: str
    kind: str
    tooltip: str


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        node_id: by which saved workflows know it.
        title: shown to the user.
        like: a stock node in whose menu it stands.
        menu: that menu, where there is no such node.
        description: one or two sentences.
        guide: Markdown for the node's help, beside the tables that are made of inputs and outputs.
        inputs, outputs: in the order of ComfyUI.
        function: called with all inputs by name; returns the outputs.
        fingerprint: called likewise; its result changes when the node must be run again though no
            input changed. None where that never is so.
    """

    node_id: str
    title: str
    like: str
    menu: str
    description: str
    guide: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    function: Callable[..., tuple[Any, ...]]
    fingerprint: Callable[..., Any] | None = None

    def run(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Check the inputs and call the function; widgets that are not given have their defaults.

        Raises:
            ErkGuidError: an unknown name, or a value out of range.
        """
        known = {i.name: i for i in self.inputs}
        for name in given:
            if name not in known:
                raise ErkGuidError(
                    f"{self.title} has no input {printable(name, 60)!r}; it has {', '.join(known)}"
                )
        values = {**self.defaults(), **given}
        for name, value in values.items():
            known[name].check(value)
        missing = [name for name in known if name not in values and not known[name].optional]
        if missing:
            raise ErkGuidError(f"{self.title} needs {', '.join(missing)}")
        return self.function(**values)

    def defaults(self) -> dict[str, Any]:
        """Return the values of the widgets before anybody touches them."""
        return {i.name: i.default for i in self.inputs if i.kind in WIDGETS}
