"""Noise levels as parameters that can be searched, and what a change of them does.

Levels are written as the logarithms of the steps between them, in log sigma: ``log gaps``, up to a
constant. Any values are a falling sequence with fixed ends, so a search needs no constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        gaps: steps in log sigma between high and low, float64, their sum fixed: [intervals], or
            one more where the end is open.
        open: whether `low` is no level, so that the last one may be anywhere above it.
    """

    first: float
    high: float
    low: float
    gaps: Tensor
    open: bool = False

    @classmethod
    def of(cls, levels: Sequence[float], high: float, floor: float | None = None) -> Spacing:
        """Return the spacing of levels.

        Args:
            levels: with both ends.
            high: see the class.
            floor: below which the last level may not come; None is for an end that is fixed.
        """
        inner, low = [high, *levels[1:]], levels[-1]
        if floor is not None:
            least = floor * (high / floor) ** SMALLEST_GAP
            inner, low = [*inner[:-1], max(inner[-1], least), floor], floor
        logs = torch.tensor(inner, dtype=torch.float64).log()
        return cls(levels[0], high, low, -logs.diff(), floor is not None)

    @property
    def levels(self) -> list[float]:
        """The noise levels, from `first` to the last one."""
        below = torch.cumsum(self.gaps, 0)[:-1]
        inner = (math.log(self.high) - below).exp().tolist()
        return [self.first, *inner, *([] if self.open else [self.low])]

    def moved(self, shift: Tensor) -> Spacing:
        """Return the spacing with its log gaps moved by `shift` [gaps]."""
        total = math.log(self.high / self.low)
        shares = torch.softmax(self.gaps.log() + shift, 0)
        shares = shares.clamp_min(SMALLEST_GAP)
        return replace(self, gaps=total * shares / shares.sum())

    def jacobian(self) -> Tensor:
        """Return d log levels / d log gaps, [levels that move, gaps]."""
        # log level i = log high - sum of the gaps before it; gaps = total softmax(v).
        shares = self.gaps / self.gaps.sum()
        before = torch.tril(torch.ones(len(self.gaps) - 1, len(self.gaps), dtype=torch.float64))
        reached = before @ shares
        return -self.gaps.sum() * (before * shares - reached[:, None] * shares)

    def hats(self, knots: int = KNOTS) -> Tensor:
        """Return how a density with some knots over log sigma moves the log gaps.

        The result is [gaps, knots]: hat functions at the middle of each gap.
        """
        ends = torch.cumsum(self.gaps, 0)
        middle = (ends - self.gaps / 2) / ends[-1] * (knots - 1)
        return (1 - (middle[:, None] - torch.arange(knots)).abs()).clamp_min(0)
