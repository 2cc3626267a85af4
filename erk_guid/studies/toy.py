"""Guidance on the 2-D tree, where everything is known: our version of the paper's figure 1.

Four things are computed, and drawn by `draw_toy`:

- **stiffness**: the largest |eigenvalue| of the drift's Jacobian over the plane, exactly;
- **drift**: its two components along a line across the stiffest place that the data reach, and
  across the calmest one; each line follows that place's dominant eigenvector;
- **trajectories** of a few points: plain Heun, the published guidance, the parameter-free form, and
  the exact solution;
- **local error**: distance to the exact solution after one step from it, over the noise levels,
  for the same three.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.common.files import OWN
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.mixtures import GaussianMixture, tree_mixture
from erk_guid.sampling import sample
from erk_guid.schedules import karras_sigmas
from erk_guid.solvers import DEIS, Heun, Solver
from erk_guid.studies.fitting.sweep import Task, fine_path, step_errors

SIGMA_MAX = 5.0
"""Start of the toy experiments; the tree's classes have long merged at this noise level."""
SUBSTEPS = 32
"""Substeps of the exact solution inside each step."""
FINE = DEIS(order=4, deis_mode="rhoab")
"""The solver of the exact solution."""


@dataclass(frozen=True)
class Kind:
    """A sampler that is compared: its name, settings, and colour."""

    name: str
    guidance: Guidance
    colour: str


def kinds(w_stiff: float, w_con: float) -> list[Kind]:
    """Return plain Heun, the published form with these settings, and the parameter-free form."""
    return [
        Kind("plain", ERKGuidance(), "#dc2626"),
        Kind(f"ERK {w_stiff:g}/{w_con:g}", ERKGuidance(w_stiff, w_con), "#d97706"),
        Kind("ERK auto", ParameterFreeGuidance(), "#2563eb"),
    ]


@dataclass(frozen=True)
class Toy:
    """The numbers behind the figure; `arrays` has them by name.

    Attributes:
        sigma: noise level of the map and of the lines.
        kinds: what is compared.
        arrays: float64; map_x, map_y [G], stiffness [G, G], density [G, G] (log, of the noisy
            data); for `stiff` and `calm`: {}_place [2], {}_eigenvector [2], {}_eigenvalue [],
            line [L], {}_drift [L, 2] (along the eigenvector, and across it); sigmas [S],
            exact [S, P, 2], path_{k} [S, P, 2], local_error_{k} [S - 1] for each kind k.
    """

    sigma: float
    kinds: list[Kind]
    arrays: dict[str, Tensor]


def compute_toy(
    steps: int = 8,
    w_stiff: float = 0.5,
    w_con: float = 0.5,
    sigma: float = 0.1,
    paths: int = 24,
    samples: int = 400,
    grid: int = 120,
    seed: int = 0,
) -> Toy:
    """Compute the numbers behind the figure.

    Args:
        steps: noise levels of the trajectories, from 5 to 0.002.
        w_stiff, w_con: settings of the published guidance, see `ERKGuidance`.
        sigma: noise level of the map and of the lines.
        paths: trajectories that are kept.
        samples: trajectories that errors are averaged over, at least `paths`.
        grid: points of the map along each axis.
        seed: seed of the start points.
    """
    tree = tree_mixture()
    generator = torch.Generator().manual_seed(seed)
    start = starts(tree, samples, generator)
    sigmas = levels(steps)
    compared = kinds(w_stiff, w_con)
    arrays = _map(tree, sigma, grid, generator)
    arrays |= _lines(tree, sigma, arrays)
    task = Task(tree, start, None, sigmas, len(start))
    exact = fine_path(task, SUBSTEPS, FINE)
    arrays |= {"sigmas": sigmas, "exact": exact[:, :paths]}
    for k, kind in enumerate(compared):
        path = path_of(tree, start, sigmas, Heun(), kind.guidance)
        arrays[f"path_{k}"] = path[:, :paths]
        arrays[f"error_{k}"] = (path - exact).norm(dim=2).mean(1)
    planned = Heun().plan(sigmas.tolist())
    local = step_errors(task, planned, [kind.guidance for kind in compared], exact).mean(dim=2)
    arrays |= {f"local_error_{k}": errors for k, errors in enumerate(local)}
    return Toy(sigma, compared, arrays)


def starts(tree: GaussianMixture, count: int, generator: torch.Generator) -> Tensor:
    """Draw points of the noisy data at the highest noise level, float64 [count, 2]."""
    noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return tree.sample(count, generator) + SIGMA_MAX * noise


def levels(steps: int) -> Tensor:
    """Return the noise levels of a trajectory, from `SIGMA_MAX` to the last one above 0."""
    return karras_sigmas(steps, sigma_max=SIGMA_MAX)[:-1]


def path_of(
    tree: GaussianMixture, x: Tensor, sigmas: Tensor, solver: Solver, guidance: Guidance
) -> Tensor:
    """Return x at each of the noise levels, [S, N, 2]."""
    points = [x]
    sample(
        tree, x, sigmas, solver=solver, guidance=guidance,
        callback=lambda info: points.append(info.x),
    )  # fmt: skip
    return torch.stack(points)


def _map(
    tree: GaussianMixture, sigma: float, grid: int, generator: torch.Generator
) -> dict[str, Tensor]:
    drawn = tree.sample(4000, generator)
    low, high = drawn.amin(0) - 0.1, drawn.amax(0) + 0.1
    x, y = (torch.linspace(float(low[k]), float(high[k]), grid).double() for k in (0, 1))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    values = torch.linalg.eigvalsh(tree.drift_jacobian(points, sigma))
    return {
        "map_x": x, "map_y": y,
        "stiffness": values.abs().amax(1).reshape(grid, grid),
        "density": tree.log_density(points, sigma).reshape(grid, grid),
    }  # fmt: skip


