"""Safe reading of the published snapshots of EDM2 (`.pkl`); `trusted` runs the code inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from erk_guid.common.errors import CheckpointError
from erk_guid.models.checkpoints.build import NETWORKS, bind, build_encoder, build_network
from erk_guid.models.checkpoints.safe_pickle import Persistent, Record, array_of, plain, read_pickle
from erk_guid.models.encoders import ENCODERS, Encoder, StandardRGBEncoder

MAX_DEPTH = 64
MAX_MEMBERS = 50_000
"""Modules, parameters and buffers in all; one object may appear in many places of the file."""
MAX_NAME = 500


def read_snapshot(path: Path) -> tuple[Any, Encoder]:
    """Read network and encoder of a published snapshot; nothing in the file runs.

    Raises:
        CheckpointError: see `safe_pickle.read_pickle` and `build.build_network`.
    """
    data = read_pickle(path)
    if not isinstance(data, dict) or not isinstance(data.get("ema"), Persistent):
        keys = f"a {type(data).__name__}"
        if isinstance(data, dict):
            keys = f"a dict with {', '.join(str(key)[:40] for key in list(data)[:6]) or 'nothing'}"
        raise CheckpointError(f"it is no network snapshot: it holds {keys}, and no network 'ema'")
    ema = data["ema"]
    state = _state_dict(ema)
    _check_sharing(state)
    net = build_network(ema.class_name, _settings(ema, NETWORKS), state)

    encoder = data.get("encoder")
    if encoder is None:
        return net, StandardRGBEncoder()
    if not isinstance(encoder, Persistent):
        raise CheckpointError("its encoder is no persistent object")
    return net, build_encoder(encoder.class_name, _settings(encoder, ENCODERS))


def _settings(record: Persistent, known: Any) -> dict[str, Any]:
    args = plain(record.state.get("_init_args", []))
    kwargs = plain(record.state.get("_init_kwargs", {}))
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise CheckpointError(
            f"the settings of its {record.class_name[:80]} are not a list and a dict"
        )
    cls = known.get(record.class_name)
    return bind(cls, args, kwargs) if cls is not None else kwargs


def _state_dict(root: Persistent) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, with submodules, as torch would name them."""
    found: dict[str, Tensor] = {}
    left = MAX_MEMBERS

    def visit(module: Any, prefix: str, depth: int) -> None:
        nonlocal left
        if depth > MAX_DEPTH:
            raise CheckpointError("its modules nest too deeply, or contain each other")
        state = module.state if isinstance(module, (Persistent, Record)) else None
        if not isinstance(state, dict):
            raise CheckpointError(f"its module {prefix or '(the network)'} is no module")
        skipped = state.get("_non_persistent_buffers_set", set())
        if not isinstance(skipped, set):
            raise CheckpointError(f"{prefix}_non_persistent_buffers_set is no set")
        for group in ("_parameters", "_buffers", "_modules"):
            members = state.get(group, {})
            if not isinstance(members, dict):
                raise CheckpointError(f"{prefix}{group} is a {type(members).__name__}, not a dict")
            for name, member in members.items():
                left -= 1
                if left < 0:
                    raise CheckpointError(f"it has more than {MAX_MEMBERS} modules and weights")
                if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
                    raise CheckpointError(f"{prefix}{group} has a name that is no name")
                if member is None or (group == "_buffers" and name in skipped):
                    continue
                if group == "_modules":
                    visit(member, f"{prefix}{name}.", depth + 1)
                elif isinstance(member, Tensor):
                    found[prefix + name] = member
                else:
                    what = "an array" if array_of(member) is not None else type(member).__name__
                    raise CheckpointError(f"{prefix}{name} is {what}, not a tensor")

    visit(root, "", 0)
    return found


def _check_sharing(state: dict[str, Tensor]) -> None:
    """Refuse a small file whose tensors are views of one storage and make a huge network."""
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    wanted = sum(t.numel() * t.itemsize for t in state.values())
    if wanted > 2 * sum(stored.values()) + 4096:
        raise CheckpointError(
            f"its tensors add up to {wanted} bytes, but only {sum(stored.values())} are stored"
        )
