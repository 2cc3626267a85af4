"""Standard input, output and error of a program that was started without some of them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator


def open_streams() -> None:
    """Open the null device in the place of a standard stream that is closed.

    The next file to be opened would get its number otherwise, and with it what is written to
    standard error.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """End the program with one line where its standard output cannot be written (a full disk).

    What the output's encoding has no character for (bytes of a name that is not UTF-8) is written
    with a backslash, as standard error does by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not from_writing(error):
            raise
        # What is left in the buffer must go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno != errno.EPIPE:  # `| head` needs no word
            sys.stderr.write(f"Error: cannot write to standard output: {error.strerror}\n")
        raise SystemExit(1) from None


def from_writing(error: OSError) -> bool:
    """Return whether an error came from writing output: from click's echo, or from here."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals["__name__"] in ("click.utils", __name__)
