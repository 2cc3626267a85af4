"""The 2-D tree that calibration is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from erk_guid import (
    karras_sigmas,
)
from erk_guid.mixtures import tree_mixture

TREE = tree_mixture()


SIGMAS = karras_sigmas(7, sigma_max=5.0)


def starts(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return TREE.sample(count, generator) + 5.0 * noise
