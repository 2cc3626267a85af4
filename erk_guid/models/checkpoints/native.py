"""Our own format: safetensors, with classes and settings as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from erk_guid.common.errors import CheckpointError
from erk_guid.common.files import replacing
from erk_guid.models.checkpoints.build import (
    build_encoder,
    build_network,
    describe_encoder,
    describe_network,
)
from erk_guid.models.encoders import Encoder, StandardRGBEncoder

FORMAT = "erk_guid/1"


def save_network(
    path: str | Path,
    net: nn.Module,
    encoder: Encoder | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights (in their own dtypes), settings and encoder to one safetensors file.

    Args:
        path: the file; it appears whole or not at all.
        net: a network of ours.
        encoder: defaults to `StandardRGBEncoder`.
        metadata: further text for the header, such as how the network was trained.

    Raises:
        ErkGuidError: `net` is not a network of ours.
    """
    header = {
        **(metadata or {}),
        "format": FORMAT,
        "network": json.dumps(describe_network(net)),
        "encoder": json.dumps(describe_encoder(encoder or StandardRGBEncoder())),
    }
    # Clones, because safetensors refuses tensors that share memory.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # the user's own, which safetensors does not ask for
        save_file(state, partial, metadata=header)
        partial.chmod(mode)


def has_header(path: Path) -> bool:
    """Return whether the header of a safetensors file says that it has our format."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def read_native(path: Path) -> tuple[Any, Encoder, dict[str, str]]:
    """Read a file of our format; return network, encoder and the remaining header text.

    Raises:
        CheckpointError: the file does not have our format, or as `build.build_network`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            if header.pop("format", None) != FORMAT:
                raise CheckpointError(
                    "it is a safetensors file, but not one of ours: its header does not say how "
                    "the network is built (make one with 'erk-guid convert'), nor does a "
                    "config.json beside it"
                )
            network = _description(header, "network")
            encoder = _description(header, "encoder")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"damaged, or not a safetensors file ({error})") from error
    net = build_network(network["class"], network["config"], state)
    return net, build_encoder(encoder["class"], encoder["config"]), header


def _description(header: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(header.pop(key))
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its header does not describe the {key}") from error
    if not isinstance(value, dict) or not isinstance(value.get("class"), str) or not isinstance(
        value.get("config"), dict
    ):  # fmt: skip
        raise CheckpointError(f"its header does not describe the {key}")
    return value