def _lines(tree: GaussianMixture, sigma: float, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the drift across the stiffest place that the data reach, and across the calmest."""
    x, y = torch.meshgrid(arrays["map_x"], arrays["map_y"], indexing="xy")
    points = torch.stack([x, y], dim=-1).reshape(-1, 2)
    stiffness, density = arrays["stiffness"].flatten(), arrays["density"].flatten()
    reached = density > density.max() - 4  # within e^4 of the densest place
    infinity = torch.full_like(stiffness, torch.inf)
    line = torch.linspace(-3, 3, 241, dtype=torch.float64) * sigma
    found = {"line": line}
    for name, place in (
        ("stiff", torch.where(reached, stiffness, -infinity).argmax()),
        ("calm", torch.where(reached, stiffness, infinity).argmin()),
    ):
        at = points[place]
        values, vectors = torch.linalg.eigh(tree.drift_jacobian(at[None], sigma)[0])
        dominant = int(values.abs().argmax())
        axes = vectors[:, [dominant, 1 - dominant]]
        along = at + line[:, None] * axes[:, 0]
        drift = (along - tree(along, sigma)) / sigma
        found |= {
            f"{name}_place": at, f"{name}_eigenvector": axes[:, 0],
            f"{name}_eigenvalue": values[dominant], f"{name}_drift": drift @ axes,
        }  # fmt: skip
    return found


def draw_toy(toy: Toy) -> bytes:
    """Draw the figure and return it as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "the figure") from error
    data = {name: value.numpy() for name, value in toy.arrays.items()}
    settings: Any = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "font.family": "sans-serif",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11, 10), layout="constrained")
        places = figure.subplots(2, 2, height_ratios=(1.5, 1))
        _draw_map(figure, places[0, 0], toy, data, LogNorm)
        _draw_paths(places[0, 1], toy, data)
        _draw_drift(places[1, 0], toy, data)
        _draw_errors(places[1, 1], toy, data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": OWN})
    return buffer.getvalue()


STIFF, CALM = "#db2777", "#0891b2"


def _draw_map(figure: Any, axes: Any, toy: Toy, data: Any, norm: Any) -> None:
    image = axes.pcolormesh(
        data["map_x"],
        data["map_y"],
        data["stiffness"],
        norm=norm(),
        cmap="magma",
        shading="gouraud",
    )
    density = data["density"]
    axes.contour(
        data["map_x"], data["map_y"], density, levels=[density.max() - 4], colors="white",
        linewidths=0.8,
    )  # fmt: skip
    for name, colour in (("stiff", STIFF), ("calm", CALM)):
        place, direction = data[f"{name}_place"], data[f"{name}_eigenvector"]
        ends = place + direction * data["line"][[0, -1], None]
        axes.plot(*ends.T, color=colour, linewidth=2.5)
        axes.plot(*place, "o", color=colour, markeredgecolor="white")
    axes.set_aspect("equal")
    axes.set_title(f"Stiffness at sigma = {toy.sigma:g}", loc="left")
    axes.set_xlabel("dashed: where the noisy data lie; the two lines: see below")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(
        image, ax=axes, label="largest |eigenvalue| of the drift's Jacobian", location="bottom"
    )


def _draw_drift(axes: Any, toy: Toy, data: Any) -> None:
    for name, colour, title in (("stiff", STIFF, "stiff place"), ("calm", CALM, "calm place")):
        eigenvalue = float(data[f"{name}_eigenvalue"])
        along, across = data[f"{name}_drift"].T
        axes.plot(data["line"], along, color=colour, label=f"{title}, λ = {eigenvalue:.3g}")
        axes.plot(data["line"], across, color=colour, linestyle=":", linewidth=1)
    axes.set_title("Drift across the two places", loc="left")
    axes.set_xlabel("distance along the dominant eigenvector (dotted: drift across)")
    axes.legend(frameon=False, fontsize=9)


def _draw_errors(axes: Any, toy: Toy, data: Any) -> None:
    for k, kind in enumerate(toy.kinds):
        axes.loglog(
            data["sigmas"][:-1], data[f"local_error_{k}"], "o-", color=kind.colour,
            label=f"{kind.name} (at the end {data[f'error_{k}'][-1]:.3g})", markersize=4,
        )  # fmt: skip
    axes.invert_xaxis()
    axes.set_title("Error of one step from the exact solution", loc="left")
    axes.set_xlabel("noise level sigma the step begins at")
    axes.legend(frameon=False, fontsize=9)


def _draw_paths(axes: Any, toy: Toy, data: Any) -> None:
    density = data["density"]
    axes.contourf(
        data["map_x"], data["map_y"], density, cmap="Greys", alpha=0.5,
        levels=[density.max() - 4, density.max() - 1, density.max() + 1],
    )  # fmt: skip
    axes.plot(*data["exact"].transpose(2, 0, 1), color="black", linewidth=1)
    for k, kind in enumerate(toy.kinds):
        path = data[f"path_{k}"].transpose(2, 0, 1)
        axes.plot(*path, color=kind.colour, linewidth=0.7)
        axes.plot(
            *path[:, -1], "o", color=kind.colour, markersize=4, linestyle="none", label=kind.name
        )
    axes.plot(*data["exact"][-1].T, "k+", markersize=8, linestyle="none", label="exact")
    axes.set_xlim(data["map_x"][0], data["map_x"][-1])
    axes.set_ylim(data["map_y"][0], data["map_y"][-1])
    axes.set_aspect("equal")
    axes.set_title(f"Trajectories, {len(data['sigmas'])} noise levels from 5", loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=9, loc="upper right")
