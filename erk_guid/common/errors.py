"""Errors that are the user's to mend; command lines print them without a traceback."""

from __future__ import annotations


class ErkGuidError(Exception):
    """Something the user can put right; the message says what and how."""


class CheckpointError(ErkGuidError):
    """A file is not what it should be: damaged, refused as unsafe, or of an unknown kind."""


class MissingExtraError(ErkGuidError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'erk-guid[{extra}]'")


def printable(message: object, limit: int = 400) -> str:
    """One line of moderate length: messages quote what files say, and terminals obey it."""
    text = str(message)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text)
