"""A fit as files: settings for the command lines, lines to paste elsewhere, a table, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from erk_guid.common.files import MARKDOWN, write_bytes
from erk_guid.common.pictures import Panel, figure, tile, to_pil
from erk_guid.common.plots import Curve, draw
from erk_guid.denoisers import Denoiser
from erk_guid.generation.settings import Settings
from erk_guid.guidance import ERKGuidance
from erk_guid.processes import Process, RectifiedFlow
from erk_guid.sampling import sample
from erk_guid.schedules import RHO, make_sigmas
from erk_guid.solvers import Modal, Solver, name_of, options_of, record_of
from erk_guid.studies.fitting.results import Fitted
from erk_guid.studies.fitting.trials import Method

FILES = ("fit.md", "fit.csv", "levels.svg", "errors.svg")
"""Files besides the settings, one of which there is for each number of evaluations."""
SAMPLES_FILE = "samples.png"
SHOWN_SIZE = 96
"""Smaller images are enlarged to about this many pixels."""
FINER = 8
"""Evaluations of the fine solution that is drawn, as a multiple of the most fitted ones."""
COLUMNS = (
    "evaluations", "solver", "spacing", "before_is", "before", "before_low", "before_high",
    "after", "after_low", "after_high", "ratio", "ratio_low", "ratio_high", "reference_error",
    "search_evaluations", "reference_evaluations", "seconds", "levels",
)  # fmt: skip
BEGINS = {"fit.csv": (",".join(COLUMNS).encode(),)}
"""How those begin that others could have made, too."""


def settings_name(evaluations: int) -> str:
    """Return the name of the settings file of a fit."""
    return f"fit-{evaluations}.json"


def settings_of_fit(fitted: Fitted, measured: Mapping[str, Any]) -> Settings:
    """Return what the command lines take by --settings.

    Args:
        fitted: the fit; its levels are sigmas, not the times of a process.
        measured: what it was measured on, for the reader.
    """
    levels = fitted.sigmas.tolist()
    to_zero = levels[-1] == 0
    levels = levels[:-1] if to_zero else levels
    solver = {name: value for name, value in record_of(fitted.solver).items() if value is not None}
    return Settings(
        fitted.guidance or ERKGuidance(),
        {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in solver.items()},
            "num_steps": len(levels), "schedule": levels, "denoise_to_zero": to_zero,
        },
        {
            **measured,
            "evaluations": fitted.evaluations,
            "spacing": fitted.spacing, "before_is": fitted.before_is,
            "before": list(fitted.before), "after": list(fitted.after),
            "ratio": list(fitted.ratio), "reference_error": fitted.reference_error,
            "samples": list(fitted.samples), "cost": fitted.cost._asdict(),
        },
    )  # fmt: skip


def write_fits(fits: Sequence[Fitted], outdir: Path, heading: str) -> None:
    """Write `FILES`.

    Raises:
        MissingExtraError: matplotlib is not installed; the other files are written before.
    """
    write_bytes(outdir / "fit.csv", fits_csv(fits).encode())
    pasted = "\n".join(to_paste(fitted) for fitted in fits)
    write_bytes(outdir / "fit.md", f"{MARKDOWN}{heading}\n\n{table(fits)}\n{pasted}".encode())
    write_bytes(outdir / "levels.svg", plot_levels(fits))
    write_bytes(outdir / "errors.svg", plot_errors(fits))


def table(fits: Sequence[Fitted]) -> str:
    """Return the errors before and after as Markdown."""
    lines = [
        "| evaluations | solver | best usual run | its error | fitted | times |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for f in fits:
        after = str(f.after) if f.found else "nothing better found"
        ratio = str(f.ratio) if f.found else ""
        shown = _short(Method(f.solver, f.guidance))
        lines.append(
            f"| {f.evaluations} | {shown} | {f.before_is} | {f.before} | {after} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def _short(method: Method) -> str:
    """Return a method in words, without the numbers of fitted responses."""
    options = dict(options_of(method.solver))
    answers = options.pop("response", None)
    said = [name_of(method.solver), *(f"{name} {value}" for name, value in options.items())]
    if answers is not None:
        said.append("with fitted responses")
    if method.guidance is not None:
        said.append(str(method.guidance))
    return " ".join(said)


def to_paste(fitted: Fitted, process: Process | None = None) -> str:
    """Return the levels as lines for programs of others, Markdown.

    Args:
        fitted: the fit.
        process: what it was fitted in; the levels are its times.
    """
    flow = isinstance(process, RectifiedFlow)
    levels = [float(f"{level:.6g}") for level in fitted.sigmas.tolist()]
    inner = ", ".join(f"{level:g}" for level in levels)
    solver = f"erk_guid.solvers.{fitted.solver!r}"
    given = "" if process is None else f", process=erk_guid.{process!r}"
    start = "sigmas[0] * noise" if process is None else "x"
    return "\n".join(
        [
            f"## {fitted.evaluations} evaluations",
            "",
            "```python",
            "# erk_guid",
            f"sigmas = torch.tensor([{inner}], dtype=torch.float64)",
            f"x = erk_guid.sample(denoiser, {start}, sigmas, solver={solver}{given})",
            *_k_diffusion(fitted.solver, inner, flow),
            *(_diffusers_flow if flow else _diffusers)(fitted.solver, levels),
            "```",
            "",
            'ComfyUI: the node "ERK-Guid fitted sigmas" reads the settings file.',
            "",
        ]
    )


def _k_diffusion(solver: Solver, levels: str, flow: bool) -> list[str]:
    """Return lines for k-diffusion's signature."""
    lines = [
        "# k-diffusion, and samplers with its signature",
        f"sigmas = torch.tensor([{levels}])",
    ]
    if isinstance(solver, Modal):
        options = f"order={solver.order}"
        if solver.response is not None:
            options += f", response={solver.response}"
        start = "x" if flow else "sigmas[0] * noise"
        options += ", flow=True" if flow else ""
        lines.append(f"x = sample_modal(model, {start}, sigmas, {options})")
    return lines


