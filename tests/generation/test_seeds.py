"""Lists of seeds as text."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch

from erk_guid.generation.seeds import SeededNoise, seeds_in


@pytest.mark.parametrize("text", ["0-9999999,0", "7," * 9 + "0-9999999", "1-9000000,1-9000000"])
def test_ranges_are_bounded_together(text: str) -> None:
    # Catches: a bound on each range alone. A line of text with hundreds of long ranges then takes
    # all memory there is.
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than ten million seeds"):
        seeds_in(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # refused before the list is made


def test_lists_below_the_bound_are_whole() -> None:
    assert seeds_in(" 3, 0-2,2 ,9-9") == [3, 0, 1, 2, 2, 9]
    assert len(seeds_in("0-99999,0-99999")) == 200_000


@pytest.mark.parametrize("seed", [1.5, "1"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    # 1.5 was the seed 1, without a word.
    with pytest.raises(TypeError, match="integer"):
        SeededNoise([seed], torch.device("cpu"))
