"""Problems whose solution is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser
from erk_guid.mixtures import GaussianMixture, tree_mixture
from erk_guid.sampling import sample
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import DEIS

SIGMA_MIN = 0.002
FINE_LEVELS = 1001
"""Levels of the solution that mixtures are compared with. Half as many move it by under 1e-8."""


@dataclass(frozen=True)
class Problem:
    """A denoiser, start points, and the end points that the ODE leads to.

    Attributes:
        name: name of the problem.
        denoiser: see `erk_guid.Denoiser`.
        start: x at sigma_max, [N, ...].
        end: x at sigma_min, like start.
        sigma_min, sigma_max: the range of the noise levels.
    """

    name: str
    denoiser: Denoiser
    start: Tensor
    end: Tensor
    sigma_min: float
    sigma_max: float


def solve_finely(
    denoiser: Denoiser, start: Tensor, sigma_min: float, sigma_max: float, levels: int
) -> Tensor:
    """Return the end points by exact-weights DEIS of order 4, which is no compared method."""
    sigmas = make_sigmas("polynomial", levels, sigma_min, sigma_max, 7)[:-1]
    return sample(denoiser, start, sigmas, solver=DEIS(4, "rhoab"))


def mixture_problem(
    name: str, mixture: GaussianMixture, count: int, seed: int, sigma_max: float
) -> Problem:
    """Return the problem of draws from the mixture plus noise of sigma_max, solved finely."""
    generator = torch.Generator().manual_seed(seed)
    clean = mixture.sample(count, generator)
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    start = clean + sigma_max * noise
    end = solve_finely(mixture, start, SIGMA_MIN, sigma_max, FINE_LEVELS)
    return Problem(name, mixture, start, end, SIGMA_MIN, sigma_max)


def gaussian_problem(count: int, seed: int) -> Problem:
    """Return independent Gaussians of five sizes, whose solution is known in closed form."""
    stds = torch.tensor([1, 0.5, 0.2, 0.05, 0.01], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(count, len(stds), dtype=torch.float64, generator=generator)
    one = GaussianMixture(torch.ones(1), torch.zeros(1, len(stds)), stds.square().diag()[None])
    start, end = (unit * (stds**2 + sigma**2).sqrt() for sigma in (80.0, SIGMA_MIN))
    return Problem("gauss", one, start, end, SIGMA_MIN, 80.0)


def high_dimensional_mixture(dim: int = 64, components: int = 20) -> GaussianMixture:
    """Return twenty Gaussians in 64 dimensions, with the falling spectra that images have.

    Axes are rotated at random for each component. Standard deviations fall as 1 / k from 0.5,
    and so do those of the means.
    """
    generator = torch.Generator().manual_seed(0)
    stds = 0.5 / torch.arange(1, dim + 1, dtype=torch.float64)
    drawn = torch.randn(components, dim, dim, dtype=torch.float64, generator=generator)
    axes = torch.linalg.qr(drawn)[0]
    covariances = axes * stds**2 @ axes.transpose(1, 2)
    means = torch.randn(components, dim, dtype=torch.float64, generator=generator) * stds
    weights = torch.rand(components, dtype=torch.float64, generator=generator) + 0.2
    return GaussianMixture(weights, means, covariances)


def discrete_set(dim: int = 16, points: int = 64) -> GaussianMixture:
    """Return an empirical distribution: 64 points without width in 16 dimensions, off the origin.

    The denoiser jumps from one point to another where both are about equally far. A sample that
    ends at another point than the exact solution is off by the distance between the two.
    """
    generator = torch.Generator().manual_seed(0)
    stds = 0.5 / torch.arange(1, dim + 1, dtype=torch.float64)
    means = torch.randn(points, dim, dtype=torch.float64, generator=generator) * stds + 0.3
    return GaussianMixture(
        torch.ones(points, dtype=torch.float64), means,
        torch.zeros(points, dim, dim, dtype=torch.float64),
    )  # fmt: skip


def wide_mixture(dim: int = 16, components: int = 6) -> GaussianMixture:
    """Return six Gaussians far off the origin, each with standard deviations from 1 to 0.001.

    The covariances' condition number is 1e6. Axes are rotated at random.
    """
    generator = torch.Generator().manual_seed(0)
    stds = torch.logspace(0, -3, dim, dtype=torch.float64)
    drawn = torch.randn(components, dim, dim, dtype=torch.float64, generator=generator)
    axes = torch.linalg.qr(drawn)[0]
    means = 3 + torch.randn(components, dim, dtype=torch.float64, generator=generator)
    weights = torch.ones(components, dtype=torch.float64)
    return GaussianMixture(weights, means, axes * stds**2 @ axes.transpose(1, 2))


PROBLEMS: dict[str, Callable[[int, int], Problem]] = {
    "tree5": lambda n, seed: mixture_problem("tree5", tree_mixture(), n, seed, 5.0),
    "tree80": lambda n, seed: mixture_problem("tree80", tree_mixture(), n, seed, 80.0),
    "gauss": gaussian_problem,
    "mixture64": lambda n, seed: mixture_problem(
        "mixture64", high_dimensional_mixture(), n, seed, 80.0
    ),
    "wide": lambda n, seed: mixture_problem("wide", wide_mixture(), n, seed, 80.0),
    "discrete": lambda n, seed: mixture_problem("discrete", discrete_set(), n, seed, 80.0),
}
"""Exact problems by name: the 2-D tree from sigma = 5 and from 80, independent Gaussians, a mixture
in 64 dimensions, one off the origin with condition numbers of a million, and a discrete set of
points. Each is called with a number of points and a seed."""


def make_problem(name: str, count: int = 200, seed: int = 0) -> Problem:
    """Return one of `PROBLEMS`.

    Raises:
        ValueError: there is no problem of that name.
    """
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; known: {', '.join(PROBLEMS)}")
    return PROBLEMS[name](count, seed)
