"""Reading untrusted `.npz` files: nothing is allocated because of a header alone."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from erk_guid.common.errors import ErkGuidError, printable, reason_of
from erk_guid.common.zips import ZipError, check_member, open_zip

MAX_RATIO, FREE_BYTES = 100, 1 << 26
"""Bounds on how far arrays may unpack: real features and images do not shrink a hundredfold."""

KINDS = {"f": "real numbers", "iu": "whole numbers", "U": "text"}


class NpzError(ErkGuidError):
    """An `.npz` that is damaged, or not what it should be."""


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in the file.

    Raises:
        NpzError: it is no `.npz`.
    """
    return _guarded(path, lambda archive: [n.removesuffix(".npy") for n in archive.namelist()])


def read_npz(path: Path, wanted: Callable[[str], str | None]) -> dict[str, np.ndarray]:
    """Read the arrays of a file, checked before they are unpacked.

    Args:
        path: the file.
        wanted: for a name, the kinds of numbers it may hold (letters of NumPy's dtype kinds,
            e.g. "f" or "iu"), or None to leave the array out.

    Raises:
        NpzError: it is no `.npz`, or an array is not of the kind wanted or larger than its data.
    """

    def read(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
        members: dict[str, zipfile.ZipInfo] = {}
        kinds: dict[str, str] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            found = wanted(name)
            if found is not None:
                if name in members:
                    raise NpzError(f"it holds {printable(name, 100)} more than once")
                members[name], kinds[name] = member, found
        _check_sizes(members.values())
        return {name: _read(archive, member, kinds[name]) for name, member in members.items()}

    return _guarded(path, read)


def _check_sizes(members: Collection[zipfile.ZipInfo]) -> None:
    unpacked = packed = 0
    for member in members:
        check_member(member)
        if not member.filename.isprintable():
            raise NpzError(f"{printable(member.filename, 100)} is no name of an array")
        unpacked += member.file_size
        packed += member.compress_size
        if unpacked > MAX_RATIO * packed + FREE_BYTES:
            raise NpzError(f"{member.filename[:100]} would unpack to {member.file_size:,} bytes")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kinds: Collection[str]) -> np.ndarray:
    try:
        with archive.open(member) as file:
            _check_header(file, member, kinds)
        with archive.open(member) as file:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except NpzError as error:
        raise NpzError(f"{member.filename[:100]} {error}") from error
    except Exception as error:  # many kinds, as in _guarded
        raise NpzError(f"{member.filename[:100]} is damaged ({reason_of(error, 100)})") from error


def _check_header(file: Any, member: zipfile.ZipInfo, kinds: Collection[str]) -> None:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise NpzError("is of an unknown version")
    header = np.lib.format
    read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in kinds or dtype.itemsize == 0:
        raise NpzError(f"holds {printable(dtype, 100)}, not what belongs there")
    if any(type(n) is not int or n < 0 for n in shape):
        raise NpzError("has no shape")
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise NpzError("declares more than it holds")


def _guarded(path: Path, read: Callable[[zipfile.ZipFile], Any]) -> Any:
    try:
        if not path.is_file():
            raise NpzError("there is no such file")
        # Python's parser warns of some headers, and quotes them.
        with open_zip(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(archive)
    except (NpzError, ZipError) as error:
        raise NpzError(f"cannot read {path}: {error}") from error
    except Exception as error:
        # zipfile, its decompressors and NumPy's parser of headers raise many kinds of errors for
        # bytes that they cannot read.
        reason = reason_of(error, 100)
        raise NpzError(f"cannot read {path}: damaged, or no .npz ({reason})") from error
