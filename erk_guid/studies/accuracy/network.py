"""A network as a problem: its own fine solution stands for the exact one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.denoisers import guided_denoiser, in_batches
from erk_guid.generation.images import check_networks, draw
from erk_guid.generation.seeds import SeededNoise
from erk_guid.models.networks import Network
from erk_guid.studies.accuracy.problems import Problem, solve_finely


def network_problem(
    name: str,
    net: Network,
    seeds: Sequence[int],
    *,
    gnet: Network | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    class_idx: int | None = None,
    batch: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    dtype: torch.dtype = torch.float32,
    fine: int = 256,
) -> Problem:
    """Return the problem of some seeds, solved by `fine` evaluations of DEIS of order 4.

    Args:
        name: name for the table.
        net, seeds, gnet, class_idx: see `erk_guid.generate`.
        guidance: strength of model guidance; with 1 `gnet` is not run.
        guidance_interval: where it acts, see `erk_guid.ModelGuidance`.
        batch: images at a time.
        sigma_min, sigma_max: range of the noise levels.
        dtype: dtype of the sampling loop.
        fine: evaluations of the solution that stands for the exact one.
    """
    check_networks(net, gnet, class_idx)
    random = SeededNoise(seeds, next(net.parameters()).device)
    noise, labels = draw(net, random, class_idx)
    start = sigma_max * noise.to(dtype)
    # The samplers get all samples at once, the network gets `batch` of them.
    guided = guided_denoiser(net, gnet, guidance, guidance_interval)
    denoiser = in_batches(guided, labels, batch)
    with tqdm(total=fine, desc="Fine solution", unit="evaluation") as bar:

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            bar.update()
            return denoiser(x, sigma)

        end = solve_finely(counted, start, sigma_min, sigma_max, fine + 1)
    return Problem(name, denoiser, start, end, sigma_min, sigma_max)
