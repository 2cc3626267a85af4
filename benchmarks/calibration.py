"""Measure an exhaustive grid of settings on the shipped model, to check `calibrate` against.

    python benchmarks/calibration.py --out=tests/data/calibration.npz

Twelve values of w_stiff by eight of w_con, at 6, 8 and 12 steps, on images that `calibrate` does
not search on, against a fine solution by DEIS. Takes about 45 minutes on one core. All settings
run at once (`erk_guid.studies.fitting.sweep`); a test checks that separate runs give the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

import erk_guid
from erk_guid.common.files import replacing
from erk_guid.denoisers import in_batches
from erk_guid.generation.images import draw
from erk_guid.generation.seeds import SeededNoise
from erk_guid.solvers import Heun
from erk_guid.studies.accuracy.problems import solve_finely
from erk_guid.studies.fitting.sweep import Task, distances

W_STIFF = (0.2, 0.3, 0.408, 0.5, 0.6, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5)
W_CON = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0)
STEPS = (6, 8, 12)
FIRST_SEED = 10000
BATCH = 32
FINE = 256
"""Evaluations of the fine solution."""


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--num", type=click.IntRange(min=2), default=256, show_default=True)
def main(out: Path, num: int) -> None:
    """Write the fine end points, the errors of the plain solver and of the best of the grid."""
    net = erk_guid.load("digits").net
    seeds = list(range(FIRST_SEED, FIRST_SEED + num))
    noise, labels = draw(net, SeededNoise(seeds, torch.device("cpu")), None)
    x = 80 * noise
    end = solve_finely(in_batches(net, labels, BATCH), x, 0.002, 80, FINE + 1)
    arrays: dict[str, Any] = {"seeds": np.asarray(seeds), "ends": end.numpy().astype(np.float16)}
    settings = [erk_guid.ERKGuidance(s, c) for s in W_STIFF for c in W_CON]
    for steps in tqdm(STEPS, unit="step count"):
        sigmas = erk_guid.karras_sigmas(steps)[:-1]
        task = Task(net, x, labels, sigmas, BATCH)
        found = distances(
            task, Heun().plan(sigmas.tolist()), [erk_guid.ERKGuidance(), *settings], end
        ).values.numpy()
        plain, grid = found[0], found[1:]
        means = grid.mean(axis=1)
        best = int(means.argmin())
        g = settings[best]
        print(f"{steps} steps: best {g.w_stiff:g}/{g.w_con:g}, {means[best] / plain.mean():.4f}")
        arrays |= {
            f"plain_{steps}": plain,
            f"best_{steps}": grid[best],
            f"setting_{steps}": np.asarray([g.w_stiff, g.w_con]),
            f"grid_{steps}": means.reshape(len(W_STIFF), len(W_CON)),
        }
    with replacing(out) as partial:
        np.savez_compressed(partial, **arrays)


if __name__ == "__main__":
    main()
