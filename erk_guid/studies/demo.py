"""Demo for a first minute: the shipped model with and without ERK guidance, side by side."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.common.files import write_bytes
from erk_guid.common.pictures import Panel, figure, save_picture, tile, to_pil
from erk_guid.generation.devices import choose_device
from erk_guid.generation.images import generate
from erk_guid.guidance import ERKGuidance, Guidance, ParameterFreeGuidance
from erk_guid.models.checkpoints import load

PRESET = "digits"
SEEDS = range(64)
STEPS, FINE_STEPS = 5, 32
GUIDANCE = ERKGuidance(w_stiff=1.0, w_con=0.5)
"""Settings for few steps, from the measurement in docs/digits.md."""


@dataclass(frozen=True)
class Run:
    """One column of the picture."""

    title: str
    num_steps: int
    guidance: Guidance
    images: Tensor
    latents: Tensor
    seconds: float

    @property
    def nfe(self) -> int:
        """Network evaluations of Heun with a last Euler step."""
        return 2 * self.num_steps - 1


def run_demo(outdir: Path, device: str | None = None) -> None:
    """Sample, draw and print, and write the files to `outdir`."""
    where = choose_device(device)
    loaded = load(PRESET, device=where)

    def sampled(title: str, num_steps: int, guidance: Guidance) -> Run:
        batches = generate(
            loaded.net,
            SEEDS,
            encoder=loaded.encoder,
            batch_size=32,
            num_steps=num_steps,
            erk=guidance,
        )
        next(iter(batches))  # not counted: the first call computes what later ones reuse
        begun = time.perf_counter()
        with tqdm(total=len(SEEDS), desc=title, unit="image", file=sys.stdout) as bar:
            made = []
            for batch in batches:
                made.append((batch.images.cpu(), batch.latents.cpu().flatten(1)))
                bar.update(len(batch.seeds))
        seconds = (time.perf_counter() - begun) / len(SEEDS)
        images = torch.cat([images for images, _ in made])
        latents = torch.cat([latents for _, latents in made])
        return Run(title, num_steps, guidance, images, latents, seconds)

    off = ERKGuidance()
    runs = [
        sampled("Plain Heun", STEPS, off),
        sampled("ERK-Guid", STEPS, GUIDANCE),
        sampled("ERK-Guid, auto", STEPS, ParameterFreeGuidance()),
        sampled("Reference", FINE_STEPS, off),
    ]
    fine = runs[-1]
    lines = []
    for run in runs[:-1]:
        distances = (run.latents - fine.latents).norm(dim=1)
        error = distances.std() / len(distances) ** 0.5
        lines.append(
            f"{run.title}, {run.num_steps} steps: mean distance to the reference "
            f"{distances.mean():.2f} (standard error {error:.2f}), {run.seconds:.3f} s an image"
        )
    lines.append(f"Reference, {fine.num_steps} steps: {fine.seconds:.3f} s an image")

    picture = figure([_panel(run) for run in runs], lines)
    save_picture(outdir / "demo.png", picture)
    write_bytes(outdir / "demo.txt", ("\n".join(lines) + "\n").encode())
    settings = {
        "preset": PRESET, "seeds": [SEEDS[0], SEEDS[-1]], "steps": STEPS,
        "reference_steps": FINE_STEPS, "w_stiff": GUIDANCE.w_stiff, "w_con": GUIDANCE.w_con,
        "device": str(where), "torch": torch.__version__,
    }  # fmt: skip
    write_bytes(outdir / "demo.json", (json.dumps(settings, indent=1) + "\n").encode())
    print("\n".join(["", *lines, "", f"Picture: {outdir / 'demo.png'}"]))


def _panel(run: Run) -> Panel:
    images = [to_pil(image) for image in run.images.numpy()]
    settings = "parameter-free form"
    if isinstance(run.guidance, ERKGuidance):
        settings = f"w_stiff {run.guidance.w_stiff:g}, w_con {run.guidance.w_con:g}"
    if not run.guidance.active:
        settings = "no guidance"
    steps = f"Heun, {run.num_steps} steps, {run.nfe} evaluations"
    return Panel(tile(images, columns=8, scale=2), run.title, [steps, settings])
