"""Building our networks and encoders from what a file says (class, settings, weights)."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from erk_guid.common.errors import CheckpointError, ErkGuidError
from erk_guid.models.encoders import ENCODERS, Encoder
from erk_guid.models.networks.edm import EDMPrecond
from erk_guid.models.networks.edm2 import Precond

NETWORKS: dict[str, type[nn.Module]] = {"Precond": Precond, "EDMPrecond": EDMPrecond}
"""Our own class for each class name in files."""

MAX_SIDE = 1 << 16
"""Bound on every number in a network's settings: resolution, channels, labels."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIDE


def _whole_or_none(value: Any) -> bool:
    return value is None or _whole(value)


def _real(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MAX_SIDE


def _real_or_none(value: Any) -> bool:
    return value is None or _real(value)


def _real_or_infinite(value: Any) -> bool:
    return value == math.inf or _real(value)


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 40


def _flag(value: Any) -> bool:
    return type(value) is bool


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) <= 32 and all(
        kind(v) for v in value
    )  # fmt: skip


SETTINGS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "Precond": {
        **dict.fromkeys(
            ("img_resolution", "img_channels", "label_dim", "logvar_channels", "model_channels",
             "num_blocks", "channels_per_head"),
            _whole,
        ),
        **dict.fromkeys(("channel_mult_noise", "channel_mult_emb"), _whole_or_none),
        **dict.fromkeys(
            ("sigma_data", "label_balance", "concat_balance", "dropout", "res_balance",
             "attn_balance"),
            _real,
        ),
        "clip_act": _real_or_none,
        "use_fp16": _flag,
        "channel_mult": _list_of(_whole),
        "attn_resolutions": _list_of(_whole),
        "resample_filter": _list_of(_real),
    },
    "EDMPrecond": {
        **dict.fromkeys(
            ("img_resolution", "img_channels", "label_dim", "model_channels", "num_blocks",
             "channel_mult_emb", "channel_mult_noise", "augment_dim"),
            _whole,
        ),
        **dict.fromkeys(("sigma_min", "sigma_data", "dropout", "label_dropout"), _real),
        **dict.fromkeys(
            ("model_type", "embedding_type", "encoder_type", "decoder_type"), _word
        ),
        "sigma_max": _real_or_infinite,
        "use_fp16": _flag,
        "channel_mult": _list_of(_whole),
        "attn_resolutions": _list_of(_whole),
        "resample_filter": _list_of(_real),
    },
}  # fmt: skip
"""The constructor arguments a file may give for each class, and which values they may have."""

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_network(class_name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """Build our network of that class for inference, with these weights in their stored dtypes.

    It uses the memory of `state`.

    Raises:
        CheckpointError: an unknown class, settings it does not take, or weights that do not fit
            them or are not finite.
    """
    if class_name not in NETWORKS:
        known = ", ".join(sorted(NETWORKS))
        raise CheckpointError(
            f"its network is a {class_name[:80]!r}, not one of ours ({known}); if you trust its "
            "author, --trust-pickle (trust=True) runs the code inside the file instead"
        )
    _check_settings(class_name, config, len(state))
    try:
        # However large its settings make it, the network takes no memory: that is used only for the
        # weights that the file has.
        with _WithoutValues():
            net = NETWORKS[class_name](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise CheckpointError(f"its settings do not make a {class_name}: {error}") from error
    _check_weights(net.state_dict(), state)
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


_FACTORIES = (torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros)
_SCALED = (Tensor.mul, Tensor.div)


class _WithoutValues(TorchFunctionMode):
    """Inside, networks are made with the shapes of their weights only, which take no memory.

    These are tensors of the meta device. `torch.device("meta")` would do the same, but for draws
    and products its kernels are written in Python: they import torch._dynamo and sympy first, which
    takes longer than all the rest of loading.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return torch.empty(*args, dtype=kwargs.get("dtype"), device="meta")
        if func in _SCALED and args[0].is_meta and not isinstance(args[1], Tensor):
            return args[0]
        return func(*args, **kwargs)


def own_memory(net: nn.Module) -> None:
    """Copy weights that lie in a file's memory to memory aligned to 64 bytes, as torch's own is.

    The CPU's kernels choose their method by alignment, and the methods round differently. Without
    this, the last digits of a network's output would depend on the file it came from.
    """
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    for buffer in net.buffers():
        buffer.data = buffer.data.clone()


def build_encoder(class_name: str, config: Mapping[str, Any]) -> Encoder:
    """Build the encoder of that class.

    Raises:
        CheckpointError: an unknown class, or settings it does not take.
    """
    if class_name not in ENCODERS:
        raise CheckpointError(f"its encoder is a {class_name[:80]!r}, not one of ours")
    cls = ENCODERS[class_name]
    try:
        return cls(**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"its settings do not make a {class_name}: {error}") from error


def bind(cls: type, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return constructor arguments by name."""
    names = [
        p for p in inspect.signature(cls).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    if len(args) > len(names):
        raise CheckpointError(
            f"{cls.__name__} takes {len(names)} settings by place, not {len(args)}"
        )
    return {**{p.name: v for p, v in zip(names, args, strict=False)}, **kwargs}


def _check_settings(class_name: str, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse wrong types and ranges before anything is built: a constructor trusts them."""
    kinds = SETTINGS[class_name]
    for name, value in config.items():
        if name not in kinds:
            raise CheckpointError(f"its network has no option {name[:40]}")
        if not kinds[name](value):
            # Without writing all of it out: one long text may be there many times.
            shown = value if isinstance(value, str) else reprlib.repr(value)
            raise CheckpointError(f"its setting {name} is {shown[:40]}")
    # Every block has weights, so there cannot be more blocks than the file has tensors.
    levels, blocks = len(config.get("channel_mult", [1])), config.get("num_blocks", 1)
    if levels * (2 * blocks + 1) > max(tensors, 64):
        raise CheckpointError(
            f"num_blocks is {blocks} at {levels} levels, but the file has {tensors} tensors"
        )


def _check_weights(wanted: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - have.keys())
    extra = sorted(have.keys() - wanted.keys())
    if missing:
        raise CheckpointError(f"it lacks {_some(missing)}")
    if extra:
        raise CheckpointError(f"it has weights its network has no place for: {_some(extra)}")
    for name, tensor in have.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{name} is {kind}, not floating-point weights")
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)}, its settings want {list(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} has values that are not finite (NaN or infinity)")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """Return class name and settings, as files store them."""
    return _describe(encoder, ENCODERS)


def describe_network(net: nn.Module) -> dict[str, Any]:
    """Return class name and settings, as files store them.

    Raises:
        ErkGuidError: the network is not one of ours.
    """
    return _describe(net, NETWORKS)


def _describe(thing: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if getattr(thing, "frozen_in", None) is not None:
        raise ErkGuidError("a frozen network cannot be saved; load it with freeze=False")
    for name, cls in known.items():
        if type(thing) is cls:
            return {"class": name, "config": thing.config}
    raise ErkGuidError(
        f"{type(thing).__name__} is not one of our classes ({', '.join(known)}), so a file "
        "cannot describe it without code"
    )
