"""Signals that end a program: Ctrl-C (SIGINT) and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""What a launcher, a scheduler or a user sends to end a program."""


class Interrupt(KeyboardInterrupt):
    """A signal asked this program to end; `number` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def number_of(error: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised `error`."""
    return error.number if isinstance(error, Interrupt) else int(signal.SIGINT)


def said(number: int) -> str:
    """Return the line for a program that a signal ended."""
    return f"Stopped by {signal.Signals(number).name}"


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process (handler): while it imports, an exception may be caught by anybody."""
    os.write(2, f"{said(number)}\n".encode())
    os._exit(128 + number)


class Interrupting:
    """Raise an `Interrupt` (handler), and remember it: C++ code may swallow the exception.

    Attributes:
        number: that of the last signal; None if there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        raise Interrupt(number)


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let `handler` take SIGTERM and SIGINT, unless the program has handlers of its own.

    Returns:
        What handled them before, for `restore`.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    ours = (signal.SIG_DFL, signal.default_int_handler, end_at_once)
    before: dict[int, Any] = {n: signal.getsignal(n) for n in STOPPING}
    before = {
        number: usual
        for number, usual in before.items()
        if usual in ours or isinstance(usual, Interrupting)
    }
    for number in before:
        signal.signal(number, handler)
    return before


def restore(before: dict[int, Any]) -> None:
    """Undo `handle`."""
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` take the signals in the block, see `handle`."""
    before = handle(handler)
    try:
        yield
    finally:
        restore(before)
