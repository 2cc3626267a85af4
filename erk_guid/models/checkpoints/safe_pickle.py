"""Reading a pickle without running anything in it.

Python's unpickler is an interpreter: a pickle tells it which functions to import and call. Here
a pickle is only *data*. `pickletools` (which parses, and runs nothing) splits the file into
instructions. The small machine below follows those that published snapshots use. A global is a
name, never an imported object. The handlers at the end of this module say what may be done with a
name; each of them builds a plain value or an inert record. Any other name or instruction stops
the reading with an error that names it.

A size that the file gives is trusted only if the file has that many bytes. Nothing is allocated
because of a number alone. Long byte strings, which hold the weights, are not read with the
instructions: a storage is filled from the file later, so that weights are in memory once.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import CheckpointError

MAX_INSTRUCTIONS = 2_000_000
"""The largest published network takes under 200,000."""


MAX_SETTINGS = 10_000
"""Values in a network's constructor arguments; published ones have a few dozen."""


MAX_NUMBER = 1 << 128
"""Whole numbers in a snapshot are addresses, sizes and a magic number of 80 bits. Longer ones
cost time whenever they are hashed or printed."""

MAX_KEY = 1 << 60
"""Bound on whole numbers as dict keys. Below Python's hash modulus no two of them collide."""


MAX_KEY_LENGTH = 4096
"""Bound on text as dict keys: two equal ones are compared whenever one is used."""


class UnsafePickleError(CheckpointError):
    """A file that asks for something that a snapshot does not need."""


LONG = 1 << 16
"""Byte strings of this length and more stay in the file."""


class _Source(Protocol):
    def read(self, n: int = ..., /) -> Any: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class _Span:
    """Bytes that stay in the file until they are wanted."""

    file: BinaryIO
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> bytes:
        begin, end, _ = part.indices(self.length)
        with self._at(begin) as file:
            return file.read(end - begin)

    def fill(self, tensor: Tensor, begin: int) -> None:
        """Overwrite a tensor with the bytes from `begin` on; there must be as many."""
        into = tensor.view(torch.uint8).numpy().data
        with self._at(begin) as file:
            if file.readinto(into) != len(into):  # type: ignore[attr-defined]
                raise CheckpointError("the file became shorter while it was read")

    @contextlib.contextmanager
    def _at(self, place: int) -> Iterator[BinaryIO]:
        """Read elsewhere in the file, and come back to where its instructions are read."""
        here = self.file.tell()
        self.file.seek(self.start + place)
        yield self.file
        self.file.seek(here)


class _File:
    """A pickle's file. Long byte strings come as a `_Span`, what the file does not have as b""."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._opcode = b""
        self.readline, self.tell = file.readline, file.tell

    def read(self, n: int = -1, /) -> Any:
        if n < LONG:
            found = self._file.read(n)
            self._opcode = found if n == 1 else self._opcode
            return found
        start = self._file.tell()
        if start + n > self._size:
            return b""  # no memory for a length that is only claimed
        if self._opcode not in (pickle.BINBYTES, pickle.BINBYTES8):
            return self._file.read(n)
        self._file.seek(n, os.SEEK_CUR)
        return _Span(self._file, start, n)


@dataclass(frozen=True)
class Global:
    """A name in the pickle. It is immutable, not callable and never imported."""

    name: str


@dataclass
class Record:
    """An object whose class is not interpreted: its constructor's name and its state."""

    kind: str
    state: Any = None
    args: tuple[Any, ...] = ()


@dataclass
class Persistent:
    """A 'persistent object' of the published programs (torch_utils.persistence)."""

    class_name: str
    state: dict[str, Any]


@dataclass
class _Storage:
    """The elements behind one or more tensors."""

    elements: Tensor


@dataclass
class _Array:
    """A NumPy array; BUILD fills in `value`."""

    value: np.ndarray | None = None


@dataclass
class _Dtype:
    """A NumPy dtype; BUILD fills in its byte order."""

    dtype: np.dtype[Any]
    built: bool = False


_STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
}
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)
"""Memory that a forked process does not share; Windows forks none."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MODULES = frozenset(f"torch.nn.modules.container.{n}" for n in ("ModuleDict", "ModuleList"))


@dataclass
class _Machine:
    """A machine that runs the pickles of one file of `size` bytes.

    Nested archives share the counters.
    """

    size: int
    instructions: int = 0
    copied: int = 0

    def charge(self, count: int) -> None:
        """Record `count` bytes made into a tensor or an array; refuse more than the file has.

        The file's size bounds the sum of all calls: a pickle may name the same bytes many times.
        """
        self.copied += count
        if self.copied > self.size:
            raise UnsafePickleError(f"its tensors use the file's {self.size} bytes more than once")

    def run(self, source: _Source, nested: bool = False) -> Any:
        """Follow one pickle to its STOP and return what it built.

        A `nested` pickle calls nothing. It may name storages and use persistent ids.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        mark = object()

        def to_mark() -> list[Any]:
            for i in range(len(stack) - 1, -1, -1):
                if stack[i] is mark:
                    items = stack[i + 1 :]
                    del stack[i:]
                    return items
            raise CheckpointError("damaged pickle: no mark on the stack")

        def pop() -> Any:
            if not stack or stack[-1] is mark:
                raise CheckpointError("damaged pickle: the stack is empty")
            return stack.pop()

        def top(kind: type, action: str) -> Any:
            if not stack or not isinstance(stack[-1], kind):
                name = type(stack[-1]).__name__ if stack else "nothing"
                raise UnsafePickleError(f"the pickle wants to {action} {name}")
            return stack[-1]

        def set_items(pairs: list[Any]) -> None:
            target = top(dict, "set items of")
            if len(pairs) % 2:
                raise CheckpointError("damaged pickle: a key without a value")
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                _check_key(key)
                target[key] = value

        for opcode, arg, _ in pickletools.genops(source):  # type: ignore[arg-type]
            self.instructions += 1
            if self.instructions > MAX_INSTRUCTIONS:
                raise UnsafePickleError(f"more than {MAX_INSTRUCTIONS:,} instructions")
            number = arg if isinstance(arg, int) else -1
            if abs(number) >= MAX_NUMBER:
                raise UnsafePickleError(f"a whole number of {number.bit_length()} bits")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return pop()
                case "MARK":
                    stack.append(mark)
                case "POP":
                    pop()
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case (
                    "INT" | "LONG" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4"
                    | "FLOAT" | "BINFLOAT" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                    | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(arg)
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(set())
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "TUPLE":
                    stack.append(tuple(to_mark()))
                case "LIST":
                    stack.append(to_mark())
                case "DICT":
                    pairs = to_mark()
                    stack.append({})
                    set_items(pairs)
                case "APPEND":
                    item = pop()
                    top(list, "append to").append(item)
                case "APPENDS":
                    items = to_mark()
                    top(list, "append to").extend(items)
                case "SETITEM":
                    value, key = pop(), pop()
                    set_items([key, value])
                case "SETITEMS":
                    set_items(to_mark())
                case "ADDITEMS":
                    items = to_mark()
                    for item in items:
                        _check_key(item)
                    top(set, "add to").update(items)
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1] if stack else None
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    _check_key(number)
                    memo[number] = stack[-1] if stack else None
                case "GET" | "BINGET" | "LONG_BINGET":
                    if number not in memo:
                        raise CheckpointError("damaged pickle: it recalls what it never stored")
                    stack.append(memo[number])
                case "GLOBAL":
                    module, _, name = str(arg).partition(" ")
                    stack.append(_allowed(module, name, nested))
                case "STACK_GLOBAL":
                    name, module = pop(), pop()
                    stack.append(_allowed(module, name, nested))
                case "REDUCE" | "NEWOBJ" if not nested:
                    args, function = pop(), pop()
                    if not isinstance(function, Global) or not isinstance(args, tuple):
                        raise UnsafePickleError("the pickle wants to call something it made itself")
                    stack.append(_HANDLERS[function.name](self, function.name, args))
                case "BUILD":
                    state = pop()
                    _build(self, stack[-1] if stack else None, state)
                case "BINPERSID" if nested:
                    stack.append(("persistent", pop()))
                case other:
                    raise UnsafePickleError(f"the pickle uses the instruction {other}")
        raise CheckpointError("damaged pickle: it does not end")


def read_pickle(source: Path | bytes) -> Any:
    """Turn a pickle into plain values, tensors, NumPy arrays and inert records.

    Raises:
        UnsafePickleError: it asks for a name or an action that is not on the list.
        CheckpointError: it is no pickle, or damaged.
    """
    try:
        if isinstance(source, bytes):
            return _Machine(len(source)).run(io.BytesIO(source))
        if source.stat().st_size == 0:
            raise CheckpointError("the file is empty")
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Machine(size).run(_File(file, size))
    except CheckpointError:
        raise
    except (ValueError, IndexError, TypeError, ArithmeticError, EOFError, RuntimeError) as error:
        # pickletools, NumPy and torch raise these for bytes that they cannot read.
        raise CheckpointError(f"damaged, or not a pickle ({_short(error)})") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _check_key(key: Any) -> None:
    """Refuse a key of a dict or set unless it hashes quickly and without collisions."""
    if not isinstance(key, (str, int, bytes, type(None))):
        raise UnsafePickleError(f"a dict key of type {type(key).__name__}")
    if isinstance(key, (str, bytes)) and len(key) > MAX_KEY_LENGTH:
        raise UnsafePickleError(f"a dict key of {len(key)} characters")
    if isinstance(key, int) and abs(key) >= MAX_KEY:
        raise UnsafePickleError(f"a dict key of {key.bit_length()} bits")


