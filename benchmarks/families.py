"""Fitted noise levels on exact problems, and on networks of three families trained here.

The networks are small and seeded: an EDM network (denoiser, EDM's preconditioning and loss) on
8x8 pictures of blobs, a VP network that predicts noise on curves in 16 dimensions, and a flow
network that predicts velocity on the same blobs. Each takes a minute or two on two cores.

    python benchmarks/families.py [--evaluations 6,8,10,14] [--solver best] [--outdir DIR]

Every fit is judged on new samples, that neither its search nor its report saw: its error over that
of the best published solver, and of its own solver, with the better of the usual spacings.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from erk_guid import VP, Process, RectifiedFlow, sample
from erk_guid.norms import norm
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import DEIS, IPNDMV, DPMpp, Heun, Modal, Solver, UniPC
from erk_guid.studies.accuracy import make_problem
from erk_guid.studies.fitting import fit
from erk_guid.studies.fitting.results import bootstrap_ratio
from erk_guid.studies.fitting.trials import Method

PUBLISHED: tuple[Solver, ...] = (
    Heun(), DEIS(3), DEIS(4), DEIS(2, "log"), DEIS(3, "log"), IPNDMV(3), IPNDMV(4), DPMpp(2),
    DPMpp(3), DPMpp(3, predict_x0=False), UniPC(2), UniPC(3), UniPC(3, predict_x0=False),
)  # fmt: skip
EXACT = ("wide", "mixture64", "tree80", "gauss", "discrete")
FIT_SAMPLES, NEW_SAMPLES = 128, 256
TRAINING_STEPS, TRAINING_BATCH, WIDTH = 4000, 512, 256
FINE = 400


class Net(nn.Module):
    """A multilayer perceptron that is told a noise level as sines and cosines."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, dim),
        )  # fmt: skip

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angles = level.reshape(-1, 1) * 2 ** torch.arange(8, dtype=x.dtype) * 0.3
        told = torch.cat([angles.sin(), angles.cos()], dim=1).expand(len(x), -1)
        return self.layers(torch.cat([x, told], dim=1))


def blobs(count: int, generator: torch.Generator) -> Tensor:
    """Pictures of one bright blob each: place, width and height vary; 64 values of about 0.5."""
    place = torch.rand(count, 2, 1, 1, generator=generator) * 5 + 1
    width = torch.rand(count, 1, 1, generator=generator) * 1.2 + 0.6
    grid = torch.arange(8.0)
    apart = (grid[:, None] - place[:, 0]) ** 2 + (grid[None, :] - place[:, 1]) ** 2
    return (2 * torch.exp(-apart / (2 * width**2)) - 0.5).flatten(1)


def curves(count: int, generator: torch.Generator) -> Tensor:
    """Points on three closed curves in 16 dimensions."""
    angle = torch.rand(count, 1, generator=generator) * 2 * math.pi
    which = torch.randint(3, (count, 1), generator=generator)
    k = torch.arange(16.0)
    return 0.7 * torch.sin(angle * (1 + k % 3) + k * (1 + which)) + 0.3 * (which - 1)


def trained(dim: int, loss: Callable[[Net, torch.Generator], Tensor]) -> Net:
    """Train a network by a loss; the last half of training is averaged."""
    torch.manual_seed(0)
    net, generator = Net(dim), torch.Generator().manual_seed(0)
    mean = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    for step in range(TRAINING_STEPS):
        optimizer.zero_grad()
        loss(net, generator).backward()
        optimizer.step()
        schedule.step()
        if step >= TRAINING_STEPS // 2:
            mean.update_parameters(net)
    averaged = mean.module
    assert isinstance(averaged, Net)
    return averaged.double().eval()


def edm_network() -> tuple[Callable[[Tensor, Tensor], Tensor], int, Process | None]:
    """EDM: preconditioned denoiser of blobs, log-normal noise levels."""

    def denoise(net: Net, x: Tensor, sigma: Tensor) -> Tensor:
        total = sigma**2 + 0.25
        out = net(x / total.sqrt(), sigma.log() / 4)
        return 0.25 / total * x + sigma * 0.5 / total.sqrt() * out

    def loss(net: Net, generator: torch.Generator) -> Tensor:
        clean = blobs(TRAINING_BATCH, generator)
        sigma = (torch.randn(len(clean), 1, generator=generator) * 1.4 - 1.0).exp()
        noise = torch.randn(clean.shape, generator=generator)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        return (weight * (denoise(net, clean + sigma * noise, sigma) - clean) ** 2).mean()

    net = trained(64, loss)
    return lambda x, sigma: denoise(net, x, sigma.reshape(1, 1)), 64, None


def vp_network() -> tuple[Callable[[Tensor, Tensor], Tensor], int, Process | None]:
    """VP: predicts the noise on curves; the denoised x is computed from it."""
    process = VP()

    def parts(t: Tensor) -> tuple[Tensor, Tensor]:
        exponent = process.beta_d * t**2 / 2 + process.beta_min * t
        return (-exponent / 2).exp(), (-torch.expm1(-exponent)).sqrt()

    def loss(net: Net, generator: torch.Generator) -> Tensor:
        clean = curves(TRAINING_BATCH, generator)
        t = torch.rand(len(clean), 1, generator=generator) * 0.999 + 1e-3
        noise = torch.randn(clean.shape, generator=generator)
        alpha, sigma = parts(t)
        return ((net(alpha * clean + sigma * noise, t * 4) - noise) ** 2).mean()

    net = trained(16, loss)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = parts(t)
        return (x - sigma * net(x, t.reshape(1, 1) * 4)) / alpha

    return denoiser, 16, process


