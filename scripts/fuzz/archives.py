"""Files with a header or with members: zip, `.npz`, safetensors, PNG."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from random import Random
from typing import Any

import numpy as np

from scripts.fuzz.mutations import (
    NUMBERS,
    TEXTS,
    Mutator,
    change_value,
    edit,
    json_bytes,
    mutate_json,
    scramble,
)

DTYPES = ("<f2", "<f4", "<f8", ">f8", "|i1", "|u1", "<i4", "<u8", "|b1", "<U5", "|S3", "|O", "<c16",
          "<M8[s]", "|V8", "<U0", "f8", "garbage")  # fmt: skip
TORCH_DTYPES = ("F16", "F32", "F64", "BF16", "I8", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X")

Members = list[tuple[str, bytes]]


def npz(**arrays: Any) -> bytes:
    """Return the content of an `.npz`."""
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return undated(data.getvalue())


def undated(data: bytes) -> bytes:
    """Return a zip that does not say when it was made, so that all runs begin alike."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return zip_of([(name, archive.read(name)) for name in archive.namelist()])


def zip_of(members: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip without dates; names may repeat."""
    data = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(data, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return data.getvalue()


def mutator_of_zip(of_member: Mutator) -> Mutator:
    """Return a mutator of zips: of members, names, the list of members, or of raw bytes."""

    def change(member: tuple[str, bytes], rng: Random) -> tuple[str, bytes]:
        name, content = member
        if rng.random() < 0.2:
            return rng.choice((*TEXTS[1:], name.upper(), f"a/{name}", f"{name}.npy")), content
        return name, of_member(content, rng) or scramble(content, rng)

    def mutate(data: bytes, rng: Random) -> bytes | None:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                infos = [i for i in archive.infolist() if i.file_size < 1 << 20]
                members: Members = [(i.filename, archive.read(i)) for i in infos]
            edit(members, rng, lambda member: change(member, rng))
            method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))
            made = zip_of(members, method)
        except Exception:  # zipfile and its decompressors raise many kinds for damaged files
            return None
        return _changed_directory(made, rng) if rng.random() < 0.2 else made

    return mutate


def _changed_directory(data: bytes, rng: Random) -> bytes:
    """Change a number in a zip's table of contents: sizes, methods, offsets, flags."""
    at = data.rfind(b"PK\x01\x02")
    width = rng.choice((2, 4))
    place = at + rng.randrange(4, 46)
    value = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
    return data[:place] + value + data[place + width :]


def mutate_npy(data: bytes, rng: Random) -> bytes | None:
    """Change the dtype, shape or order that an `.npy` declares, or its values."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        return None
    rest = data[stream.tell() :]
    header: dict[str, Any] = {"descr": dtype.str, "fortran_order": fortran, "shape": shape}
    match rng.randrange(5):
        case 0:
            header["descr"] = rng.choice((*DTYPES, [("a", "<f8")], [("a", "|O")], None))
        case 1:
            sizes = list(shape)
            edit(sizes, rng, lambda size: rng.choice((*NUMBERS, -1, size + 1, True, "x", None)))
            header["shape"] = tuple(sizes)
        case 2:
            header[rng.choice(list(header))] = change_value(rng.choice(NUMBERS), rng)
        case 3:
            values = bytearray(rest)
            at = rng.randrange(len(values) + 1)
            special = rng.choice((np.nan, np.inf, -np.inf, 1e308, 0.0))
            values[at // 8 * 8 : at // 8 * 8 + 8] = struct.pack("<d", special)
            rest = bytes(values)
        case _:
            rest = rest[: rng.randrange(len(rest) + 1)]
    text = rng.choice((repr(header), repr(header), scramble(repr(header).encode(), rng).decode(
        "latin-1")))  # fmt: skip
    raw = text.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(raw) % 65536) + raw + rest


mutate_npz = mutator_of_zip(mutate_npy)


def mutate_safetensors(data: bytes, rng: Random) -> bytes | None:
    """Change the JSON header: shapes, dtypes, offsets, or the settings inside its metadata."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        rest = data[8 + size :]
        text = _changed_header(header, rng)
    except (ValueError, struct.error, RecursionError, TypeError, AttributeError):
        return None
    length = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
    if rng.random() < 0.2 and rest:
        rest = scramble(rest, rng)
    return struct.pack("<Q", length) + text + rest


def _changed_header(header: dict[str, Any], rng: Random) -> bytes:
    meta = header.get("__metadata__", {})
    if meta and rng.random() < 0.5:
        key = rng.choice(list(meta))
        inner = mutate_json(meta[key].encode(), rng)
        meta[key] = rng.choice(TEXTS) if inner is None else inner.decode(errors="replace")
        return json_bytes(header)
    names = [name for name in header if name != "__metadata__"]
    if not names or rng.random() < 0.2:
        return json_bytes(change_value(header, rng))
    name = rng.choice(names)
    if not isinstance(header[name], dict) or "shape" not in header[name]:
        header[name] = change_value(header[name], rng)
        return json_bytes(header)
    match rng.randrange(5):
        case 0:
            header[name]["dtype"] = rng.choice(TORCH_DTYPES)
        case 1:
            header[name]["shape"] = change_value(header[name]["shape"], rng)
        case 2:
            header[name] = header[rng.choice(names)]
        case 3:
            header[rng.choice((*TEXTS, name + ".x"))] = header.pop(name)
        case _:
            header[name] = change_value(header[name], rng)
    return json_bytes(header)


SEPARATOR = b"\n--- weights ---\n"
"""Between config.json and the weights in one input."""


def mutate_model(data: bytes, rng: Random) -> bytes | None:
    """Change config.json or the weights beside it."""
    config, separator, weights = data.partition(SEPARATOR)
    if not separator:
        return None
    if rng.random() < 0.6:
        return (mutate_json(config, rng) or scramble(config, rng)) + separator + weights
    return config + separator + (mutate_safetensors(weights, rng) or scramble(weights, rng))


def mutate_image(data: bytes, rng: Random) -> bytes | None:
    """Change a chunk of a PNG and mend its checksum."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    extra = ((b"tRNS", b"\0\1"), (b"PLTE", b"\0\1\2" * 4), (b"acTL", b"\0\0\0\2\0\0\0\0"),
             (b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 100)), (b"eXIf", b"MM\0*"),
             (b"zTXt", b"x\0\0" + zlib.compress(b"\0" * 1000)), (b"iTXt", b"x\0\1\0\0\0"),
             (b"fcTL", b"\0" * 26), (b"fdAT", b"\0" * 8), (b"pHYs", b"\0" * 9))  # fmt: skip

    def change(chunk: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        name, content = chunk
        if rng.random() < 0.2:
            return rng.choice(extra)
        if name == b"IHDR" and rng.random() < 0.8:
            sides = [rng.choice((0, 1, 7, 4096, 4097, 65535, 2**31 - 1, 2**32 - 1))] * 2
            sides[rng.randrange(2)] = rng.choice((1, 5, 8))
            kept = struct.unpack(">II", content[:8].ljust(8, b"\0"))
            sides = rng.choice((sides, list(kept)))
            tail = [rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1)), 0, 0, 0]
            tail[rng.randrange(2, 5)] = rng.choice((0, 0, 1, 255))
            return name, struct.pack(">II5B", *sides, *tail)
        return name, scramble(content, rng)

    edit(chunks, rng, change)
    parts = [data[:8]]
    for name, content in chunks:
        parts.append(struct.pack(">I", len(content)) + name + content)
        parts.append(struct.pack(">I", zlib.crc32(name + content)))
    return b"".join(parts)


def mutate_member(data: bytes, rng: Random) -> bytes | None:
    """Change a member of a zip of images: a picture, or its list of labels."""
    return mutate_image(data, rng) or mutate_json(data, rng)