def _diffusers(solver: Solver, levels: Sequence[float]) -> list[str]:
    """Return lines for pipelines of VP models: noise over signal, or the nearest timesteps."""
    inner = ", ".join(f"{level:g}" for level in levels)
    above = [level for level in levels[:-1] if level > 0]  # those that the network is called at
    given = ", ".join(f"{level:g}" for level in above)
    lines = [
        *_scheduler(solver, "ModalScheduler"),
        "# diffusers: the levels, for it and for others that take sigmas, as EulerDiscreteScheduler"
        if isinstance(solver, Modal)
        else "# diffusers: schedulers that take sigmas, as EulerDiscreteScheduler",
        f"pipe(..., num_inference_steps={len(above)}, sigmas=[{inner}])",
    ]
    if isinstance(solver, Modal):  # our scheduler takes sigmas
        return lines
    return [
        *lines,
        "# diffusers: schedulers that take timesteps; the nearest of the model's own, then 0",
        f"sigmas = torch.tensor([{given}])",
        "alphas = pipe.scheduler.alphas_cumprod",
        "there = ((1 - alphas) / alphas).sqrt()",
        "timesteps = (there[:, None] - sigmas).abs().argmin(0).tolist()",
        f"pipe(..., num_inference_steps={len(above)}, timesteps=timesteps)",
    ]


def _diffusers_flow(solver: Solver, times: Sequence[float]) -> list[str]:
    """Return lines for pipelines of flow-matching models."""
    above = [time for time in times[:-1] if time > 0]
    given = ", ".join(f"{time:g}" for time in above)
    return [
        *_scheduler(solver, "FlowMatchModalScheduler", to_zero=times[-1] > 0),
        "# diffusers, flow matching: its schedulers add the last one, 0",
        f"pipe(..., num_inference_steps={len(above)}, sigmas=[{given}])",
    ]


def _scheduler(solver: Solver, name: str, to_zero: bool = False) -> list[str]:
    """Return lines that put our scheduler into a pipeline, where we have one for the solver.

    Args:
        solver: the solver.
        name: the scheduler's.
        to_zero: whether the last step will be to 0, though it was fitted to a level above.
    """
    if not isinstance(solver, Modal):
        return []
    options = f"modal_order={solver.order}"
    if solver.response is not None:
        response = solver.response[:-1] if to_zero else solver.response
        options += f", modal_response={list(response)}"
    return [
        "# diffusers: our scheduler, whose levels follow below",
        f"from erk_guid.integrations.diffusers import {name}",
        f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, {options})",
    ]


