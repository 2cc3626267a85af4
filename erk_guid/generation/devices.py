"""Choose the device that the work runs on."""

from __future__ import annotations

import os

import torch

from erk_guid.common.errors import ErkGuidError


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name, or the best one present (cuda, mps, cpu).

    Under torchrun a plain "cuda" means the GPU of this process's LOCAL_RANK.

    Raises:
        ErkGuidError: the device is not present; the message lists those that are.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    here = ", ".join(kind for kind, there in present.items() if there)
    try:
        device = torch.device(name or next(kind for kind, there in present.items() if there))
    except RuntimeError as error:
        raise ErkGuidError(f"unknown device {name!r}; present: {here}") from error
    if not present.get(device.type, False):
        raise ErkGuidError(f"device {name!r} is not present here; use one of: {here}")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ErkGuidError(
                f"device {device} does not exist: {torch.cuda.device_count()} CUDA devices are "
                "visible (with torchrun, start no more processes per node than that)"
            )
    return device
