"""Whether `torch.compile` works here."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works on a device, by trying it; if not, say why on stderr.

    It takes a compiler that torch finds: of C++ for the CPU, Triton for CUDA.
    """

    def double(x: Tensor) -> Tensor:
        return x + x

    try:
        torch.compile(double, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # of torch's own compiler or of those that it runs
        reason = " ".join(str(error).split())[:160]
        print(
            f"torch.compile does not work on {device.type} here, so nothing is compiled "
            f"({type(error).__name__}: {reason})",
            file=sys.stderr,
        )
        return False
    return True
