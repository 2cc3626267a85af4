"""Writing files whole or not at all, and hashing them."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path

from erk_guid.common.errors import ErkGuidError, printable

JSON_START = (b"{",)
NPZ_START = (b"PK",)
PICTURE_START = (b"\x89PNG", b"\xff\xd8")
STARTS = {
    ".png": PICTURE_START, ".jpg": PICTURE_START, ".jpeg": PICTURE_START,
    ".svg": (b"<?xml", b"<svg"), ".html": (b"<!",), ".json": JSON_START, ".npz": NPZ_START,
}  # fmt: skip
"""How files begin, by the end of their names, see `check_writable`."""
OWN = "erk_guid"
"""What every picture, page, Markdown and JSON of scores of ours has in its beginning, or end."""
MARKED = (".png", ".jpg", ".jpeg", ".svg", ".html", ".md")
MARKDOWN = f"<!-- Written by {OWN}. -->\n\n"
"""What Markdown of ours begins with; it is not shown."""

PARTIAL = ".partial"
"""Part of the name of every file that is being written (never of a finished one)."""


@functools.cache
def shipped_file(name: str) -> Path:
    """Return a file of `erk_guid/data`.

    Where the package is run from a zip it is unpacked, and deleted when the program ends.
    """
    unpacked = contextlib.ExitStack()
    atexit.register(unpacked.close)
    return unpacked.enter_context(as_file(files("erk_guid") / "data" / name))


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
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Return a new temporary name beside `path`."""
    # Processes on two nodes may have one number, and write the same file.
    mark = f"{os.getpid()}-{secrets.token_hex(3)}"
    return path.with_name(f".{path.name}.{mark}{PARTIAL}{path.suffix}")


def remove_partials(path: str | Path) -> None:
    """Delete what killed processes left of `path`; call it where no other process writes it."""
    path = Path(os.path.realpath(path))
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}{path.suffix}"):
        partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes, make_folder: bool = True) -> None:
    """Write `data` to `path`, whole or not at all, see `replacing`."""
    with replacing(path, make_folder) as partial:
        partial.write_bytes(data)


def check_writable(path: str | Path, begins: Sequence[bytes] = ()) -> None:
    """Refuse a file that cannot be written, before hours of work and not after.

    Args:
        path: the file.
        begins: how files of the kind begin; by default what is known by the end of the name. What
            is there under that name and begins otherwise belongs to somebody else, and is not
            replaced. Nor are pictures, pages, Markdown and JSON that do not say that they are ours.

    Raises:
        ErkGuidError: `path` is a folder, its folder cannot be made or written to, or there is
            a file of another kind.
    """
    path = Path(path)
    if os.path.isdir(path) or not path.name:
        raise ErkGuidError(f"cannot write {str(path)!r}: it is a folder; name a file")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.is_file():
            partial = _partial(Path(os.path.realpath(path)))  # its name is longer, too
            partial.touch()
            partial.unlink()
    except OSError as error:
        where = path if error.errno == errno.ENAMETOOLONG else path.parent
        raise ErkGuidError(
            f"cannot write to {_shown(where)}: {error.strerror}; write elsewhere"
        ) from error
    begins = begins or STARTS.get(path.suffix.lower(), ())
    text = path.suffix.lower() in (".md", ".csv", ".txt")  # not of zeros, or a program
    if (begins or text) and path.is_file():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = file.read(1024)
            foreign = not start.startswith(tuple(begins)) if begins else b"\0" in start
            if path.suffix.lower() in MARKED or begins == JSON_START:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
                foreign |= OWN.encode() not in start + file.read(1024)
            if start and foreign:
                raise ErkGuidError(
                    f"{_shown(path)} is there, and is no earlier output of this kind; write to "
                    "another file, or delete it"
                )


def check_folder(path: str | Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made.

    Raises:
        ErkGuidError: it is a file or lies in one, its name is too long, or it may not be written.
    """
    path = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        there = next(p for p in (path, *path.parents, Path(".")) if os.path.isdir(p))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ErkGuidError(
            f"cannot write to {_shown(path)}: {error.strerror}; choose another folder"
        ) from error


def _shown(path: Path) -> str:
    """Return a path for a message, in which what to do comes after it."""
    return printable(path, 200)


def user_path(path: str | Path) -> Path:
    """Return a path as users write it, with ~ replaced by the home.

    Raises:
        ErkGuidError: it is empty, or that user has no home here.
    """
    if not str(path) or str(path) == ".":
        raise ErkGuidError("an empty path, or '.'; name a file or a folder")
    return with_home(path)


def with_home(path: str | Path) -> Path:
    """Return a path with ~ replaced by the home.

    Raises:
        ErkGuidError: that user has no home here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise ErkGuidError(f"{_shown(Path(path))}: {reason}; write the path in full") from error


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
