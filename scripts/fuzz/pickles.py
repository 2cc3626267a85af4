"""Pickles that are nearly valid: their instructions are taken apart, changed and put together.

The instructions come from `pickletools`, which runs nothing. Byte strings that hold a torch archive
(five pickles, a length, the elements) are taken apart in the same way.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn

from scripts.fuzz.guard import CANARY
from scripts.fuzz.mutations import NUMBERS, REALS, TEXTS, edit, scramble

GLOBALS = (
    "torch HalfStorage", "torch FloatStorage", "torch DoubleStorage", "torch LongStorage",
    "torch BFloat16Storage", "torch ByteStorage", "torch BoolStorage", "torch Storage",
    "torch_utils.persistence _reconstruct_persistent_obj", "dnnlib.util EasyDict",
    "collections OrderedDict", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes", "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct", "numpy.core.multiarray scalar", "numpy dtype",
    "numpy ndarray", "torch.nn.modules.container ModuleDict",
    "torch.nn.modules.container ModuleList", "torch.nn.modules.linear Linear", "os system",
    "builtins exec", "builtins eval", "builtins getattr", f"{CANARY} sing", "nt system",
    "posix system", "subprocess Popen", "collections OrderedDict.__init__.__globals__",
    "copyreg _reconstructor", "torch load", "numpy load", "pickle loads",
)  # fmt: skip


@dataclass(frozen=True)
class Op:
    """An instruction: its name, its argument as `pickletools` reads it, and its bytes."""

    name: str
    arg: Any
    raw: bytes


def ops_of(data: bytes) -> tuple[list[Op], int]:
    """Return the instructions of the first pickle in `data`, and where it ends.

    Raises:
        ValueError: it is no pickle, or is damaged.
    """
    stream = io.BytesIO(data)
    try:
        found = list(pickletools.genops(stream))
    except Exception as error:  # pickletools raises several kinds for bytes that it cannot read
        raise ValueError(str(error)) from error
    ends = [*(place or 0 for _, _, place in found[1:]), stream.tell()]
    ops = [
        Op(op.name, arg, data[place or 0 : end])
        for (op, arg, place), end in zip(found, ends, strict=True)
        if op.name != "FRAME"  # its length would be wrong after a change
    ]
    return ops, stream.tell()


def mutate_pickle(data: bytes, rng: Random) -> bytes | None:
    """Change instructions of a pickle, or arguments, or bytes after its end."""
    try:
        ops, end = ops_of(data)
    except ValueError:
        return None
    if rng.random() < 0.3:
        at = rng.randrange(len(ops) + 1)
        ops[at:at] = _snippet(rng, ops)
    else:
        edit(ops, rng, lambda op: _changed(op, rng, ops))
    return b"".join(op.raw for op in ops) + data[end:]


def _changed(op: Op, rng: Random, ops: list[Op]) -> Op:
    if op.arg is None or rng.random() < 0.1:
        return rng.choice(_SIMPLE) if rng.random() < 0.5 else rng.choice(ops)
    match op.name:
        case "GLOBAL":
            return _global(rng.choice(GLOBALS))
        case "BINGET" | "LONG_BINGET" | "BINPUT" | "LONG_BINPUT" | "GET" | "PUT":
            index = max(0, op.arg + rng.choice((-2, -1, 1, 2, 100))) if rng.random() < 0.8 else None
            index = rng.choice(NUMBERS) if index is None else index
            name = "LONG_BINGET" if "GET" in op.name else "LONG_BINPUT"
            code = b"j" if "GET" in op.name else b"r"
            return Op(name, index, code + struct.pack("<I", index % 2**32))
        case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
            return _bytes(_changed_bytes(op.arg, rng))
        case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
            others = [o.arg for o in ops if o.name == op.name]
            return _text(rng.choice((*TEXTS, *others[:50], *GLOBALS)))
        case "BINFLOAT" | "FLOAT":
            return _real(rng.choice(REALS))
        case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "INT" | "LONG":
            near = op.arg * rng.choice((1, 2, -1)) + rng.choice((-1, 0, 1))
            return _whole(rng.choice((near, near, rng.choice(NUMBERS), -rng.choice(NUMBERS))))
        case _:
            return Op(op.name, op.arg, op.raw[:1] + scramble(op.raw[1:], rng))


def _changed_bytes(data: bytes, rng: Random) -> bytes:
    """Change a torch archive inside of one of its pickles, in its length, or in its elements."""
    if not data.startswith(b"\x80\x02") or rng.random() < 0.15:
        return scramble(data, rng)
    parts: list[bytes] = []
    rest = data
    try:
        while rest.startswith(b"\x80") and len(parts) < 5:
            _, end = ops_of(rest)
            parts.append(rest[:end])
            rest = rest[end:]
    except ValueError:
        return scramble(data, rng)
    at = rng.randrange(len(parts) + 3)
    if at < len(parts):
        parts[at] = mutate_pickle(parts[at], rng) or parts[at]
    elif at == len(parts):
        rest = struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + rest[8:]
    elif at == len(parts) + 1:
        rest = rest[: rng.randrange(len(rest) + 1)]
    else:
        edit(parts, rng, lambda part: mutate_pickle(part, rng) or part)
    return b"".join(parts) + rest


def _snippet(rng: Random, ops: list[Op]) -> list[Op]:
    """Return instructions that would run code, or use much memory or time, if they were obeyed."""
    tuple_, reduce_ = Op("TUPLE1", None, b"\x85"), Op("REDUCE", None, b"R")
    calls = (
        (f"{CANARY} sing", _text("")),
        ("os system", _text("exit 0")),
        ("builtins exec", _text(f"import {CANARY}; {CANARY}.sing()")),
        ("builtins eval", _text(f"__import__({CANARY!r}).sing()")),
        ("torch load", _text("x")),
        (rng.choice(GLOBALS), _whole(rng.choice(NUMBERS))),
        (rng.choice(GLOBALS), _bytes(b"\x80\x02" + b"".join(op.raw for op in ops[:40]))),
    )
    name, argument = rng.choice(calls)
    module, _, attribute = name.partition(" ")
    by_stack = [_text(module), _text(attribute), Op("STACK_GLOBAL", None, b"\x93")]
    function = rng.choice(([_global(name)], by_stack))
    match rng.randrange(8):
        case 0:  # INST
            mark = Op("MARK", None, b"(")
            return [mark, argument, Op("INST", name, f"i{module}\n{attribute}\n".encode())]
        case 1:  # OBJ
            return [Op("MARK", None, b"("), *function, argument, Op("OBJ", None, b"o")]
        case 2:  # NEWOBJ
            return [*function, argument, tuple_, Op("NEWOBJ", None, b"\x81")]
        case 3:  # one object many times
            return [
                Op("EMPTY_LIST", None, b"]"), Op("LONG_BINPUT", 9, b"r\x09\x01\x00\x00"),
                *[Op("LONG_BINGET", 9, b"j\x09\x01\x00\x00"), Op("APPEND", None, b"a")]
                * rng.choice((1, 10, 500)),
            ]  # fmt: skip
        case 4:  # deep nesting
            return [Op("TUPLE1", None, b"\x85")] * rng.choice((10, 1000, 20000))
        case _:
            return [*function, argument, tuple_, reduce_]


def _global(name: str) -> Op:
    module, _, attribute = name.partition(" ")
    return Op("GLOBAL", name, f"c{module}\n{attribute}\n".encode())


def _text(text: str) -> Op:
    raw = text.encode(errors="surrogatepass")
    return Op("BINUNICODE", text, b"X" + struct.pack("<I", len(raw)) + raw)


def _bytes(data: bytes) -> Op:
    return Op("BINBYTES", data, b"B" + struct.pack("<I", len(data)) + data)


def _real(value: float) -> Op:
    return Op("BINFLOAT", value, b"G" + struct.pack(">d", value))


def _whole(value: int) -> Op:
    raw = pickle.encode_long(value)
    return Op("LONG1", value, b"\x8a" + bytes([len(raw)]) + raw)


_SIMPLE = tuple(
    Op(op.name, None, op.code.encode("latin-1")) for op in pickletools.opcodes if op.arg is None
)


# --- valid ones to begin with ----------------------------------------------------------------


class _Persistent:
    """Pickles as the published programs' persistent objects do."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta

    def __reduce__(self) -> tuple[Any, ...]:
        module = sys.modules["torch_utils.persistence"]
        return module._reconstruct_persistent_obj, (self.meta,)


@contextmanager
def _published_module() -> Iterator[None]:
    """Have a module of that name, which `pickle` looks for while it writes."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
        raise AssertionError

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    names = {package.__name__: package, module.__name__: module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def network_pickle(net: nn.Module, config: Mapping[str, Any]) -> bytes:
    """Return a snapshot in the form of the published ones."""

    def persistent(module: nn.Module, settings: Mapping[str, Any]) -> Any:
        state = {
            "_init_args": (), "_init_kwargs": dict(settings), "training": False,
            "_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
            "_non_persistent_buffers_set": set(), "_modules": members(module),
        }  # fmt: skip
        if isinstance(module, nn.ModuleDict):
            container = nn.ModuleDict()
            container._modules = members(module)
            return container
        return _Persistent(
            {
                "type": "class", "version": 6, "module_src": "# none",
                "class_name": type(module).__name__, "state": state,
            }
        )  # fmt: skip

    def members(module: nn.Module) -> dict[str, Any]:
        return {name: persistent(child, {}) for name, child in module._modules.items() if child}

    with _published_module(), torch.no_grad():
        net = net.half()
        content = {"ema": persistent(net, config), "encoder": None, "loss_fn": None}
        return pickle.dumps(content, protocol=4)
