"""Files of weights for detectors: fetched, checked, identified."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import sha256_of
from erk_guid.metrics.detectors.base import DetectorError
from erk_guid.models.checkpoints.download import download


def fetch_weights(name: str, url: str) -> Path:
    """Return the file of weights in torch.hub's cache or ours; download it if in neither.

    Raises:
        DetectorError: it cannot be fetched; the message says which file to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        found = download(url)
        stem = path.stem.rpartition("-")[2]  # by convention, the first digits of the SHA-256
        if re.fullmatch("[0-9a-f]{8}", stem) and not sha256_of(found).startswith(stem):
            found.unlink()
            raise DetectorError(f"what {url} sent is another file; the copy was deleted")
    except ErkGuidError as error:
        raise DetectorError(
            f"cannot fetch the weights of {name} ({first_line(error)}). Fetch {url} elsewhere and "
            f"put it at {path}, or give --detector-weights {name}=FILE"
        ) from error
    return found


def check_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Read a file of weights without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for bytes it cannot read
        raise DetectorError(
            f"{path} is no plain file of weights for {name} ({first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DetectorError(f"{path} holds something else than the weights of {name}")
    return state


def first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return (text or type(error).__name__)[:160]


def identify(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_of(path)}
