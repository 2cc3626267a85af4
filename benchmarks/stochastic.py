"""How near do samplers with noise come to the distribution, and which variance do they give?

Energy distance (times 1000) and error of the standard deviations on three Gaussian mixtures in 2, 4
and 16 dimensions, against k-diffusion's Euler ancestral and DPM-Solver++ 2M SDE and diffusers'
SA-Solver; and the standard deviation that modal gives Gaussians of sizes from 0.01 to 10, exactly.
These are the tables of docs/stochastic.md.

    pip install --no-deps k-diffusion
    python benchmarks/stochastic.py --outdir output/stochastic
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from common import machine
from torch import Tensor

from erk_guid import karras_sigmas, sample
from erk_guid.mixtures import GaussianMixture
from erk_guid.solvers import DPMpp, Euler, Modal, Solver

EVALUATIONS = (12, 20, 40)
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
Run = Callable[[GaussianMixture, Tensor, Tensor, torch.Generator], Tensor]


def random_mixture(dim: int, components: int, seed: int, apart: float = 1.0) -> GaussianMixture:
    """Return Gaussians with standard deviations from 0.5 to 0.02, their axes rotated at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    means = apart * draw(components, dim)
    axes = torch.linalg.qr(draw(components, dim, dim))[0]
    variances = torch.logspace(-0.3, -1.7, dim, dtype=torch.float64).square()
    weights = torch.rand(components, dtype=torch.float64, generator=generator) + 0.3
    return GaussianMixture(weights, means, axes * variances @ axes.transpose(1, 2))


MIXTURES: dict[str, Callable[[], GaussianMixture]] = {
    "3 Gaussians, 2 dimensions": lambda: random_mixture(2, 3, 3),
    "5 Gaussians, 4 dimensions": lambda: random_mixture(4, 5, 1),
    "8 Gaussians, 16 dimensions": lambda: random_mixture(16, 8, 2, 0.6),
}


def randn(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def ours(solver: Solver) -> Run:
    return lambda mixture, x, sigmas, generator: sample(
        mixture, x, sigmas, solver=solver, randn_like=randn(generator)
    )


def k_diffusion(name: str, eta: float) -> Run:
    """Return one of k-diffusion's own functions."""
    function = getattr(_k_diffusions_samplers(), name)

    def run(mixture: GaussianMixture, x: Tensor, sigmas: Tensor, generator: Any) -> Tensor:
        found: Tensor = function(
            lambda x, sigma: mixture(x, sigma[0]), x, sigmas, disable=True, eta=eta,
            noise_sampler=lambda *_: randn(generator)(x),
        )  # fmt: skip
        return found

    return run


@cache
def _k_diffusions_samplers() -> Any:
    """Import k_diffusion.sampling without what its other modules need."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("k-diffusion is missing: pip install --no-deps k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    others = {"torchdiffeq", "torchsde"} - set(sys.modules)  # its other samplers' needs
    sys.modules.update({name: types.SimpleNamespace(odeint=None) for name in others})  # type: ignore[misc]
    found = importlib.import_module("k_diffusion.sampling")
    for name in others:
        del sys.modules[name]
    return found


def sa_solver(mixture: GaussianMixture, x: Tensor, sigmas: Tensor, generator: Any) -> Tensor:
    """Run diffusers' SA-Solver (its default orders, 2 and 2; tau 1) over our noise levels."""
    from diffusers import SASolverScheduler

    scheduler: Any = SASolverScheduler(prediction_type="sample", tau_func=lambda t: 1.0)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    y = x / (1 + sigmas[0] ** 2).sqrt()
    for sigma, time in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        output = mixture(y * (1 + sigma**2).sqrt(), sigma)
        y = scheduler.step(output, time, y, generator=generator).prev_sample.double()
    return y * (1 + sigmas[-1] ** 2).sqrt()


def methods() -> dict[str, Run]:
    found: dict[str, Run] = {}
    for eta in (0.0, 0.5, 0.75, 1.0):
        found[f"modal, eta {eta:g}"] = ours(Modal(eta=eta))
    found["modal order 2, eta 1"] = ours(Modal(2, eta=1.0))  # order 3 is order 4, at eta 1
    found["dpmpp 3, eta 0.5"] = ours(DPMpp(3, eta=0.5))
    found["dpmpp 3, eta 1"] = ours(DPMpp(3, eta=1.0))
    for eta in (0.5, 1.0):
        found[f"DPM++ 2M SDE, eta {eta:g} (k-diffusion)"] = k_diffusion("sample_dpmpp_2m_sde", eta)
    for eta in (0.5, 1.0):
        found[f"Euler ancestral, eta {eta:g} (k-diffusion)"] = k_diffusion(
            "sample_euler_ancestral", eta
        )
    found["SA-Solver, tau 1 (diffusers)"] = sa_solver
    return found


def measure(name: str, num: int, draws: int) -> tuple[list[str], dict[str, list[float]]]:
    """Return the rows of a mixture's table, and all distances, which are paired by draw."""
    mixture = MIXTURES[name]()
    runs = methods()
    distances = {(m, n): [] for m in runs for n in EVALUATIONS}  # type: ignore[var-annotated]
    deviations = {(m, n): [] for m in runs for n in EVALUATIONS}  # type: ignore[var-annotated]
    floor = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(1000 + seed)
        clean, other, start = (mixture.sample(num, generator) for _ in range(3))
        x = start + 80 * randn(generator)(start)
        within = torch.pdist(clean).mean()
        floor.append(_energy(other, clean, within))
        for n in EVALUATIONS:
            sigmas = karras_sigmas(n + 1)[:-1]
            for method, run in runs.items():
                end = run(mixture, x, sigmas, torch.Generator().manual_seed(seed))
                distances[method, n].append(_energy(end, clean, within))
                ratio = end.std(dim=0) / start.std(dim=0)
                deviations[method, n].append(float((ratio - 1).abs().max()))
    heads = " | ".join(map(str, EVALUATIONS))
    lines = [
        f"| {name}: evaluations | {heads} | largest error of a standard deviation: {heads} |",
        "|---|" + "---:|" * (2 * len(EVALUATIONS)),
        f"| draws of the mixture itself | {_mean(floor)} |" + " |" * (2 * len(EVALUATIONS) - 1),
    ]
    for method in runs:
        cells = [_mean(distances[method, n]) for n in EVALUATIONS]
        cells += [f"{100 * sum(deviations[method, n]) / draws:.1f} %" for n in EVALUATIONS]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines, {f"{method}: {n}": values for (method, n), values in distances.items()}


def _energy(a: Tensor, b: Tensor, within_b: Tensor) -> float:
    return 1000 * float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - within_b)


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:.2f} ({spread:.2f})"


