"""Standard input, output and error of a program that was started without some of them."""

from __future__ import annotations

import os
import sys


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
