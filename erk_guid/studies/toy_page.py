"""The 2-D tree as a page to play with: one file, no server, nothing fetched.

All trajectories are computed here and written into the page as whole numbers, in units of
1 / `SCALE`. The page only chooses among them and draws.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.mixtures import tree_mixture
from erk_guid.solvers import DEIS, DPM2, Heun, Solver
from erk_guid.studies.fitting.sweep import Task, fine_path
from erk_guid.studies.toy import FINE, levels, path_of, starts

TEMPLATE = "toy.html"
PLACE = "__DATA__"
"""Where the numbers go in the template."""
SCALE = 400
"""The page is about 800 points wide, and the tree 2 wide: a unit is half a point or so."""
STEPS = (4, 5, 6, 8, 10, 12, 16)
STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.75, 1.0, 1.5)
EXACT_LEVELS = 25
"""Noise levels at which the exact trajectories are drawn."""
EXACT_SUBSTEPS = 12
"""Substeps of the exact solution between two of these."""
SAMPLES = 128
"""Trajectories that distances are averaged over."""
DOTS = 1000
"""Points of the data that are drawn."""


@dataclass(frozen=True)
class Sampler:
    """A solver that the page offers, and what it calls it."""

    name: str
    solver: Solver


SAMPLERS = (
    Sampler("Heun", Heun()),
    Sampler("DPM-Solver-2", DPM2()),
    Sampler("DEIS", DEIS()),
)


def page(w_con: float, paths: int, samples: int, seed: int) -> str:
    """Return the page, HTML.

    Args:
        w_con: the gate's threshold of the published guidance.
        paths: trajectories that are drawn.
        samples: trajectories that distances are averaged over, at least `paths`.
        seed: seed of the start points.
    """
    template = (files("erk_guid.studies") / TEMPLATE).read_text(encoding="utf-8")
    data = json.dumps(numbers(w_con, paths, samples, seed), separators=(",", ":"))
    return template.replace(PLACE, data)


def numbers(w_con: float, paths: int, samples: int, seed: int) -> dict[str, Any]:
    """Return what the page draws, in JSON's types; arguments as for `page`.

    Points are flat lists x, y, x, y, ... in units of 1 / `SCALE`; a trajectory follows the other.
    """
    tree = tree_mixture()
    generator = torch.Generator().manual_seed(seed)
    start = starts(tree, samples, generator)
    exact = fine_path(
        Task(tree, start, None, levels(EXACT_LEVELS), samples), EXACT_SUBSTEPS, FINE
    )  # fmt: skip

    def run(solver: Solver, steps: int, guidance: Guidance) -> dict[str, Any]:
        path = path_of(tree, start, levels(steps), solver, guidance)
        apart = (path[-1] - exact[-1]).norm(dim=1).mean()
        return {"path": _flat(path[:, :paths]), "distance": float(f"{float(apart):.3g}")}

    def strengths(solver: Solver, steps: int) -> list[dict[str, Any]]:
        return [run(solver, steps, ERKGuidance(w, w_con)) for w in STRENGTHS]

    return {
        "scale": SCALE,
        "steps": STEPS,
        "strengths": STRENGTHS,
        "w_con": w_con,
        "samples": samples,
        "dots": _flat(tree.sample(DOTS, generator)[None]),
        "exact": {"levels": EXACT_LEVELS, "path": _flat(exact[:, :paths])},
        "samplers": [
            {
                "name": each.name,
                "evaluations": [(2 if each.solver.two_stages else 1) * (n - 1) for n in STEPS],
                "published": [strengths(each.solver, n) for n in STEPS],
                "auto": [run(each.solver, n, ParameterFreeGuidance()) for n in STEPS]
                if each.solver.two_stages
                else None,
            }
            for each in SAMPLERS
        ],
    }


def _flat(path: Tensor) -> list[int]:
    """Return [S, P, 2] as a flat list, one trajectory after the other."""
    found: list[int] = (path.transpose(0, 1) * SCALE).round().long().flatten().tolist()
    return found
