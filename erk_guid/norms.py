"""Norms and inner products per sample, accumulated in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample: [N, ...] to [N], float32 or better."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=_accumulator(x))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each pair of samples: [N, ...] to [N], float32 or better."""
    dtype = _accumulator(a)
    return torch.linalg.vecdot(a.flatten(1).to(dtype), b.flatten(1).to(dtype))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` [N] so that they multiply `like` [N, ...]; in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
