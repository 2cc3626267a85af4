"""Crafted files: each gives one line of error, allocates little, and runs nothing.

The canary is a file that the payloads would make. `test_the_canary_is_alive` shows that Python's
own unpickler makes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from safetensors.torch import save_file

import erk_guid
from erk_guid.common.errors import CheckpointError
from erk_guid.models.checkpoints import save_network
from erk_guid.models.checkpoints.safe_pickle import Persistent, read_pickle


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def data(value: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    return name(module, attribute) + tuple_of(*args) + b"R"


def file_of(body: bytes) -> bytes:
    """PROTO 4, the body, STOP."""
    return b"\x80\x04" + body + b"."


def network(class_name: str = "Precond", state: bytes | None = None, **settings: bytes) -> bytes:
    """A persistent object."""
    if state is None:
        state = dict_of(
            _init_args=tuple_of(), _init_kwargs=dict_of(**settings), _parameters=b"}",
            _buffers=b"}", _modules=b"}",
        )  # fmt: skip
    meta = dict_of(
        type=text("class"), version=b"K\x06", module_src=text("# no source"),
        class_name=text(class_name), state=state,
    )  # fmt: skip
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def snapshot(ema: bytes) -> bytes:
    return file_of(dict_of(ema=ema))


SIZES = {
    "img_resolution": number(16), "img_channels": number(3), "label_dim": number(0),
    "model_channels": number(8), "channel_mult": b"](K\x01K\x02e", "num_blocks": number(1),
    "channels_per_head": number(8),
}  # fmt: skip


KEYS = b"]" + text("0") + b"a"
"""Of the storages in an archive: a list of one."""


def archive(kind: bytes, declared: int, content: bytes, stated: int | None = None) -> bytes:
    """A legacy torch archive of one storage."""
    what = tuple_of(text("storage"), kind, text("0"), text("cpu"), number(declared), b"N") + b"Q"
    system = dict_of(little_endian=b"\x88")
    stream = b"".join(
        b"\x80\x02" + body + b"."
        for body in (number(0x1950A86A20F9469CFC6C), number(1001), system, what, KEYS)
    )
    return stream + struct.pack("<q", declared if stated is None else stated) + content


def tensor(
    storage: bytes,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
) -> bytes:
    return call(
        "torch._utils", "_rebuild_tensor_v2",
        call("torch.storage", "_load_from_bytes", data(storage)),
        number(offset), tuple_of(*map(number, size)), tuple_of(*map(number, stride)), b"\x89",
        call("collections", "OrderedDict"),
    )  # fmt: skip


HALF = name("torch", "HalfStorage")
SMALL = archive(HALF, 4, b"\0" * 8)


def with_parameter(value: bytes) -> bytes:
    """A snapshot whose network has one parameter."""
    state = dict_of(
        _init_args=tuple_of(), _init_kwargs=dict_of(**SIZES), _parameters=dict_of(w=value),
        _buffers=b"}", _modules=b"}",
    )  # fmt: skip
    return snapshot(network(state=state))


def shell(canary: Path) -> bytes:
    """os.system("touch canary") as a pickled call."""
    return call("os", "system", text(f"touch {canary}"))


def real() -> bytes:
    return (DATA / "edm2_cond.pkl").read_bytes()


def real_with_nan() -> bytes:
    """The published file with a NaN in its first storage, a single float16."""
    raw = bytearray(real())
    length = struct.pack("<q", 1)
    begin = raw.index(length, raw.index(b"HalfStorage")) + len(length)
    raw[begin : begin + 2] = np.float16("nan").tobytes()
    return bytes(raw)


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive_file:
        archive_file.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return buffer.getvalue()


def shared_settings() -> bytes:
    """Twelve lists, each holding the one before ten times: 10^12 values if unfolded."""
    body = b"]q\x00"
    for k in range(12):
        # Pop the older list, build the newer from references to it, remember that one.
        body += b"0](" + (b"h" + bytes([k])) * 10 + b"eq" + bytes([k + 1])
    return body


def module_in_itself() -> bytes:
    """A module whose _modules names the module again, twice."""
    container = name("torch.nn.modules.container", "ModuleDict") + b")\x81q\x05"
    members = dict_of(a=b"h\x05", b=b"h\x05")
    state = dict_of(_parameters=b"}", _buffers=b"}", _modules=members)
    looped = container + state + b"b"
    outer = dict_of(
        _init_args=tuple_of(), _init_kwargs=dict_of(**SIZES), _parameters=b"}", _buffers=b"}",
        _modules=dict_of(enc=looped),
    )  # fmt: skip
    return snapshot(network(state=outer))


def modules_shared() -> bytes:
    """Forty modules, each holding the one before twice: 2^40 of them if unfolded."""
    container = name("torch.nn.modules.container", "ModuleDict")
    body = container + b")\x81" + dict_of(_modules=b"}") + b"bq\x00"
    for k in range(40):
        here = b"h" + bytes([k])
        members = dict_of(_modules=dict_of(a=here, b=here))
        body += b"0" + container + b")\x81" + members + b"bq" + bytes([k + 1])
    outer = dict_of(
        _init_args=tuple_of(), _init_kwargs=dict_of(**SIZES), _modules=dict_of(enc=body)
    )
    return snapshot(network(state=outer))


def pairs(*items: bytes) -> bytes:
    """A dict of any keys."""
    return b"}(" + b"".join(items) + b"u"


LONG = b"\x8b" + struct.pack("<i", 5001) + (1 << 40_000).to_bytes(5001, "little")


LEVELS = b"](" + b"K\x01" * 32 + b"e"


def storages_copied() -> bytes:
    """One archive of 2 MB, made into a storage ten thousand times."""
    one = archive(HALF, 1_000_000, b"\0" * 2_000_000)
    function = name("torch.storage", "_load_from_bytes")
    return file_of(
        data(one) + b"\x85q\x000" + function + b"q\x010(" + b"h\x01h\x00R" * 10_000 + b"t"
    )


def archives_nested() -> bytes:
    """Twenty megabytes at the bottom of two hundred archives."""
    body = data(b"\0" * 20_000_000) + b"0N"
    for _ in range(200):
        body = call("torch.storage", "_load_from_bytes", data(file_of(body)))
    return file_of(body)


def ndarray(dtype: str, shape: tuple[int, ...], content: bytes) -> bytes:
    made = call(
        "numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), tuple_of(number(0)),
        data(b"b"),
    )  # fmt: skip
    kind = call("numpy", "dtype", text(dtype), b"\x89", b"\x88")
    state = tuple_of(number(1), tuple_of(*map(number, shape)), kind, b"\x89", data(content))
    return made + state + b"b"


# Each entry makes a file's content from the canary's path; `expected` is in its error.
FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system through reduce": (lambda c: file_of(shell(c)), "'os.system'"),
    "os.system inside the dict": (lambda c: snapshot(shell(c)), "'os.system'"),
    "eval from builtins": (
        lambda c: file_of(call("builtins", "eval", text(f"open({str(c)!r}, 'w')"))),
        "'builtins.eval'",
    ),
    "a dotted name": (
        lambda c: file_of(
            text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93"
        ),
        "OrderedDict.__init__.__globals__",
    ),
    "an extension code": (lambda c: file_of(b"\x82\x01"), "EXT1"),
    "INST": (lambda c: file_of(b"(" + text(f"touch {c}") + b"ios\nsystem\n"), "INST"),
    "OBJ": (lambda c: file_of(b"(" + name("os", "system") + text("true") + b"o"), "os.system"),
    "calling what a call made": (
        lambda c: file_of(call("collections", "OrderedDict") + tuple_of() + b"R"),
        "call something it made",
    ),
    "BUILD on a function": (
        lambda c: file_of(name("torch._utils", "_rebuild_tensor_v2") + dict_of(a=b"N") + b"b"),
        "alter the state of Global",
    ),
    "BUILD on a class": (
        lambda c: file_of(name("collections", "OrderedDict") + dict_of(pop=b"N") + b"b"),
        "alter the state of Global",
    ),
    "BUILD on a tensor": (
        lambda c: with_parameter(tensor(SMALL, (4,), (1,)) + dict_of(data=b"N") + b"b"),
        "alter the state of Tensor",
    ),
    "a nested archive with a payload": (
        lambda c: with_parameter(
            call("torch.storage", "_load_from_bytes", data(file_of(shell(c))))
        ),
        "'os.system'",
    ),
    "a nested archive with a payload as its keys": (
        lambda c: with_parameter(
            call(
                "torch.storage", "_load_from_bytes",
                data(SMALL.replace(KEYS + b".", shell(c) + b".")),
            )
        ),
        "'os.system'",
    ),
    "a nested zip archive": (
        lambda c: with_parameter(call("torch.storage", "_load_from_bytes", data(zip_bomb()))),
        "damaged",
    ),
    "2^33 elements declared": (
        lambda c: with_parameter(tensor(archive(HALF, 2**33, b"\0" * 8), (4,), (1,))),
        "declares 8589934592 elements but carries 8 bytes",
    ),
    "two lengths": (
        lambda c: with_parameter(tensor(archive(HALF, 4, b"\0" * 8, stated=2**40), (4,), (1,))),
        "length is given in two ways",
    ),
    "2^40 elements by stride 0": (
        lambda c: with_parameter(tensor(SMALL, (2**20, 2**20), (0, 0))),
        "needs more than the 4 elements",
    ),
    "strides beyond the storage": (
        lambda c: with_parameter(tensor(SMALL, (2, 2), (100, 1))), "needs more than the 4 elements"
    ),
    "an offset beyond the storage": (
        lambda c: with_parameter(tensor(SMALL, (4,), (1,), offset=3)),
        "needs more than the 4 elements",
    ),
    "a negative stride": (
        lambda c: with_parameter(tensor(SMALL, (4,), (-1,))), "shape, strides or offset"
    ),
    "a huge size without elements": (
        lambda c: with_parameter(tensor(SMALL, (0, 2**70), (1, 1))), "shape, strides or offset"
    ),
    "three million nested tuples": (
        lambda c: file_of(b"N" + b"\x85" * 3_000_000), "more than 2,000,000 instructions"
    ),
    "a million nested tuples as the settings": (
        lambda c: snapshot(
            network(
                state=dict_of(_init_args=b"N" + b"\x85" * 1_000_000, _init_kwargs=b"}"),
            )
        ),
        "nested too deeply",
    ),
    "settings that unfold to 10^12 values": (
        lambda c: snapshot(network(img_resolution=shared_settings())),
        "nested too deeply, or too many",
    ),
    "a tuple as a dict key": (
        lambda c: file_of(b"}" + b"N" + b"\x85" * 100_000 + b"Ns"), "a dict key of type tuple"
    ),
    "a module that contains itself": (lambda c: module_in_itself(), "contain each other"),
    "modules that unfold to 2^40": (lambda c: modules_shared(), "more than 50000 modules"),
    "a storage named ten thousand times": (lambda c: storages_copied(), "more than once"),
    "archives inside archives": (lambda c: archives_nested(), "_load_from_bytes"),
    "an empty array of 2^40 rows": (
        lambda c: snapshot(network(img_resolution=ndarray("f8", (2**40, 0), b""))),
        "an array of shape",
    ),
    "a parameter with a long name": (
        lambda c: snapshot(
            network(state=dict_of(_init_kwargs=b"}", _parameters=pairs(text("x" * 10**6), b"N")))
        ),
        "a dict key of 1000000 characters",
    ),
    "a number of 40,000 bits": (
        lambda c: snapshot(network(img_resolution=LONG)), "a whole number of 40001 bits"
    ),
    "keys that collide": (
        lambda c: file_of(
            pairs(*(b for k in range(1, 50_000) for b in (number(k * (2**61 - 1)), b"N")))
        ),
        "a dict key of ",
    ),
    "a set of keys that collide": (
        lambda c: file_of(b"\x8f(" + number(2**61 - 1) + b"\x90"), "a dict key of 61 bits"
    ),
    "memo places that collide": (
        lambda c: file_of(b"Np%d\n" % (2**61 - 1)), "a dict key of 61 bits"
    ),
    "non-persistent buffers that are a number": (
        lambda c: snapshot(
            network(
                state=dict_of(
                    _init_kwargs=b"}", _buffers=dict_of(a=text("x")),
                    _non_persistent_buffers_set=b"K\x01",
                )
            )
        ),
        "is no set",
    ),
    "a dtype that is an expression": (
        lambda c: file_of(call("numpy", "dtype", text("(,,)f4"), b"\x89", b"\x88")),
        "not a number",
    ),
    "text times a number as the width": (
        lambda c: snapshot(network(**{**SIZES, "model_channels": text("x" * 500_000)})),
        "setting model_channels is xxx",
    ),
    "a setting of the wrong kind": (
        lambda c: snapshot(network(**SIZES, clip_act=text("x"))), "setting clip_act is x"
    ),
    "many levels of many blocks": (
        lambda c: snapshot(
            network(**{**SIZES, "num_blocks": number(60), "channel_mult": LEVELS})
        ),
        "num_blocks is 60 at 32 levels",
    ),
    "line breaks in a key": (lambda c: file_of(pairs(text("a\nb\x1b[2J"), b"N")), "a?b?[2J"),
    "line breaks in a class name": (lambda c: snapshot(network("Pre\ncond", **SIZES)), "Pre"),
    "a long encoder setting": (
        lambda c: file_of(
            dict_of(
                ema=network(**SIZES),
                encoder=network("StabilityVAEEncoder", final_mean=text("x" * 10**6)),
            )
        ),
        "it lacks",
    ),
    "a memo index of 2^32 - 1": (lambda c: file_of(b"Nr\xff\xff\xff\xff"), "a NoneType"),
    "an unknown memo index": (lambda c: file_of(b"h\x07"), "recalls what it never stored"),
    "2^60 bytes announced": (
        lambda c: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x", "damaged, or not a pickle"
    ),
    "a byte array of 2^60 announced": (
        lambda c: b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x", "damaged, or not a pickle"
    ),
    "a persistent id": (lambda c: file_of(text("x") + b"Q"), "BINPERSID"),
    "an array of objects": (
        lambda c: with_parameter(ndarray("O8", (1,), b"\0" * 8)), "not a number"
    ),
    "an array of a huge shape": (
        lambda c: with_parameter(ndarray("f8", (2**40, 8), b"\0" * 8)), "with other bytes"
    ),
    "an array as a parameter": (
        lambda c: with_parameter(ndarray("f8", (1,), b"\0" * 8)), "w is an array, not a tensor"
    ),
    "a string as a parameter": (lambda c: with_parameter(text("x")), "w is str, not a tensor"),
    "parameters that are a list": (
        lambda c: snapshot(network(state=dict_of(_parameters=b"]", _init_kwargs=b"}"))),
        "_parameters is a list",
    ),
    "an unknown class": (lambda c: snapshot(network("Evil", **SIZES)), "'Evil'"),
    "a class name with a path": (
        lambda c: snapshot(network("os.system", **SIZES)), "'os.system'"
    ),
    "an unknown setting": (
        lambda c: snapshot(network(**SIZES, colour=text("red"))), "no option colour"
    ),
    "a network of 2^60 pixels": (
        lambda c: snapshot(network(**{**SIZES, "img_resolution": number(2**60)})),
        "img_resolution is 1152921504606846976",
    ),
    "a billion blocks": (
        lambda c: snapshot(network(**{**SIZES, "num_blocks": number(60000)})),
        "num_blocks is 60000 at 2 levels, but the file has 0 tensors",
    ),
    "a wide network without weights": (
        lambda c: snapshot(network(**{**SIZES, "model_channels": number(65536)})), "it lacks "
    ),
    "no weights at all": (lambda c: snapshot(network(**SIZES)), "it lacks "),
    "no network": (lambda c: file_of(dict_of(G_ema=b"N")), "a dict with G_ema, and no network"),
    "a list": (lambda c: file_of(b"]"), "a list, and no network"),
    "NaN weights": (lambda c: real_with_nan(), "not finite"),
    "truncated": (lambda c: real()[: len(real()) // 2], "damaged, or not a pickle"),
    "cut by one byte": (lambda c: real()[:-1], "damaged, or not a pickle"),
    "empty": (lambda c: b"", "empty"),
    "noise": (lambda c: np.random.default_rng(0).bytes(5000), "damaged, or not a pickle"),
    "a web page": (lambda c: b"<!DOCTYPE html><html>Not found</html>", "web page"),
    "a web page after white space": (lambda c: b"\n  <html></html>", "web page"),
    "a zip bomb": (lambda c: zip_bomb(), "zip archive"),
    "text": (lambda c: b"version https://git-lfs.github.com/spec/v1\n", "damaged, or not a pickle"),
}  # fmt: skip


@contextlib.contextmanager
def little_memory(more: int = 2**30) -> Iterator[None]:
    """No more address space than there is now and a gigabyte: a larger allocation fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


