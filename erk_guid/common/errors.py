"""Errors that the user can fix; command lines print them without a traceback."""

from __future__ import annotations


class ErkGuidError(Exception):
    """An error that the user can fix; the message says what and how.

    Attributes:
        exit_code: with which a command that meets it ends.
    """

    exit_code: int = 1


class CheckpointError(ErkGuidError):
    """A file that cannot be used: damaged, refused as unsafe, or of an unknown kind."""


class MissingExtraError(ErkGuidError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}: pip install 'erk-guid[{extra}]' "
            f"(in a clone: pip install '.[{extra}]')"
        )


def printable(message: object, limit: int = 400) -> str:
    """Return `message` as one printable line of at most `limit` characters.

    Messages quote text from files, and a terminal would obey control characters in it. Marks
    that turn the direction of writing, and halves of characters (from names that are not UTF-8),
    are replaced likewise.
    """
    text = str(message)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text)


def reason_of(error: BaseException, limit: int = 200) -> str:
    """Return what an error of a library says, printable; its kind if it says nothing."""
    return printable(str(error).strip() or type(error).__name__, limit)
