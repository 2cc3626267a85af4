"""Noise levels as parameters that can be searched, and what a change of them does.

Levels are written as the logarithms of the steps between them, in log sigma: ``log gaps``, up to a
constant. Any values are a falling sequence with fixed ends, so a search needs no constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KNOTS = 4
"""Parameters of the coarse search: a density over log sigma, linear between its knots."""
SMALLEST_GAP = 1e-3
"""Smallest step, as a part of the whole range in log sigma."""


@dataclass(frozen=True)
class Spacing:
    """Noise levels with fixed ends.

    Attributes:
        first: the level at which a run begins.
        high, low: the range that is divided; `first` is `high`, or stands above it where a process
            begins with nothing but noise.
        gaps: steps in log sigma between high and low, [intervals], float64, their sum fixed.
    """

    first: float
    high: float
    low: float
    gaps: Tensor

    @classmethod
    def of(cls, levels: Sequence[float], high: float) -> Spacing:
        """Return the spacing of levels that end at the last one."""
        inner = [high, *levels[1:]]
        logs = torch.tensor(inner, dtype=torch.float64).log()
        return cls(levels[0], high, levels[-1], -logs.diff())

    @property
    def levels(self) -> list[float]:
        """The noise levels, from `first` to `low`."""
        below = torch.cumsum(self.gaps, 0)[:-1]
        inner = (math.log(self.high) - below).exp().tolist()
        return [self.first, *inner, self.low]

    def moved(self, shift: Tensor) -> Spacing:
        """Return the spacing with its log gaps moved by `shift` [intervals]."""
        total = math.log(self.high / self.low)
        shares = torch.softmax(self.gaps.log() + shift, 0)
        shares = shares.clamp_min(SMALLEST_GAP)
        return Spacing(self.first, self.high, self.low, total * shares / shares.sum())

    def jacobian(self) -> Tensor:
        """Return d log levels / d log gaps, [levels between the ends, intervals]."""
        # log level i = log high - sum of the gaps before it; gaps = total softmax(v).
        shares = self.gaps / self.gaps.sum()
        before = torch.tril(torch.ones(len(self.gaps) - 1, len(self.gaps), dtype=torch.float64))
        reached = before @ shares
        return -self.gaps.sum() * (before * shares - reached[:, None] * shares)

    def hats(self, knots: int = KNOTS) -> Tensor:
        """Return how a density with some knots over log sigma moves the log gaps.

        The result is [intervals, knots]: hat functions at the middle of each gap.
        """
        ends = torch.cumsum(self.gaps, 0)
        middle = (ends - self.gaps / 2) / ends[-1] * (knots - 1)
        return (1 - (middle[:, None] - torch.arange(knots)).abs()).clamp_min(0)
