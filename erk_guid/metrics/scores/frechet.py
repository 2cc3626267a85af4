"""The Frechet distance between two Gaussians, from their means and covariances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from erk_guid.metrics.scores.base import Observed, Score, register_score


def frechet_distance(
    mu1: ArrayLike | Tensor,
    sigma1: ArrayLike | Tensor,
    mu2: ArrayLike | Tensor,
    sigma2: ArrayLike | Tensor,
) -> float:
    """Compute the Frechet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500).

    ``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))``.

    The trace of the matrix root is the sum of the roots of the eigenvalues of ``L^T sigma2 L``
    with ``sigma1 = L L^T``. This problem is symmetric, so nothing becomes complex. It is many
    times faster than a matrix square root. A rank-deficient covariance (fewer images than
    features) is reduced to its range, where the problem is regular.

    Args:
        mu1, mu2: means, [d], arrays or tensors.
        sigma1, sigma2: covariances, [d, d]. Everything is computed in float64 on the CPU.

    Raises:
        ValueError: the shapes do not match, a value is not finite, or a matrix is not a
            covariance.
    """
    m1, m2 = _float64(mu1), _float64(mu2)
    s1, s2 = _float64(sigma1), _float64(sigma2)
    _check(m1, s1, "1")
    _check(m2, s2, "2")
    if m1.shape != m2.shape:
        raise ValueError(
            f"the distance needs features of one kind: {len(m1)} against {len(m2)} dimensions"
        )
    l1, l2 = _cholesky(s1), _cholesky(s2)
    # Both are factored, because only a covariance has such factors; a deficient one is reduced.
    f1, f2 = (_range_factor(s) if f is None else f for s, f in ((s1, l1), (s2, l2)))
    factor, other = (f2, s1) if l1 is not None and l2 is None else (f1, s2)
    eigenvalues = torch.linalg.eigvalsh(factor.mT @ other @ factor)
    roots = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * roots
    if not distance.isfinite():
        raise ValueError("the distance is beyond the numbers; a mean or a covariance is far off")
    return max(float(distance), 0.0)


def _float64(value: ArrayLike | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64)
    return torch.from_numpy(np.array(value, dtype=np.float64))


def _check(mu: Tensor, sigma: Tensor, which: str) -> None:
    if mu.ndim != 1 or tuple(sigma.shape) != (len(mu), len(mu)):
        raise ValueError(
            f"mu{which} must be [d] and sigma{which} [d, d], got {list(mu.shape)} and "
            f"{list(sigma.shape)}"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"mu{which} or sigma{which} has values that are not finite")
    scale = sigma.abs().max() if len(mu) else 0
    if len(mu) and (sigma - sigma.mT).abs().max() > 1e-6 * scale:
        raise ValueError(f"sigma{which} is not symmetric, so it is no covariance")
    if len(mu) and sigma.diagonal().min() < -1e-6 * scale:
        raise ValueError(f"sigma{which} has a negative variance, so it is no covariance")


def _cholesky(sigma: Tensor) -> Tensor | None:
    """Return L with ``sigma = L L^T``, or None unless `sigma` clearly has full rank."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    pivots = factor.diagonal().square()
    full = failed == 0 and pivots.min() > len(sigma) * _EPS * pivots.max()
    return factor if full else None


def _range_factor(sigma: Tensor) -> Tensor:
    """Return F [d, rank] with ``sigma = F F^T``, from the eigenvalues above rounding."""
    values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(
            f"a covariance has the negative eigenvalue {values[0]:.3g} (the largest is "
            f"{values[-1]:.3g}), so it is none"
        )
    kept = values > len(values) * _EPS * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class FrechetDistance(Score):
    """`frechet_distance` as a score: FID with Inception's features, FD-DINOv2 with DINOv2's."""

    detector = "fid"
    needs = ("statistics",)
    needs_of_reference = ("statistics",)

    def __call__(
        self, generated: Observed, reference: Observed, device: torch.device
    ) -> dict[str, float]:
        made, real = generated.statistics, reference.statistics
        if made is None or real is None:
            raise ValueError("a Frechet distance needs statistics of both sets")
        return {"distance": frechet_distance(made.mu, made.sigma, real.mu, real.sigma)}


register_score("frechet", FrechetDistance())
