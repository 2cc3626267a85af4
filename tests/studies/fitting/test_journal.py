"""The journal of a search, where its files are not what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erk_guid.common.errors import ErkGuidError
from erk_guid.studies.fitting.journal import Journal

SEARCH = ("a search",)


def refuse() -> Any:
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,  # Python's JSON reader gives up with RecursionError
        '{"key": "k", "numbers": [1], "spent": Infinity}',  # no int: OverflowError
        '{"key": "k", "numbers": [1' + "0" * 400 + '], "spent": 1}',  # no float: OverflowError
        '{"key": "k", "numbers": "12", "spent": 1}',  # not the numbers 1 and 2
        '{"key": 1, "numbers": [1], "spent": 1}',
        '{"key": "k"',
        "[]",
        "\udcff",
    ],
)
def test_lines_that_are_no_entries_are_measured_again(line: str, tmp_path: Path) -> None:
    # Catches: a traceback, or numbers made of something else, when a search goes on.
    Journal.open(tmp_path, SEARCH).numbers(("before",), lambda: [2.0])
    with open(tmp_path / "trials.jsonl", "a", errors="surrogateescape") as file:
        file.write(line + "\n")
    journal = Journal.open(tmp_path, SEARCH)
    assert list(journal.known) == ['["before"]']
    assert journal.numbers(("before",), refuse) == [2.0]
    # What was damaged is gone, and what comes after it is kept.
    journal.numbers(("after",), lambda: [3.0])
    assert Journal.open(tmp_path, SEARCH).numbers(("after",), refuse) == [3.0]


@pytest.mark.parametrize("spent", [np.array([1, 2]), np.array([], np.int64), np.array([[1]])])
def test_an_array_with_several_counts_is_damaged(spent: np.ndarray, tmp_path: Path) -> None:
    # Catches: int() of an array, which is a TypeError.
    values, of = np.ones((2, 3), np.float32), np.array([], np.uint8)
    np.savez(tmp_path / "ends.npz", values=values, spent=spent, of=of)
    with pytest.raises(ErkGuidError, match=r"ends\.npz is damaged; delete it"):
        Journal(tmp_path).tensor("ends", torch.zeros(2, 3), lambda: torch.zeros(2, 3))


def test_the_fine_solution_of_another_search_is_refused(tmp_path: Path) -> None:
    # Catches: a search that goes on with the fine solution of another one, after its trials.jsonl
    # was deleted, as the message once said; levels and errors were then of nothing.
    def make() -> torch.Tensor:
        return torch.ones(2, 3)

    like = torch.zeros(2, 3)
    Journal.open(tmp_path, SEARCH).tensor("fine", like, make)
    assert torch.equal(Journal.open(tmp_path, SEARCH).tensor("fine", like, refuse), make())
    with pytest.raises(ErkGuidError, match=f"another search.* delete {tmp_path}"):
        Journal.open(tmp_path, ("another",))
    (tmp_path / "trials.jsonl").unlink()
    other = Journal.open(tmp_path, ("another",))
    with pytest.raises(ErkGuidError, match=r"fine\.npz is of another search"):
        other.tensor("fine", like, make)