def _allowed(module: Any, name: Any, nested: bool) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnsafePickleError("a global whose name is not text")
    # NumPy renamed its core package; old and new files mean the same.
    full = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
    if full not in (_STORAGES if nested else _HANDLERS):
        raise UnsafePickleError(f"it asks for {full[:120]!r}, which a snapshot does not need")
    return Global(full)


def _build(machine: _Machine, target: Any, state: Any) -> None:
    """Run the instruction BUILD; refuse to set the state of anything but our own records."""
    if isinstance(target, Record) and target.state is None:
        target.state = state
    elif isinstance(target, _Array) and target.value is None and isinstance(state, tuple):
        target.value = _array_from(machine, state)
    elif isinstance(target, _Dtype) and not target.built and isinstance(state, tuple):
        target.dtype, target.built = _in_order(target.dtype, state), True
    else:
        raise UnsafePickleError(f"the pickle wants to alter the state of {type(target).__name__}")


# --- handlers: what may be done with a name -------------------------------------------------


def _refuse(machine: _Machine, name: str, args: tuple[Any, ...]) -> Any:
    raise UnsafePickleError(f"the pickle wants to call {name}")


def _persistent(machine: _Machine, name: str, args: tuple[Any, ...]) -> Persistent:
    meta = args[0] if len(args) == 1 else None
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise CheckpointError("a persistent object without a description of its class")
    class_name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(class_name, str) or not isinstance(state, dict):
        raise CheckpointError("a persistent object without a class name or a state")
    return Persistent(class_name, state)


def _empty_dict(machine: _Machine, name: str, args: tuple[Any, ...]) -> dict[Any, Any]:
    if args:
        raise UnsafePickleError(f"{name} called with arguments")
    return {}


def _record(machine: _Machine, name: str, args: tuple[Any, ...]) -> Record:
    return Record(name.rpartition(".")[2], args=args)


def _tensor(machine: _Machine, name: str, args: tuple[Any, ...]) -> Tensor:
    if not 4 <= len(args) <= 7:
        raise CheckpointError("a tensor described by the wrong number of values")
    storage, offset, size, stride = args[:4]
    if not isinstance(storage, _Storage):
        raise CheckpointError("a tensor without a storage")
    for numbers in (size, stride, (offset,)):
        if not isinstance(numbers, tuple) or not all(_is_size(n) for n in numbers):
            raise CheckpointError("a tensor whose shape, strides or offset are not valid")
    if len(size) != len(stride) or len(size) > 32:
        raise CheckpointError("a tensor whose shape and strides do not match")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else -1
    have = storage.elements.numel()
    # The first condition stops stride-0 tensors that are larger than what is stored.
    if count > have or last >= have:
        raise CheckpointError(
            f"a tensor of shape {list(size)[:8]} needs more than the {have} elements stored for it"
        )
    if not count:
        return storage.elements.new_empty(size)
    return storage.elements.as_strided(size, stride, offset)


def _parameter(machine: _Machine, name: str, args: tuple[Any, ...]) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        raise CheckpointError("a parameter that is not a tensor")
    return args[0]


def _storage(machine: _Machine, name: str, args: tuple[Any, ...]) -> _Storage:
    """Read a legacy torch archive that holds one storage (torch.storage._load_from_bytes)."""
    if len(args) != 1 or not isinstance(args[0], (bytes, _Span)):
        raise CheckpointError("a storage that is not made of bytes")
    archive = args[0]
    machine.charge(len(archive))
    stream = io.BytesIO(archive[:LONG])  # what is in front of the elements is short
    magic = machine.run(stream, nested=True)
    if magic != _LEGACY_MAGIC:
        raise CheckpointError("a nested archive that is not in torch's legacy format")
    machine.run(stream, nested=True)  # protocol version
    system = machine.run(stream, nested=True)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("a nested archive that was not written on a little-endian machine")
    what = machine.run(stream, nested=True)
    machine.run(stream, nested=True)  # keys: one, the storage's own
    match what:
        case ("persistent", ("storage", Global(kind), str(), str(), int(count), None)):
            dtype = _STORAGES.get(kind)
        case _:
            dtype = None
    if dtype is None:
        raise CheckpointError("a nested archive that holds something else than one storage")
    begin = stream.tell() + 8
    carried = len(archive) - begin
    if carried < 0 or int.from_bytes(stream.read(8), "little") != count:
        raise CheckpointError("a storage whose length is given in two ways")
    if carried != count * dtype.itemsize:
        raise CheckpointError(
            f"a storage that declares {count} elements but carries {carried} bytes"
        )
    if isinstance(archive, _Span):
        # Pages of its own, so that all the memory goes back when the weights are replaced.
        elements = torch.frombuffer(mmap.mmap(-1, carried, **_PRIVATE), dtype=dtype)
        archive.fill(elements, begin)
        return _Storage(elements)
    elements = torch.empty(count, dtype=dtype)
    if count:
        # A bytearray, since tensors over read-only bytes must not be written to.
        elements.copy_(torch.frombuffer(bytearray(archive[begin:]), dtype=dtype))
    return _Storage(elements)