def flow_network() -> tuple[Callable[[Tensor, Tensor], Tensor], int, Process | None]:
    """Flow: predicts noise minus clean on straight lines between blobs and noise."""

    def loss(net: Net, generator: torch.Generator) -> Tensor:
        clean = blobs(TRAINING_BATCH, generator)
        t = torch.sigmoid(torch.randn(len(clean), 1, generator=generator))
        noise = torch.randn(clean.shape, generator=generator)
        return ((net((1 - t) * clean + t * noise, t * 4) - (noise - clean)) ** 2).mean()

    net = trained(64, loss)
    return lambda x, t: x - t * net(x, t.reshape(1, 1) * 4), 64, RectifiedFlow()


FAMILIES = {"EDM, blobs": edm_network, "VP, curves": vp_network, "flow, blobs": flow_network}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", default="6,8,10,14")
    parser.add_argument("--solver", default="best")
    parser.add_argument("--problems", default=",".join([*FAMILIES, *EXACT]).replace(", ", "_"))
    parser.add_argument("--outdir", type=Path, default=Path("output/families"))
    args = parser.parse_args()
    args.outdir.mkdir(parents=True, exist_ok=True)
    wanted = [name.replace("_", ", ") for name in args.problems.split(",")]
    lines = [
        "| problem | evaluations | solver | spacing | best published | its error | times "
        "| times its own solver's usual | seconds |",
        "|---|---:|---|---|---|---:|---:|---:|---:|",
    ]
    with torch.no_grad():
        for name in wanted:
            for count in map(int, args.evaluations.split(",")):
                lines.append(row(name, count, args.solver))
                print(lines[-1], flush=True)
    (args.outdir / "families.md").write_text("\n".join(lines) + "\n")


MADE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Process | None]] = {}


def made(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Process | None]:
    """Return denoiser, start points and process of a problem."""
    if name not in MADE:
        if name in FAMILIES:
            with torch.enable_grad():
                denoiser, dim, process = FAMILIES[name]()
            generator = torch.Generator().manual_seed(1)
            count = FIT_SAMPLES + NEW_SAMPLES
            x = torch.randn(count, dim, dtype=torch.float64, generator=generator)
            MADE[name] = (denoiser, x * (80 if process is None else 1), process)
        else:
            problem = make_problem(name, FIT_SAMPLES + NEW_SAMPLES, 1)
            MADE[name] = (problem.denoiser, problem.start, None)
    return MADE[name]


def row(name: str, count: int, solver: str) -> str:
    """Fit, and judge on new samples."""
    denoiser, x, process = made(name)
    began = time.time()
    found = fit(
        denoiser, x[:FIT_SAMPLES], evaluations=count, solver=solver, process=process,
        batch=FIT_SAMPLES,
    )  # fmt: skip
    seconds = time.time() - began
    start = x[FIT_SAMPLES:]
    first = float(found.sigmas[0])

    def spaced(spacing: str, levels: int) -> Tensor:
        if process is None:
            return make_sigmas(spacing, levels, 0.002, first, 7)[:-1]
        if spacing == "time":
            return torch.linspace(first, process.time(0.002), levels, dtype=torch.float64)
        inner = make_sigmas(spacing, levels, 0.002, 80, 7)[1:-1].tolist()
        return torch.tensor([first, *map(process.time, inner)], dtype=torch.float64)

    def end(solver: Solver, sigmas: Tensor) -> Tensor:
        return sample(denoiser, start, sigmas, solver=solver, process=process)

    fine = spaced("polynomial", FINE)
    if process is not None:  # from pure noise, the first fine step must not be long
        fine = torch.cat([torch.linspace(first, float(fine[1]), 41, dtype=torch.float64), fine[2:]])
    exact = end(DEIS(3, "log"), fine)

    def errors(solver: Solver, sigmas: Tensor) -> Tensor:
        return norm(end(solver, sigmas) - exact)

    spacings = ["polynomial", "logsnr", *(["time"] if process is not None else [])]
    rivals = {
        f"{Method(rival)} {spacing}": errors(
            rival, spaced(spacing, Method(rival).intervals(count, False) + 1)
        )
        for rival in PUBLISHED
        for spacing in spacings
    }
    best = min(rivals, key=lambda rival: float(rivals[rival].nan_to_num(torch.inf).mean()))
    own_levels = Method(found.solver).intervals(count, False) + 1
    bare = Modal(found.solver.order) if isinstance(found.solver, Modal) else found.solver
    own = min(
        (errors(bare, spaced(spacing, own_levels)) for spacing in spacings),
        key=lambda error: float(error.nan_to_num(torch.inf).mean()),
    )
    after = errors(found.solver, found.sigmas)
    return (
        f"| {name} | {count} | {Method(bare)} | {found.spacing} | {best} | "
        f"{float(rivals[best].mean()):.3g} | {bootstrap_ratio(after, rivals[best])} | "
        f"{bootstrap_ratio(after, own)} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
