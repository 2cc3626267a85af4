"""Random changes of bytes, text and JSON. Choices come from a `random.Random`: they repeat."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], "bytes | None"]
"""Changes an input; None if it cannot be taken apart, and its bytes are to be changed instead."""

NUMBERS = (
    0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32, 2**33,
    2**48, 2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64, 10**15, 10**18, 2**127, 2**128, 10**30,
)  # fmt: skip
REALS = (0.0, -0.0, 0.5, 1e-320, 5e-324, 1e-8, 1e8, 1e300, 1.7e308, float("inf"), float("nan"))
TEXTS = (
    "", "a", " ", "\n", "\r", "\x00", "\x1b[2J", "../../../../up", "/etc/passwd", "~", "~nobody",
    "NaN", "Infinity", "1e999", "0x10", "1_0", "٣", "ﬀ", "\ud800", "\u202e", "💥", "%s", "{0}",
    "http://127.0.0.1:9/x", "a" * 300, "true", "null", "heun", "modal", "digits", "preset",
)  # fmt: skip
HUGE, DEEP = "@huge@", "@deep@"
"""Stand for a number of 5000 digits and for lists nested deeper than Python's stack."""


def scramble(data: bytes, rng: Random) -> bytes:
    """Change a few bytes, without knowing what they mean."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 2, 4, 8, 16, 64)))
        match rng.randrange(7):
            case 0:
                del raw[at:end]
            case 1:
                raw[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 64)))
            case 2:
                raw[at:at] = raw[at:end] * rng.choice((1, 2, 16))
            case 3:
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(NUMBERS) % (1 << 8 * width)
                raw[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
            case 4:
                other = rng.randrange(len(raw) + 1)
                raw[at:end] = raw[other : other + end - at]
            case 5 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case _:
                raw[at:end] = rng.randbytes(end - at)
    return bytes(raw)


def edit(items: list[Any], rng: Random, change: Callable[[Any], Any]) -> None:
    """Delete, double, move or change some of the items of a list, in place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not items:
            return
        at, other = rng.randrange(len(items)), rng.randrange(len(items))
        match rng.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(other, items[at])
            case 2:
                items[at], items[other] = items[other], items[at]
            case 3:
                low, high = sorted((at, min(other, at + 40)))
                items[at:at] = items[low:high]
            case _:
                items[at] = change(items[at])


def scalar(rng: Random) -> Any:
    """Return a value that readers of numbers and text may stumble over."""
    match rng.randrange(7):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return -rng.choice(NUMBERS)
        case 2:
            return rng.choice(REALS) * rng.choice((1, -1))
        case 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice((None, True, False))
        case 5:
            return rng.choice((HUGE, DEEP, [], {}, [[]], [None], {"": None}, [1, "a", None]))
        case _:
            return rng.randrange(100)


def change_value(value: Any, rng: Random, depth: int = 0) -> Any:
    """Return a JSON value changed somewhere."""
    inside = isinstance(value, (list, dict)) and value and rng.random() < 0.85 and depth < 12
    if not inside:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
            return value * rng.choice((-1, 0, 2, 0.5)) + rng.choice((0, 1, -1, 1e-9))
        return scalar(rng)
    if isinstance(value, list):
        changed = list(value)
        edit(changed, rng, lambda item: change_value(item, rng, depth + 1))
        return changed
    changed_dict = dict(value)
    key = rng.choice(list(changed_dict))
    match rng.randrange(8):
        case 0:
            del changed_dict[key]
        case 1:
            changed_dict[rng.choice(TEXTS)] = changed_dict.pop(key)
        case 2:
            other = rng.choice(list(changed_dict))
            changed_dict[key] = copy.deepcopy(changed_dict[other])
        case 3:
            changed_dict[rng.choice(TEXTS)] = scalar(rng)
        case _:
            changed_dict[key] = change_value(changed_dict[key], rng, depth + 1)
    return changed_dict


def json_bytes(value: Any) -> bytes:
    """Write JSON that no Python object could hold, too: see `HUGE` and `DEEP`."""
    text = json.dumps(value)
    text = text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    return text.encode()


def mutate_json(data: bytes, rng: Random) -> bytes | None:
    """Change a value of a JSON text, or a name, or the tree."""
    try:
        value = json.loads(data)
        return json_bytes(change_value(value, rng))
    except (ValueError, RecursionError, TypeError, OverflowError):
        return None


def mutate_lines(data: bytes, rng: Random) -> bytes | None:
    """Change lines of JSON."""
    lines = data.split(b"\n")
    edit(lines, rng, lambda line: mutate_json(line, rng) or scramble(line, rng))
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\x85", b"\x0c")).join(lines)


def mutator_of_text(separators: Sequence[str], words: Sequence[str]) -> Mutator:
    """Return a mutator of text that is made of words between separators."""

    def word(rng: Random) -> str:
        match rng.randrange(5):
            case 0:
                return str(rng.choice(NUMBERS))
            case 1:
                return repr(rng.choice(REALS))
            case 2:
                return rng.choice(TEXTS)
            case _:
                return rng.choice(words)

    def mutate(data: bytes, rng: Random) -> bytes | None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        separator = rng.choice(separators)
        parts = text.split(separator)
        edit(parts, rng, lambda part: word(rng) if rng.random() < 0.7 else part + word(rng))
        if rng.random() < 0.1 and len(text) < 1 << 14:
            parts += parts * rng.choice((1, 10, 100))
        return separator.join(parts).encode(errors="surrogatepass")

    return mutate