LENGTHY = {  # megabytes of instructions
    "three million nested tuples", "a million nested tuples as the settings",
    "archives inside archives",
}  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [pytest.param(one, marks=pytest.mark.slow if one in LENGTHY else ()) for one in FILES],
)
def test_hostile_pickles(what: str, tmp_path: Path) -> None:
    make, expected = FILES[what]
    canary, path = tmp_path / "canary", tmp_path / "hostile.pkl"
    path.write_bytes(make(canary))
    with little_memory(), pytest.raises(CheckpointError) as caught:
        erk_guid.load(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert not canary.exists()
    assert not hasattr(torch._utils._rebuild_tensor_v2, "a")  # BUILD would have set it


def test_the_canary_is_alive(tmp_path: Path) -> None:
    # The same bytes through Python's own unpickler: the payload runs.
    canary = tmp_path / "canary"
    pickle.loads(file_of(shell(canary)))
    assert canary.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_the_crafted_parts_are_well_formed() -> None:
    # Otherwise the files above might be refused for a slip of this test's own making.
    state = read_pickle(with_parameter(tensor(SMALL, (2, 2), (2, 1))))["ema"]
    assert isinstance(state, Persistent)
    w = state.state["_parameters"]["w"]
    assert torch.equal(w, torch.zeros(2, 2, dtype=torch.float16))
    crafted = file_of(ndarray("f8", (2,), struct.pack("<2d", 1, 2)))
    assert read_pickle(crafted).value.tolist() == [1.0, 2.0]
    # Python's and torch's own readers say the same of them.
    assert pickle.loads(crafted).tolist() == [1.0, 2.0]
    storage = torch.load(io.BytesIO(archive(HALF, 4, b"\0" * 8)), weights_only=True)
    assert storage.untyped().tolist() == [0] * 8
    whole = pickle.loads(file_of(tensor(SMALL, (2, 2), (2, 1))))
    assert torch.equal(whole, w)


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_a_snapshot_cut_anywhere(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.pkl"
    path.write_bytes(real()[: len(real()) * cut // 100])
    with pytest.raises(CheckpointError):
        erk_guid.load(path)


def test_flipped_bytes_never_escape_the_error_class(tmp_path: Path) -> None:
    # A file with a few damaged bytes may still load; it must not fail in any other way.
    original = real()
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.pkl"
    refused = 0
    for _ in range(40):
        raw = bytearray(original)
        # In the first kilobytes the structure is densest.
        for place in rng.integers(0, 6000, size=3):
            raw[place] = rng.integers(0, 256)
        path.write_bytes(bytes(raw))
        try:
            erk_guid.load(path)
        except CheckpointError:
            refused += 1
    assert refused > 0


def hostile_header(**changes: Any) -> dict[str, str]:
    config = {
        "img_resolution": 16, "img_channels": 3, "label_dim": 0, "model_channels": 8,
        "channel_mult": [1, 2], "num_blocks": 1, "channels_per_head": 8,
    }  # fmt: skip
    network_text = json.dumps({"class": "Precond", "config": {**config, **changes}})
    encoder_text = json.dumps({"class": "StandardRGBEncoder", "config": {}})
    return {"format": "erk_guid/1", "network": network_text, "encoder": encoder_text}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (hostile_header(img_resolution=2**60), "img_resolution is 1152921504606846976"),
        (hostile_header(channel_mult=[1] * 1000), r"setting channel_mult is [1, 1"),
        (hostile_header(model_channels="many"), "setting model_channels is many"),
        (hostile_header(resample_filter=[float("nan")]), "resample_filter is [nan]"),
        (hostile_header(label_dim=-1), "label_dim is -1"),
        ({**hostile_header(), "network": "[" * 100_000}, "does not describe the network"),
        ({**hostile_header(), "encoder": '{"class": "os", "config": {}}'}, "lacks"),
        (hostile_header(), "it lacks "),
    ],
)
def test_hostile_safetensors(header: dict[str, str], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(CheckpointError, match=expected.replace("[", r"\[")):
        erk_guid.load(path)


def test_a_safetensors_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a": 1}')
    with pytest.raises(CheckpointError, match="damaged, or not a safetensors file"):
        erk_guid.load(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I16"])
def test_safetensors_with_weights_of_another_type(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "typed.safetensors"
    net = erk_guid.load("digits", freeze=False).net
    save_network(path, net)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    entry = header["unet.enc.32x32_conv.weight"]
    width = 1 if dtype.startswith("F8") else 2
    entry["dtype"] = dtype
    if width == 1:
        entry["shape"][0] *= 2
    text_header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text_header)) + text_header + raw[8 + size :])
    with pytest.raises(CheckpointError, match="not floating-point weights"):
        erk_guid.load(path)


def test_long_text_as_a_key_is_refused() -> None:
    # Two equal ones are compared byte by byte whenever one is used: hours for a large file.
    short, long = "k" * 4096, "k" * 4097
    assert read_pickle(file_of(b"}" + text(short) + b"K\x01s")) == {short: 1}
    for key in (text(long), data(long.encode())):
        with pytest.raises(CheckpointError, match="a dict key of 4097 characters"):
            read_pickle(file_of(b"}" + key + b"K\x01s"))


def test_a_setting_that_repeats_a_long_text_is_not_written_out() -> None:
    import tracemalloc

    from erk_guid.models.checkpoints.build import _check_settings

    config = {"channel_mult": ["x" * 100_000] * 9000}  # 900 MB as text
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="its setting channel_mult is"):
        _check_settings("Precond", config, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_weights_are_not_shared_with_a_forked_process() -> None:
    net: Any = erk_guid.load(DATA / "edm_ddpmpp.pkl", freeze=False).net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        os._exit(0)
    os.waitpid(pid, 0)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
