"""Precision and recall of one set of features against another, by nearest neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.metrics.scores.base import Observed, Score, register_score, required

NEIGHBOURS = 3
"""The k that torch-fidelity and most papers use."""

TILE = 1 << 25
"""Distances held at a time: 128 MB in float32, and as much again while the k-th is found."""


def precision_recall(
    *,
    real: np.ndarray | Tensor,
    generated: np.ndarray | Tensor,
    k: int = NEIGHBOURS,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    A point is in a set's manifold if it is no farther from one of the set's points than that
    point's k-th nearest neighbour in the set. Precision is the share of the generated points
    in the manifold of the real ones. Recall is the share of the real points in the manifold of
    the generated ones. Distances are float32 and computed in tiles: memory does not grow with
    the square of the number of features. The values equal torch-fidelity's up to ties and its
    rounding, which is coarse where all features have a common offset.

    Args:
        real, generated: features, [n, d] and [m, d], arrays or tensors.
        k: which neighbour's distance is the radius of a point's ball.
        device: where to compute; by default where `real` is.
        progress: called with the number of rows done, 2 (n + m) in all.

    Returns:
        (precision, recall), each from 0 to 1.

    Raises:
        ValueError: features of different dimensions, not finite, or fewer than k + 1.
    """
    a = _features(real, "real", k)
    b = _features(generated, "generated", k)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"real features have {a.shape[1]} dimensions, generated ones {b.shape[1]}; both must "
            "come from one detector"
        )
    where = torch.device(device) if device is not None else a.device
    centre = a.mean(dim=0, dtype=torch.float64).to(b.device)
    a, b = (_about(centre, one).to(where) for one in (a, b))
    done = progress or (lambda rows: None)
    precision = _share_inside(b, a, _radii(a, k, done), done)
    recall = _share_inside(a, b, _radii(b, k, done), done)
    return precision, recall


def _features(value: np.ndarray | Tensor, name: str, k: int) -> Tensor:
    features = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if features.ndim != 2 or not features.dtype.is_floating_point:
        raise ValueError(
            f"{name} features must be floating-point [n, d], got {features.dtype} "
            f"{list(features.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k must be a whole number, got {k!r}")
    if not 1 <= k < len(features):
        raise ValueError(
            f"the {k}-th nearest neighbour needs at least {max(k, 1) + 1} {name} images, got "
            f"{len(features)}; k must be at least 1"
        )
    if features.dtype != torch.float64:
        features = features.to(torch.float32)
    if not features.isfinite().all():
        raise ValueError(f"{name} features have values that are not finite")
    return features


def _about(centre: Tensor, features: Tensor) -> Tensor:
    """Return features as float32, relative to a point: distances stay, and keep their digits."""
    return (features - centre.to(features)).to(torch.float32)


def _tiles(rows: Tensor, columns: Tensor) -> list[Tensor]:
    return list(rows.split(max(1, TILE // len(columns))))


def _radii(points: Tensor, k: int, done: Callable[[int], object]) -> Tensor:
    """Return each point's distance to its k-th nearest neighbour in the same set, [n]."""
    radii = []
    for tile in _tiles(points, points):
        # The first of the k + 1 nearest is the point itself.
        radii.append(torch.cdist(tile, points).kthvalue(k + 1).values)
        done(len(tile))
    return torch.cat(radii)


def _share_inside(
    points: Tensor, centres: Tensor, radii: Tensor, done: Callable[[int], object]
) -> float:
    """Return the share of `points` that lie in at least one ball."""
    inside = 0
    for tile in _tiles(points, centres):
        inside += int((torch.cdist(tile, centres) <= radii).any(dim=1).sum())
        done(len(tile))
    return inside / len(points)


@dataclass(frozen=True)
class PrecisionRecall(Score):
    """`precision_recall` as a score."""

    k: int = NEIGHBOURS

    detector = "vgg16"
    needs = ("features",)
    needs_of_reference = ("features",)

    @property
    def fewest(self) -> int:
        return self.k + 1

    def __call__(
        self, generated: Observed, reference: Observed, device: torch.device
    ) -> dict[str, float]:
        real = required(reference.features, "features of real images")
        made = required(generated.features, "features")
        # On mps torch.cdist and kthvalue are not complete in all versions.
        where = torch.device("cpu") if device.type == "mps" else device
        rows = 2 * (len(real) + len(made))
        with tqdm(total=rows, desc="neighbours", unit="row", file=sys.stderr) as bar:
            precision, recall = precision_recall(
                real=real, generated=made, k=self.k, device=where, progress=bar.update
            )
        return {"precision": precision, "recall": recall}


register_score("pr", PrecisionRecall())