def fits_csv(fits: Sequence[Fitted]) -> str:
    """Return a CSV with one line for each fit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for f in fits:
        numbers = [*f.before, *f.after, *f.ratio, f.reference_error]
        writer.writerow(
            [
                f.evaluations, str(Method(f.solver, f.guidance)), f.spacing, f.before_is,
                *(f"{number:.6g}" for number in numbers),
                f.cost.search, f.cost.reference, f"{f.cost.seconds:.1f}",
                " ".join(f"{level:.8g}" for level in f.sigmas.tolist()),
            ]
        )  # fmt: skip
    return text.getvalue()


def draw_samples(
    fits: Sequence[Fitted],
    denoiser: Denoiser,
    x: Tensor,
    decode: Callable[[Tensor], Tensor],
) -> Image.Image:
    """Return a picture of a few samples: each fit before and after, and the fine solution.

    Args:
        fits: fits whose levels are sigmas.
        denoiser: with the labels of `x`.
        x: where the samples start, [N, C, H, W].
        decode: makes uint8 pixels of samples, as `erk_guid.models.encoders.Encoder` does.
    """

    def panel(title: str, about: str, method: Method, sigmas: Tensor) -> Panel:
        end = sample(denoiser, x, sigmas, solver=method.solver, guidance=method.guidance)
        pixels = decode(end).cpu().numpy()
        scale = max(1, SHOWN_SIZE // pixels.shape[-1])
        sheet = tile([to_pil(image) for image in pixels], columns=1, scale=scale)
        return Panel(sheet, title, [about])

    panels = []
    for fitted in fits:
        last = [0.0] if float(fitted.sigmas[-1]) == 0 else []
        usual = next(t for t in fitted.tried if t.described == fitted.before_is)
        before = torch.tensor([*usual.levels, *last], dtype=torch.float64)
        method = Method(fitted.solver, fitted.guidance)
        about = f"distance {fitted.before.mean:.3g}"
        panels.append(panel(f"{fitted.evaluations}, usual", about, usual.method, before))
        if fitted.found:
            about = f"distance {fitted.after.mean:.3g}"
            panels.append(panel(f"{fitted.evaluations}, fitted", about, method, fitted.sigmas))
    ends = fits[0].sigmas
    lowest = float(ends[ends > 0][-1])
    fine = FINER * max(fitted.evaluations for fitted in fits)
    levels = make_sigmas("polynomial", fine + 1, lowest, float(ends[0]), RHO)
    panels.append(
        panel("Fine", f"{fine} evaluations", Method(Modal()),
              levels if float(ends[-1]) == 0 else levels[:-1])
    )  # fmt: skip
    return figure(panels)


def plot_levels(fits: Sequence[Fitted]) -> bytes:
    """Return an SVG of the fitted and the usual levels over log sigma, a row for each."""
    curves = []
    for f in fits:
        usual = next(t for t in f.tried if t.spacing != "fitted" and t.spacing != "time")
        row = float(f.evaluations)
        pairs = [(usual.levels, row - 0.15, usual.spacing)]
        if f.found:
            pairs.append((tuple(v for v in f.sigmas.tolist() if v > 0), row + 0.15, "fitted"))
        for levels, y, name in pairs:
            curves.append(
                Curve(
                    f"{f.evaluations}: {name}", list(levels), [y] * len(levels),
                    [0.0] * len(levels), plain=False,
                )
            )  # fmt: skip
    ticks = (0.002, 0.01, 0.05, 0.2, 1, 5, 20, 80)
    return draw(
        "Noise levels", curves, "sigma", "evaluations", log_x=True, wanted_by="the plot",
        x_ticks=ticks, y_ticks=[f.evaluations for f in fits],
    )  # fmt: skip


def plot_errors(fits: Sequence[Fitted]) -> bytes:
    """Return an SVG of the errors before and after, over the number of evaluations."""
    counts = [float(f.evaluations) for f in fits]

    def half(intervals: Sequence[Any]) -> list[float]:
        return [(interval.high - interval.low) / 2 for interval in intervals]

    earlier, later = [f.before for f in fits], [f.after for f in fits]
    return draw(
        "Distance to the fine solution, 95 % intervals",
        [
            Curve("best usual", counts, [b.mean for b in earlier], half(earlier), plain=True),
            Curve("fitted", counts, [a.mean for a in later], half(later)),
        ],
        "network evaluations", "mean distance", log_x=len(fits) > 1, wanted_by="the plot",
        x_ticks=sorted(counts),
    )  # fmt: skip
