"""Problems with known solutions that several tests use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erk_guid.schedules import logsnr_sigmas
from erk_guid.solvers import Memory, make_solver


class Mixture:
    """The golden file's problem: isotropic Gaussians, the denoiser is the posterior mean."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.mu = data["mu"].flatten(1)
        self.std, self.weight = data["std"], data["weight"]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        variance = self.std**2 + sigma**2
        apart = flat[:, None] - self.mu
        log_p = self.weight.log() - self.mu.shape[1] / 2 * variance.log()
        p = (log_p - 0.5 * apart.square().sum(2) / variance).softmax(1)
        means = self.mu + (self.std**2 / variance)[:, None] * apart
        return torch.einsum("nk,nkd->nd", p, means).reshape(x.shape)


# In one dimension the flow carries quantiles along: x(sigma) = F_sigma^-1(F_sigma0(x0)). So the
# exact solution of a nonlinear problem is had without integrating anything.
MEANS = torch.tensor([-1.0, 0.5, 1.2], dtype=torch.float64)


STDS = torch.tensor([0.3, 0.4, 0.2], dtype=torch.float64)


SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    variance = STDS**2 + sigma**2
    log_p = SHARES.log() - 0.5 * variance.log() - 0.5 * (x - MEANS) ** 2 / variance
    means = MEANS + STDS**2 / variance * (x - MEANS)
    return (log_p.softmax(1) * means).sum(1, keepdim=True)


def cdf(x: torch.Tensor, sigma: float) -> torch.Tensor:
    z = (x - MEANS) / (STDS**2 + sigma**2).sqrt()
    return (SHARES * torch.special.ndtr(z)).sum(1, keepdim=True)


def carried(x0: torch.Tensor, begin: float, sigma: float) -> torch.Tensor:
    """The exact x at `sigma`, by bisection."""
    wanted = cdf(x0, begin)
    low, high = torch.full_like(x0, -50.0), torch.full_like(x0, 50.0)
    for _ in range(100):
        middle = (low + high) / 2
        below = cdf(middle, sigma) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


BEGIN, END = 3.0, 0.2


def error_after(steps: int, name: str, options: dict[str, Any]) -> float:
    x0 = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    levels = logsnr_sigmas(steps + 1, END, BEGIN)[:-1]
    solver = make_solver(name, **options)
    planned = solver.plan(levels)
    exact = [carried(x0, BEGIN, level) for level in levels[:4].tolist()]
    predict_x0 = options.get("predict_x0", name in ("dpmpp", "unipc", "modal", "res"))

    def value(k: int) -> torch.Tensor:
        denoised = denoise(exact[k], levels[k])
        return denoised if predict_x0 else (exact[k] - denoised) / levels[k]

    # Exact starting values: one Euler start would limit every method to order 2.
    first = options.get("order", 1) - 1
    memory: Memory | None = None
    if first:
        # Predictor-correctors keep the evaluation at x too.
        newest = first if name in ("unipc", "modal") else first - 1
        memory = Memory(exact[first - 1], tuple(value(k) for k in range(newest, -1, -1)))
    x = exact[first]
    for step in planned[first:]:
        result, memory = step(denoise, x, memory)
        x = result.x
    return float((x - carried(x0, BEGIN, END)).abs().max())


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of normal data with standard deviation 0.5."""
    return x * 0.25 / (0.25 + sigma**2)


def reusing(denoiser: Any) -> Any:
    """The denoiser, but returning one and the same tensor each time, as CUDA graphs do."""
    kept: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor, *more: Any) -> Tensor:
        found = denoiser(x, sigma, *more)
        if not kept:
            kept.append(found.clone())
        return kept[0].copy_(found)

    return denoise
