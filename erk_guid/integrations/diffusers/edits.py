"""Whether a pipeline gives back the sample it was given, or an edited one.

In-painting puts the known part back after each call, and callbacks may do anything. Only where a
sample was left alone may a scheduler go on from what it remembers. To compare values on the host
would make the CPU wait for the GPU at each call, so the comparison stays a mask on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """A sample that the pipeline was given.

    Attributes:
        sample: the very tensor.
        version: how often it had been changed in place by then; None where torch does not count.
        values: a copy.
    """

    sample: Tensor
    version: int | None
    values: Tensor

    @classmethod
    def of(cls, sample: Tensor) -> Given:
        """Remember a sample."""
        return cls(sample, _version(sample), sample.clone())

    def edited(self, sample: Tensor) -> Tensor | None:
        """Return where a sample that comes back differs: bool, like it; None is nowhere."""
        if sample is self.sample and self.version is not None and self.version == _version(sample):
            return None
        values = self.values.to(sample.dtype)  # CogVideoX's loop casts each sample
        edited = sample != values
        for dtype in (torch.bfloat16, torch.float16):  # and others cast it there and back
            if sample.dtype not in (torch.bfloat16, torch.float16):
                edited &= sample != values.to(dtype).to(sample.dtype)
        return edited

    def fits(self, sample: Tensor) -> bool:
        """Return whether a sample may be this one, edited or not."""
        return sample.shape == self.values.shape and sample.device == self.values.device


def _version(sample: Tensor) -> int | None:
    return None if sample.is_inference() else sample._version


def unless(edited: Tensor | None, kept: Tensor, other: Tensor) -> Tensor:
    """Return `kept`, but `other` where the sample was edited."""
    return kept if edited is None else torch.where(edited, other, kept)


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return where one mask or the other is true; None is nowhere."""
    if a is None or b is None:
        return a if b is None else b
    return a | b
