"""The demo: equal evaluations for all columns, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import erk_guid
from erk_guid.studies import demo


def test_all_columns_get_the_same_evaluations() -> None:
    calls = 0

    def net(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        return x / (1 + sigma**2)

    spent = {}
    for column in demo.columns():
        calls = 0
        erk_guid.edm_sampler(net, torch.zeros(1, 2), **column.options)
        spent[column.title] = calls
    assert len(spent) == 6
    assert spent.pop("Reference") == demo.FINE_EVALUATIONS
    assert set(spent.values()) == {demo.EVALUATIONS}


@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SEEDS", range(4))
    monkeypatch.setattr(demo, "SHOWN", 4)
    demo.run_demo(tmp_path, "cpu")
    said = (tmp_path / "demo.txt").read_text().splitlines()
    numbers = [float(line.split("reference ")[1].split()[0]) for line in said[:5]]
    # Each column is nearer than the one before it, as the README says.
    assert numbers == sorted(numbers, reverse=True)
    assert demo.FIT_COMMAND in said[-1]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 6 * 2 * 96
    assert json.loads((tmp_path / "demo.json").read_text())["evaluations"] == 6
