"""Precision and recall."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.features import PEAK, linux
from torch_fidelity.metric_prc import calculate_precision_recall_full

from erk_guid.metrics import (
    precision_recall,
)
from erk_guid.metrics.scores import neighbours


def data_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    real = rng.standard_normal((400, 16))
    return {
        "alike": (real, rng.standard_normal((350, 16))),
        "shifted": (real, rng.standard_normal((500, 16)) * 0.7 + 0.5),
        "clusters": (
            rng.standard_normal((300, 64)) + 4 * rng.integers(0, 3, (300, 1)),
            rng.standard_normal((300, 64)) + 4 * rng.integers(0, 2, (300, 1)),
        ),
    }


@pytest.mark.parametrize("name", ["alike", "shifted", "clusters"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(
    name: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generated = (torch.from_numpy(a).float() for a in data_sets()[name])
    # A single point may be on the other side: with the clusters and k = 1 one is 4e-6 from a ball,
    # nearer than torch-fidelity's distances are exact.
    theirs = calculate_precision_recall_full(generated, real, neighborhood=k)
    expected = pytest.approx(theirs, abs=1.01 / len(real))
    assert precision_recall(real=real, generated=generated, k=k) == expected
    assert min(theirs) > 0
    # In small tiles, too, with a remainder.
    whole = precision_recall(real=real, generated=generated, k=k)
    monkeypatch.setattr(neighbours, "TILE", 7 * 400)
    assert precision_recall(real=real, generated=generated, k=k) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offset_of_all_features_changes_nothing(dtype: torch.dtype) -> None:
    # Distances by hand, in float64. Before: 1 and 1, for at an offset of 2000 the distances of
    # features that scatter by 0.1 were nothing but rounding.
    real, generated = (torch.from_numpy(a)[:, :64] for a in data_sets()["clusters"])
    real, generated = ((0.1 * one + 2000).to(dtype) for one in (real, generated))

    def share(points: torch.Tensor, centres: torch.Tensor) -> float:
        def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a[:, None].double() - b[None].double()).norm(dim=2)

        radii = apart(centres, centres).kthvalue(4, dim=1).values
        return float((apart(points, centres) <= radii).any(dim=1).double().mean())

    expected = share(generated, real), share(real, generated)
    assert 0.1 < min(expected) < 0.95
    assert precision_recall(real=real, generated=generated) == pytest.approx(expected, abs=0.004)


def test_what_precision_and_recall_mean() -> None:
    # Catches real and generated exchanged, as torch-fidelity had them before 0.4.0.
    rng = np.random.default_rng(3)
    real = rng.standard_normal((500, 8))
    collapsed = real[7] + 1e-3 * rng.standard_normal((500, 8))
    precision, recall = precision_recall(real=real, generated=collapsed)
    assert precision == 1
    assert recall <= 0.01
    dispersed = 6 * rng.standard_normal((500, 8))
    precision, recall = precision_recall(real=real, generated=dispersed)
    assert precision < 0.05
    assert recall > 0.95
    assert precision_recall(real=real, generated=real.copy()) == (1, 1)
    far = precision_recall(real=real, generated=real + 100)
    assert far == (0, 0)


def test_precision_and_recall_refuse_what_they_cannot_use() -> None:
    points = np.zeros((5, 3))
    with pytest.raises(ValueError, match="real features have 3 dimensions, generated ones 2"):
        precision_recall(real=points, generated=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="at least 6 generated images, got 5"):
        precision_recall(real=np.zeros((9, 3)), generated=points, k=5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        precision_recall(real=points, generated=points, k=0)
    with pytest.raises(ValueError, match=r"k must be a whole number, got 2\.5"):
        precision_recall(real=points, generated=points, k=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floating-point"):
        precision_recall(real=points.astype(int), generated=points)
    with pytest.raises(ValueError, match="real features have values that are not finite"):
        precision_recall(real=points + np.nan, generated=points)


TILES = (
    PEAK
    + """
import sys, torch
from erk_guid.metrics.scores import neighbours
torch.manual_seed(0)
n = int(sys.argv[1])
real, generated = torch.randn(n, 2048), torch.randn(n, 2048)
# One tile of each pass: the memory of the whole, a fraction of the time.
def first(rows, columns, whole=neighbours._tiles):
    return whole(rows, columns)[:1]
neighbours._tiles = first
radii = neighbours._radii(real, 3, lambda rows: None)
neighbours._share_inside(generated, real, torch.ones(n), lambda rows: None)
print(peak())
"""
)


@linux
@pytest.mark.slow
def test_50000_by_50000_features_fit_in_four_gigabytes() -> None:
    # The whole matrix of distances alone would be 10 GB.
    peak = int(subprocess.check_output([sys.executable, "-c", TILES, "50000"], text=True))
    assert peak < 4_000_000
    assert peak > 800_000  # the features themselves were there
