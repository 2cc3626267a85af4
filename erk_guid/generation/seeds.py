"""Turn seeds into noise: one random stream per image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor

MOST_SEEDS = 10_000_000
STREAMS = 1 << 32
"""Number of different streams: seeds count modulo this."""


def seeds_in(text: str) -> list[int]:
    """Parse '1,2,5-10' into [1, 2, 5, 6, 7, 8, 9, 10]; repeated seeds are kept.

    Raises:
        ValueError: a part is neither a whole number nor a range, or there are too many seeds.
    """
    ranges: list[range] = []
    count = 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if match is None:
            raise ValueError(
                f"{part.strip()!r} in {text!r} is neither a whole number nor a range such as 5-10"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part.strip()!r} runs backwards; write {last}-{first}")
        if last - first >= MOST_SEEDS:
            raise ValueError(f"the range {part.strip()!r} has more than ten million seeds")
        ranges.append(range(first, last + 1))
        count += last - first + 1
        if count > MOST_SEEDS:
            raise ValueError(f"up to {part.strip()!r}, the list has more than ten million seeds")
    return [seed for one in ranges for seed in one]


def unique(seeds: Sequence[int]) -> list[int]:
    """Return every seed once, in the order of its first place.

    Raises:
        ValueError: two seeds give one image, see `SeededNoise`.
    """
    rising = all(a < b for a, b in pairwise(seeds))
    once = list(seeds) if rising else list(dict.fromkeys(seeds))
    if once and not 0 <= min(once) <= max(once) < STREAMS:
        streams: dict[int, int] = {}
        for seed in once:
            other = streams.setdefault(seed % STREAMS, seed)
            if other != seed:
                raise ValueError(
                    f"seeds {other} and {seed} give one image: as in EDM2, seeds count modulo 2^32"
                )
    return once


class SeededNoise:
    """One random stream per image, so that an image depends on its seed and nothing else.

    Seed k draws from ``torch.Generator(device).manual_seed(k mod 2^32)``, as in EDM2: the first
    draw is the noise, the second (for a conditional network) the class.

    Raises:
        TypeError: a seed is no whole number.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [
            torch.Generator(device).manual_seed(index(seed) % STREAMS) for seed in seeds
        ]
        self._device = device

    def __len__(self) -> int:
        return len(self._generators)

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal noise, [seeds, *shape]."""
        return torch.stack(
            [
                torch.randn(list(shape), generator=g, dtype=dtype, device=self._device)
                for g in self._generators
            ]
        )

    def randn_like(self, x: Tensor) -> Tensor:
        """Return standard normal noise like `x` [seeds, ...]."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> Tensor:
        """Return whole numbers in [0, high), [seeds]."""
        return torch.stack(
            [
                torch.randint(high, size=[], generator=g, device=self._device)
                for g in self._generators
            ]
        )
