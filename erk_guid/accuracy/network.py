"""A network as a problem: its own fine solution stands for the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.accuracy.problems import Problem, solve_finely
from erk_guid.denoisers import Denoiser, ModelGuidance
from erk_guid.generation import generate


class _Batched:
    """A network with each sample's label, called on all samples, `size` at a time."""

    def __init__(self, net: Any, labels: Tensor | None, size: int) -> None:
        self.net, self.labels, self.size = net, labels, size

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        parts = []
        for i in range(0, len(x), self.size):
            chosen = slice(i, i + self.size)
            labels = None if self.labels is None else self.labels[chosen]
            parts.append(self.net(x[chosen], sigma, labels).to(x.dtype))
        return torch.cat(parts)


def network_problem(
    name: str,
    net: Any,
    seeds: Sequence[int],
    *,
    gnet: Any = None,
    guidance: float = 1.0,
    class_idx: int | None = None,
    batch: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    dtype: torch.dtype = torch.float32,
    fine: int = 256,
) -> Problem:
    """The images of some seeds, and where `fine` evaluations of DEIS of order 4 take them.

    Args:
        name: for the table.
        net, seeds, gnet, class_idx: see `erk_guid.generate`.
        guidance: strength of model guidance; with 1 `gnet` is not run.
        batch: images at a time.
        sigma_min, sigma_max: the range.
        dtype: of the sampling loop.
        fine: evaluations of the solution that stands for the exact one.
    """

    def only_noise(net: Any, noise: Tensor, **options: Any) -> Tensor:
        return noise

    (drawn,) = generate(
        net, seeds, class_idx=class_idx, batch_size=len(seeds), sampler_fn=only_noise
    )
    denoiser: Denoiser = _Batched(net, drawn.labels, batch)
    if guidance != 1 and gnet is not None:
        denoiser = ModelGuidance(denoiser, _Batched(gnet, drawn.labels, batch), guidance)
    start = sigma_max * drawn.noise.to(dtype)
    with tqdm(total=fine, desc="Fine solution", unit="evaluation") as bar:

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            bar.update()
            return denoiser(x, sigma)

        end = solve_finely(counted, start, sigma_min, sigma_max, fine + 1)
    return Problem(name, denoiser, start, end, sigma_min, sigma_max)
