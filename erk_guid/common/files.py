"""Writing files whole or not at all, and hashing them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from erk_guid.common.errors import ErkGuidError

PARTIAL = ".partial"
"""Part of the name of every file that is being written (never of a finished one)."""


@contextlib.contextmanager
def replacing(path: str | Path, make_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` if the block succeeds.

    A missing folder is made, unless `make_folder` is False. A file that a killed process left
    behind has `PARTIAL` in its name (and begins with a dot), so it is never taken for a finished
    file. A link is followed. What is not a regular file (a terminal, /dev/null) is written to
    directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on two nodes may have one number, and write the same file.
    mark = f"{os.getpid()}-{secrets.token_hex(3)}"
    partial = path.with_name(f".{path.name}.{mark}{PARTIAL}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes, make_folder: bool = True) -> None:
    """Write `data` to `path`, whole or not at all, see `replacing`."""
    with replacing(path, make_folder) as partial:
        partial.write_bytes(data)


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, before hours of work and not after.

    Raises:
        ErkGuidError: `path` is a folder, or its folder cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir() or not path.name:
        raise ErkGuidError(f"cannot write {str(path)!r}: it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ErkGuidError(f"cannot write to {path.parent}: {error.strerror}") from error


def user_path(path: str | Path) -> Path:
    """Return a path as users write it, with ~ replaced by the home.

    Raises:
        ErkGuidError: it is empty, or that user has no home here.
    """
    if not str(path) or str(path) == ".":
        raise ErkGuidError("an empty path, or '.'; name a file or a folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ErkGuidError(f"{path}: {error}") from error


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
