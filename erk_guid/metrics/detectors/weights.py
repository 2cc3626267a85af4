"""Files of weights for detectors: fetched, checked, identified."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.metrics.detectors.base import DetectorError
from erk_guid.models.checkpoints.download import download


def fetch_weights(name: str, url: str, refresh: bool = False) -> Path:
    """Return the file of weights in torch.hub's cache or ours; download it if in neither.

    Args:
        name: the detector's.
        url: of the weights. By convention, their name may end in "-" and the first 8 digits of
            their SHA-256, which are checked.
        refresh: download our copy again; what torch.hub's cache has is used as it is.

    Raises:
        DetectorError: it cannot be fetched; the message says which file to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    digits = re.fullmatch(r".*-([0-9a-f]{8})", path.stem)
    try:
        return download(url, sha256=digits[1] if digits else None, refresh=refresh)
    except ErkGuidError as error:
        raise DetectorError(
            f"cannot fetch the weights of {name} ({printable(error, 1000)}). Fetch {url} elsewhere "
            f"and put it at {path}, or give --detector-weights {name}=FILE"
        ) from error


def check_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Read a file of weights without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for bytes it cannot read
        raise DetectorError(
            f"{path} is no plain file of weights for {name} ({first_line(error)}); if it was "
            "downloaded, delete it and it is fetched again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DetectorError(f"{path} holds something else than the weights of {name}")
    return state


def first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return (text or type(error).__name__)[:160]
