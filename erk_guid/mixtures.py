"""Gaussian mixtures: exact denoisers and their Jacobians, for use as oracles."""

from __future__ import annotations

import math
from importlib.resources import as_file, files

import torch
from torch import Tensor


class GaussianMixture:
    """A mixture of Gaussians in a few dimensions, and its exact denoiser.

    Called as ``mixture(x, sigma)`` it is a `Denoiser`: E[clean x | noisy x], for x [N, d].

    Args:
        weights: [K], positive; they are scaled to sum to 1.
        means: [K, d].
        covariances: [K, d, d], symmetric and positive semidefinite.

    Raises:
        ValueError: the shapes do not match, or a weight is not positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights must be [K] and means [K, d], got {list(weights.shape)} and "
                f"{list(means.shape)}"
            )
        if tuple(covariances.shape) != (*means.shape, means.shape[1]):
            raise ValueError(
                f"covariances must be {[*means.shape, means.shape[1]]}, got "
                f"{list(covariances.shape)}"
            )
        if not (weights > 0).all():
            raise ValueError("the weights of a mixture must be positive")
        self._log_weights = (weights.double() / weights.double().sum()).log()
        self._means = means.double()
        values, self._vectors = torch.linalg.eigh(covariances.double())
        self._variances = values.clamp(min=0)

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return self._means.shape[1]

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return E[clean | x] at noise level `sigma` (a number), like x, computed in float64."""
        shares, means, _ = self._posterior(x.double(), sigma)
        return torch.einsum("nk,nkd->nd", shares, means).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the gradient of the log density of the noisy data, like x."""
        noise = torch.as_tensor(sigma, dtype=torch.float64)
        return ((self(x.double(), noise) - x.double()) / noise**2).to(x.dtype)

    def log_density(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the log density of the noisy data, [N]."""
        log_p = self._log_joint(x.double(), sigma)[0]
        return (log_p.logsumexp(1) - 0.5 * self.dim * math.log(2 * math.pi)).to(x.dtype)

    def jacobian(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the denoiser's Jacobian [N, d, d]: posterior covariance of clean x / sigma^2."""
        shares, means, gains = self._posterior(x.double(), sigma)
        noise = torch.as_tensor(sigma, dtype=torch.float64)
        own = torch.einsum("kij,kj,klj->kil", self._vectors, gains, self._vectors) * noise**2
        spread = torch.einsum("nk,kij->nij", shares, own)
        mean = torch.einsum("nk,nkd->nd", shares, means)
        apart = means - mean[:, None]
        spread = spread + torch.einsum("nk,nki,nkj->nij", shares, apart, apart)
        return (spread / noise**2).to(x.dtype)

    def drift_jacobian(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the Jacobian of the probability-flow ODE's drift (x - D) / sigma, [N, d, d]."""
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return (eye - self.jacobian(x, sigma)) / torch.as_tensor(sigma, dtype=x.dtype)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw clean samples from the mixture, float64 [count, d]."""
        chosen = torch.multinomial(
            self._log_weights.exp(), count, replacement=True, generator=generator
        )
        noise = torch.randn(count, self.dim, dtype=torch.float64, generator=generator)
        scaled = noise * self._variances[chosen].sqrt()
        return self._means[chosen] + torch.einsum("nij,nj->ni", self._vectors[chosen], scaled)

    def _posterior(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the components' shares [N, K] and means [N, K, d] given x, and gains [K, d]."""
        log_p, apart, variances = self._log_joint(x, sigma)
        gains = self._variances / variances
        means = self._means + torch.einsum("kij,nkj->nki", self._vectors, gains * apart)
        return log_p.softmax(1), means, gains

    def _log_joint(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log(weight * density) [N, K], without the factor of 2 pi, and its terms."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        noise = torch.as_tensor(sigma, dtype=torch.float64)
        variances = self._variances + noise**2
        apart = torch.einsum("kij,nki->nkj", self._vectors, x[:, None] - self._means)
        log_p = self._log_weights - 0.5 * variances.log().sum(1)
        return log_p - 0.5 * (apart.square() / variances).sum(2), apart, variances


def tree_mixture(unconditional: bool = False) -> GaussianMixture:
    """Return the 2-D tree of the autoguidance paper's toy example.

    Source: Karras et al. 2024, arXiv 2406.02507.

    Args:
        unconditional: use both classes. The default is class A alone, the conditional target.
    """
    import numpy as np

    which = "AB" if unconditional else "A"
    with (
        as_file(files("erk_guid") / "data" / "tree.npz") as path,
        np.load(path, allow_pickle=False) as data,
    ):
        weights, means, covariances = (
            torch.from_numpy(data[f"{name}_{which}"]) for name in ("phi", "mu", "Sigma")
        )
    return GaussianMixture(weights, means, covariances)
