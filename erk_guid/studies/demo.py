"""Demo for a first minute: one model, six ways to spend the same few evaluations."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.common.files import write_bytes
from erk_guid.common.pictures import Panel, figure, save_picture, tile, to_pil
from erk_guid.generation.devices import choose_device
from erk_guid.generation.images import Batch, generate
from erk_guid.generation.settings import read_settings
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.models.checkpoints import load
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.solvers import Heun, Modal, Solver

PRESET = "digits"
SEEDS = range(64)
SHOWN = 10
FILES = ("demo.png", "demo.txt", "demo.json")
BEGINS = {"demo.txt": (b"Plain Heun, ",), "demo.json": (b'{\n "preset": ',)}
"""How those begin that others could have made, too."""
"""How many of them are drawn."""
EVALUATIONS = 6
FINE_EVALUATIONS = 62
GUIDANCE = ERKGuidance(*(PRESETS[PRESET].erk or ()))
"""What was measured to help this model at every number of steps tried (docs/digits.md)."""
FITTED = f"{PRESET}-{EVALUATIONS}.json"
FIT_COMMAND = f"erk-guid fit --preset={PRESET} --evaluations={EVALUATIONS} --solver=modal"


@dataclass(frozen=True)
class Column:
    """One column of the picture: how its images are made.

    Attributes:
        title: what it is called.
        about: a second line.
        solver, guidance: see `erk_guid.sample`.
        evaluations: of the network, for each image.
        levels: the noise levels; None for EDM's.
    """

    title: str
    about: str
    solver: Solver
    guidance: Guidance = field(default_factory=ERKGuidance)
    evaluations: int = EVALUATIONS
    levels: tuple[float, ...] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return options of `erk_guid.edm_sampler`.

        All columns end at the last noise level, without a step to 0: each evaluation is one of the
        solver's own.
        """
        stages = 2 if self.solver.two_stages else 1
        return {
            "solver": self.solver, "erk": self.guidance, "denoise_to_zero": False,
            "num_steps": self.evaluations // stages + 1,
            "schedule": self.levels or "polynomial",
        }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a column's images came to."""

    column: Column
    images: Tensor
    latents: Tensor
    seconds: float


def columns() -> list[Column]:
    """Return the columns; the last one is the reference."""
    with as_file(files("erk_guid") / "data" / "fits" / FITTED) as path:
        settings = read_settings(path)
    return [
        Column("Plain Heun", "EDM2's sampler", Heun()),
        Column("ERK-Guid, published", f"w_stiff {GUIDANCE.w_stiff:g}, w_con {GUIDANCE.w_con:g}",
               Heun(), GUIDANCE),
        Column("ERK-Guid, auto", "parameter-free form", Heun(), ParameterFreeGuidance()),
        Column("Modal", "our solver", Modal()),
        Column("Modal, fitted", "levels from 'erk-guid fit'", settings.solver(),
               levels=settings.made_for["schedule"]),
        Column("Reference", "modal", Modal(), evaluations=FINE_EVALUATIONS),
    ]  # fmt: skip


def run_demo(outdir: Path, device: str | None = None) -> None:
    """Sample, draw and print, and write the files to `outdir`."""
    where = choose_device(device)
    loaded = load(PRESET, device=where)

    def sampled(column: Column) -> Run:
        def batches(seeds: Sequence[int]) -> Iterable[Batch]:
            return generate(
                loaded.net, seeds, encoder=loaded.encoder, batch_size=32, **column.options
            )

        next(iter(batches(SEEDS[:1])))  # not timed: weights of noise levels are kept for later
        begun = time.perf_counter()
        with tqdm(total=len(SEEDS), desc=column.title, unit="image", file=sys.stdout) as bar:
            made = []
            for batch in batches(SEEDS):
                made.append((batch.images.cpu(), batch.latents.cpu().flatten(1)))
                bar.update(len(batch.seeds))
        seconds = (time.perf_counter() - begun) / len(SEEDS)
        images = torch.cat([images for images, _ in made])
        latents = torch.cat([latents for _, latents in made])
        return Run(column, images, latents, seconds)

    runs = [sampled(column) for column in columns()]
    fine = runs[-1]
    panels, lines = [], []
    for run in runs:
        title = f"{run.column.title}, {run.column.evaluations} evaluations"
        about = [run.column.about, f"{run.column.evaluations} evaluations"]
        said = f"{run.seconds:.3f} s an image"
        if run is not fine:
            distances = (run.latents - fine.latents).norm(dim=1)
            error = distances.std() / len(distances) ** 0.5
            about.append(f"distance {distances.mean():.2f}")
            said = (
                f"mean distance to the reference {distances.mean():.2f} (standard error "
                f"{error:.2f}), {said}"
            )
        lines.append(f"{title}: {said}")
        shown = [to_pil(image) for image in run.images[:SHOWN].numpy()]
        panels.append(Panel(tile(shown, columns=2, scale=3), run.column.title, about))
    save_picture(outdir / "demo.png", figure(panels))
    notes = [f"The fitted levels ship with the package; '{FIT_COMMAND}' made them."]
    write_bytes(outdir / "demo.txt", ("\n".join([*lines, *notes]) + "\n").encode())
    settings = {
        "preset": PRESET, "seeds": [SEEDS[0], SEEDS[-1]], "evaluations": EVALUATIONS,
        "reference_evaluations": FINE_EVALUATIONS, "w_stiff": GUIDANCE.w_stiff,
        "w_con": GUIDANCE.w_con, "fitted": FITTED, "device": str(where),
        "torch": torch.__version__,
    }  # fmt: skip
    write_bytes(outdir / "demo.json", (json.dumps(settings, indent=1) + "\n").encode())
    print("\n".join(["", *lines, *notes, "", f"Picture: {outdir / 'demo.png'}"]))
