"""Kernel distance (KID): squared maximum mean discrepancy with a polynomial kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.metrics.scores.base import Observed, Score, register_score, required
from erk_guid.metrics.scores.inception import RNG_SEED

SUBSETS, SUBSET_SIZE = 100, 1000
"""torch-fidelity's values."""


def kernel_distance(
    real: np.ndarray | Tensor,
    generated: np.ndarray | Tensor,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    rng_seed: int = RNG_SEED,
) -> tuple[float, float]:
    """Compute the kernel distance (Binkowski et al. 2018, arXiv 1801.01401) by torch-fidelity.

    This is the unbiased estimate of the squared maximum mean discrepancy with the kernel
    ``(x . y / d + 1)^3``, over random subsets of both sets. Unlike for a Frechet distance, its
    expectation does not depend on the number of images. It may be slightly below 0.

    Args:
        real, generated: features, [n, d] and [m, d], arrays or tensors.
        subsets: number of subsets that are drawn.
        subset_size: images in each.
        rng_seed: seed of the drawing.

    Returns:
        (mean, deviation over the subsets).

    Raises:
        ValueError: features of different dimensions, not finite, or fewer than `subset_size`; no
            subsets, or subsets of one.
        MissingExtraError: torch-fidelity is not installed.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"subsets must be at least 1 and subset_size 2, got {subsets} and {subset_size}"
        )
    a, b = _rows(real, "real"), _rows(generated, "generated")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"real features have {a.shape[1]} dimensions, generated ones {b.shape[1]}; both must "
            "come from one detector"
        )
    for name, rows in (("real", a), ("generated", b)):
        if len(rows) < subset_size:
            raise ValueError(
                f"subsets of {subset_size} images need at least as many {name} ones, got "
                f"{len(rows)}; take more images, or register a KernelDistance(subset_size=...)"
            )
    try:
        from torch_fidelity.metric_kid import kid_features_to_metric
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "metrics", "the kernel distance") from error
    # torch-fidelity draws from its first set first. By custom, input1 is the generated set.
    found = kid_features_to_metric(
        b, a, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=rng_seed, verbose=False
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def _rows(value: np.ndarray | Tensor, name: str) -> Tensor:
    rows = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{name} features must be floating-point [n, d], got {rows.dtype} {list(rows.shape)}"
        )
    rows = rows.to(torch.float32)
    if not rows.isfinite().all():
        raise ValueError(f"{name} features have values that are not finite")
    return rows


@dataclass(frozen=True)
class KernelDistance(Score):
    """`kernel_distance` as a score: mean and deviation over the subsets."""

    subsets: int = SUBSETS
    subset_size: int = SUBSET_SIZE
    rng_seed: int = RNG_SEED

    detector = "fid"
    needs = ("features",)
    needs_of_reference = ("features",)

    @property
    def fewest(self) -> int:
        return self.subset_size

    def __call__(
        self, generated: Observed, reference: Observed, device: torch.device
    ) -> dict[str, float]:
        real = required(reference.features, "features of real images")
        made = required(generated.features, "features")
        mean, deviation = kernel_distance(real, made, self.subsets, self.subset_size, self.rng_seed)
        return {"mean": mean, "std": deviation}


register_score("kid", KernelDistance())
