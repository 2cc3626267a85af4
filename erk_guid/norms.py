"""Norms and inner products per sample, accumulated in float32 at least, at any scale of the data.

Squares overflow in float32 from 1e19 on, and vanish below 1e-19. So samples are first divided by a
power of two near their largest element (`scaled`). That rounds nothing: at usual scales the results
are those of the plain formulas, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""Accumulator to the integer of its width, and the bits in it that are the exponent."""


class Scaled(NamedTuple):
    """Samples without their scale: the samples are ``values * unit``.

    Attributes:
        values: like the samples, [N, ...]; the largest element of each is from 1 to 2, or 0.
        unit: powers of two, [N], float32 or better.
    """

    values: Tensor
    unit: Tensor

    def norm(self) -> Tensor:
        """Return the Euclidean norm of each sample, [N]."""
        flat = self.values.flatten(1)
        return torch.linalg.vector_norm(flat, dim=1, dtype=self.unit.dtype) * self.unit


def scaled(x: Tensor) -> Scaled:
    """Divide each sample [N, ...] by a power of two near its largest element.

    float16 stays as it is: float32 holds its squares.
    """
    unit = _power_of_two(x)
    return Scaled(x * per_sample(1 / unit, x), unit)


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample: [N, ...] to [N], float32 or better."""
    return scaled(x.flatten(1)).norm()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each pair of samples: [N, ...] to [N], float32 or better.

    It has the scale of a times that of b: one of them should be `scaled`.
    """
    dtype = _accumulator(a)
    return torch.linalg.vecdot(a.flatten(1).to(dtype), b.flatten(1).to(dtype))


def projection(a: Tensor, b: Tensor) -> Tensor:
    """Return the t for which t b is nearest to a, per sample: <a, b> / <b, b>; 1 where b is 0.

    Args:
        a, b: [N, ...].

    Returns:
        [N], float32 or better.
    """
    values, unit = scaled(b)
    size = inner(values, values)
    share = inner(a, values) / torch.where(size > 0, size, torch.ones_like(size)) / unit
    return torch.where(size > 0, share, torch.ones_like(share))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` [N] so that they multiply `like` [N, ...]; in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _power_of_two(x: Tensor) -> Tensor:
    """Return the largest power of two up to max |x|, per sample, [N]; a constant for gradients.

    It and its reciprocal are normal numbers of the dtype of x, also where x is 0 or not finite.
    """
    x, dtype, within = x.detach(), _accumulator(x), tuple(range(1, x.ndim))
    if x.dtype == torch.float16 or 0 in x.shape[1:]:
        return torch.ones(len(x), dtype=dtype, device=x.device)
    # Not the norm of order infinity, nor aminmax: on a CPU those take ten times as long.
    largest = torch.maximum(x.amax(within), -x.amin(within)).to(dtype)
    whole, exponent = _EXPONENT[dtype]
    # A power of two is a float without mantissa. Logarithms would round, and MPS has no frexp.
    power = (largest.view(whole) & exponent).view(dtype)
    tiny = torch.finfo(dtype).tiny
    return power.clamp(tiny, 1 / tiny)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
