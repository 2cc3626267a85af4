"""SIGTERM and Ctrl-C during a job: it ends at the next step, whole, and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.signals import Interrupt, handled_by, number_of
from erk_guid.generation.peers import LeavingError

HASTE = 2.0
"""Seconds within which a second signal is the first one: torchrun hands on what a terminal sent
to its processes, too."""


class StoppedError(LeavingError):
    """A signal ended the job.

    Attributes:
        exit_code: 128 and the number of the signal, as shells count.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {message}")
        self.exit_code = 128 + number


class Stop:
    """Whether a signal has come, and whether it may end the work at any place."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._since = 0.0
        self._deferred = False
        self.raised: int | None = None
        """The signal that this has raised an `Interrupt` for."""

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal wait for `check`; a second one does not wait."""
        self.check()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise an `Interrupt` if a signal has come."""
        if self._number is not None:
            raise Interrupt(self._number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal (its handler)."""
        now = time.monotonic()
        if self._number is None:
            self._number, self._since = number, now
            if self._deferred:
                # Not by print, which may be at work beneath this handler.
                os.write(2, b"\nStopping after this step; once more to stop at once\n")
                return
        elif now - self._since < HASTE:
            return
        self.raised = number
        raise Interrupt(number)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Handle SIGTERM and SIGINT while a job runs, unless the program does so itself.

    Raises:
        StoppedError: a signal came, and what it interrupted has not said more of it.
    """
    stop = Stop()
    try:
        with handled_by(stop.handle):
            yield stop
    except StoppedError:
        raise
    except ErkGuidError as error:
        if stop.raised is None:
            raise
        # C++ code turned the exception into one of its own: "damaged", of a file that is not.
        raise StoppedError(stop.raised, "the same command with --resume goes on") from error
    except KeyboardInterrupt as error:
        raise StoppedError(
            number_of(error), "no image was begun; the same command begins again"
        ) from None