def _new_dtype(machine: _Machine, name: str, args: tuple[Any, ...]) -> _Dtype:
    if not args or not isinstance(args[0], str):
        raise CheckpointError("a NumPy dtype without a name")
    # NumPy's own parser of such names accepts far more than numbers.
    if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", args[0]):
        raise UnsafePickleError(f"a NumPy array of {args[0][:20]!r}, which is not a number")
    return _Dtype(np.dtype(args[0]))


def _in_order(dtype: np.dtype[Any], state: tuple[Any, ...]) -> np.dtype[Any]:
    order = state[1] if len(state) > 1 else None
    if order not in ("<", ">", "|", "="):
        raise CheckpointError("a NumPy dtype without a byte order")
    return dtype if order == "|" else dtype.newbyteorder(order)


def _new_array(machine: _Machine, name: str, args: tuple[Any, ...]) -> _Array:
    if not args or args[0] != Global("numpy.ndarray"):
        raise UnsafePickleError("a NumPy reconstruction of something else than an array")
    return _Array()


def _array_from(machine: _Machine, state: tuple[Any, ...]) -> np.ndarray:
    if len(state) != 5 or not isinstance(state[2], _Dtype):
        raise CheckpointError("a NumPy array without its five-part state")
    _, shape, record, fortran, data = state
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(_is_size(n) for n in shape):
        raise CheckpointError("a NumPy array whose shape is not valid")
    count = math.prod(shape)
    if not isinstance(data, (bytes, _Span)) or len(data) != count * record.dtype.itemsize:
        raise CheckpointError(
            f"a NumPy array of shape {list(shape)[:8]} with other bytes than that"
        )
    machine.charge(len(data))
    flat = np.frombuffer(data[:], record.dtype) if count else np.empty(0, record.dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def _scalar(machine: _Machine, name: str, args: tuple[Any, ...]) -> Any:
    if len(args) != 2 or not isinstance(args[0], _Dtype) or not isinstance(args[1], bytes):
        raise CheckpointError("a NumPy scalar without its dtype and bytes")
    if len(args[1]) != args[0].dtype.itemsize:
        raise CheckpointError("a NumPy scalar of the wrong length")
    return np.frombuffer(args[1], args[0].dtype)[0].item()


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


_Handler = Callable[[_Machine, str, tuple[Any, ...]], Any]

_HANDLERS: dict[str, _Handler] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _empty_dict,
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.dtype": _new_dtype,
    "numpy.ndarray": _refuse,  # named as an argument only
    **dict.fromkeys(_MODULES, _record),
    **dict.fromkeys(_STORAGES, _refuse),  # named inside nested archives only
}


def plain(value: Any) -> Any:
    """Convert what `read_pickle` built to JSON's types (tuples and arrays become lists).

    Raises:
        CheckpointError: it contains something else, nests too deeply, or is too large.
    """
    left = MAX_SETTINGS  # counts visits: a few shared lists can stand for billions

    def convert(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > 16 or left < 0:
            raise CheckpointError("its settings are nested too deeply, or too many")
        array = array_of(value)
        if array is not None:
            # With an axis of length 0, `tolist` still lists the other axes.
            if math.prod(max(n, 1) for n in array.shape) > left:
                raise CheckpointError(f"an array of shape {list(array.shape)[:8]} as a setting")
            value = array.tolist()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [convert(v, depth + 1) for v in value]
        if isinstance(value, dict):
            if not all(isinstance(k, str) for k in value):
                raise CheckpointError("a setting whose name is not text")
            return {k: convert(v, depth + 1) for k, v in value.items()}
        raise CheckpointError(f"its settings contain a {type(value).__name__}")

    return convert(value, 0)


def array_of(value: Any) -> np.ndarray | None:
    """Return the NumPy array in a value that `read_pickle` built, or None."""
    return value.value if isinstance(value, _Array) else None