def deviation(solver: Solver, size: float, sigmas: Tensor) -> float:
    """Return the standard deviation that a solver gives data of one size, over the right one.

    The run is linear: the columns are what the start and each step's noise come to.
    """
    columns = torch.eye(len(sigmas) + 1, dtype=torch.float64)
    drawn = iter(columns[1:, None])
    start = columns[:1] * math.hypot(size, float(sigmas[0]))
    end = sample(
        lambda x, s: x * size**2 / (size**2 + s**2), start, sigmas,
        solver=solver, randn_like=lambda x: next(drawn),
    )  # fmt: skip
    return float(end.norm()) / math.hypot(size, float(sigmas[-1]))


def variances() -> list[str]:
    """Return the rows of the table of standard deviations."""
    lines = [
        "| standard deviation of the data | " + " | ".join(f"{s:g}" for s in SIZES) + " |",
        "|---|" + "---:|" * len(SIZES),
    ]
    rows: list[tuple[str, Solver]] = [
        *((f"modal, eta {eta:g}", Modal(eta=eta)) for eta in (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("modal order 2, eta 1", Modal(2, eta=1.0)),
        ("dpmpp 2, eta 1 (2M SDE)", DPMpp(2, lower_order_final=False, eta=1.0)),
        ("euler, eta 1 (ancestral)", Euler(1.0)),
    ]
    for name, solver in rows:
        for n in EVALUATIONS:
            sigmas = karras_sigmas(n + 1)[:-1]
            cells = [f"{deviation(solver, size, sigmas):.3f}" for size in SIZES]
            lines.append(f"| {name}: {n} evaluations | " + " | ".join(cells) + " |")
    return lines


def variances_at_usual_levels() -> list[str]:
    """Return the same on levels of diffusers, whose last step above 0 is far longer than others."""
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    levels: dict[str, Tensor] = {}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for spacing in ("linspace", "leading"):
        for n in (20, 50):
            theirs: Any = EulerDiscreteScheduler(**betas, timestep_spacing=spacing, steps_offset=1)
            theirs.set_timesteps(n)
            levels[f"betas, {spacing}: {n} evaluations"] = theirs.sigmas.double()
    flow: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(20)
    times = flow.sigmas.double().clamp(max=0.999)
    levels["flow, shift 3: 20 evaluations"] = times / (1 - times)
    sizes = (0.1, 0.3, 0.5, 1.0, 3.0)
    solvers: list[tuple[str, Solver]] = [
        *((f"modal, eta {eta:g}", Modal(eta=eta)) for eta in (0.0, 0.5, 0.75, 1.0)),
        ("modal order 2, eta 1", Modal(2, eta=1.0)),
        ("dpmpp 2, eta 1 (2M SDE)", DPMpp(2, lower_order_final=False, eta=1.0)),
    ]
    lines = [
        "| levels | | " + " | ".join(f"{size:g}" for size in sizes) + " |",
        "|---|---|" + "---:|" * len(sizes),
    ]
    for where, sigmas in levels.items():
        for name, solver in solvers:
            cells = [f"{deviation(solver, size, sigmas):.3f}" for size in sizes]
            lines.append(f"| {where} | {name} | " + " | ".join(cells) + " |")
    return lines


@click.command(help=__doc__)
@click.option("--outdir", default=Path("output/stochastic"), type=click.Path(path_type=Path))
@click.option("--num", default=4000, show_default=True, help="Samples of a run.")
@click.option("--draws", default=8, show_default=True, help="Runs, each with its own samples.")
def main(outdir: Path, num: int, draws: int) -> None:
    print(machine())
    parts, raw = [variances(), variances_at_usual_levels()], {}
    print("\n\n".join("\n".join(part) for part in parts), flush=True)
    for name in MIXTURES:
        lines, raw[name] = measure(name, num, draws)
        parts.append(lines)
        print("\n".join(["", *parts[-1]]), flush=True)
        outdir.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join("\n".join(part) for part in parts) + "\n"
        (outdir / "stochastic.md").write_text(text)
        (outdir / "stochastic.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
