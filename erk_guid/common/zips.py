"""Reading zips that are not trusted: nothing is unpacked because of a directory alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

from erk_guid.common.errors import ErkGuidError, printable

METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
"""Ways of packing that are read. Python unpacks the others in pieces of any size."""

ENCRYPTED = 0x1
"""Bit of a member's flags."""


class ZipError(ErkGuidError):
    """A zip, or a file in it, that is not read."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip and check its directory; the time is linear in the file's size.

    Raises:
        ZipError: a name occurs twice, or the files in it overlap.
        Exception: `zipfile` raises many kinds for what it cannot read.
    """
    archive = zipfile.ZipFile(path)
    try:
        _check_directory(archive, path.stat().st_size)
    except Exception:
        archive.close()
        raise
    return archive


def _check_directory(archive: zipfile.ZipFile, size: int) -> None:
    seen: set[str] = set()
    for name in archive.namelist():
        if name in seen and not name.endswith("/"):
            raise ZipError(f"it holds {printable(name, 100)} more than once; pack it again")
        seen.add(name)
    # A bomb lets many names share one packed file.
    if sum(member.compress_size for member in archive.infolist()) > size:
        raise ZipError("its files overlap or are cut short; make or fetch it again")


def check_member(member: zipfile.ZipInfo) -> None:
    """Refuse a file in a zip that needs a password, or another program to unpack it.

    Raises:
        ZipError: the message names the file and the remedy.
    """
    name = printable(member.filename, 100)
    if member.flag_bits & ENCRYPTED:
        raise ZipError(f"{name} is encrypted; pack it again without a password")
    if member.compress_type not in METHODS:
        raise ZipError(
            f"{name} is packed by the method {member.compress_type}, not 0 (stored) or 8 "
            "(deflate); pack it again"
        )


def read_member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Return a file of a zip.

    Args:
        archive: the zip.
        name: the file.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ZipError: it is larger, or is not read; the message names it.
        Exception: `zipfile` raises many kinds for what it cannot read.
    """
    try:
        member = archive.getinfo(name)
    except KeyError as error:
        raise FileNotFoundError(name) from error
    check_member(member)
    if member.file_size > most:
        raise ZipError(
            f"{printable(name, 100)} would unpack to {member.file_size:,} bytes; at most {most:,} "
            "are read"
        )
    with archive.open(member) as file:
        # Without a number, all that is there would be unpacked, whatever size was declared.
        return file.read(member.file_size)
