"""The node that samples and draws what guidance saw and did at each step."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.generation.trace import NO_ROWS, Trace
from erk_guid.generation.trace_plot import draw_trace, summarize
from erk_guid.integrations.comfyui.program import module
from erk_guid.integrations.comfyui.sampling import make_ksampler, sample_in_comfyui
from erk_guid.processes import Process
from erk_guid.sampling import StepInfo
from erk_guid.solvers import name_of


def sample_and_trace(
    noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent_image: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """Sample as ComfyUI's SamplerCustomAdvanced does; return the latent and a picture [1, H, W, 3].

    Raises:
        ErkGuidError: another sampler than one of this package with an embedded pair.
        MissingExtraError: matplotlib is not installed.
    """
    options = _options_of(sampler)
    parts = [NO_ROWS]
    trace = Trace(parts.append)

    def record(info: StepInfo, process: Process | None) -> None:
        trace.callback(info if process is None else in_sigma(info, process))

    _check_matplotlib()  # before the run, not behind it
    latent = _sampled(
        noise=noise, guider=guider, sampler=make_ksampler(**{**options, "record": record}),
        sigmas=sigmas, latent_image=latent_image,
    )  # fmt: skip
    trace.end_batch(range(len(latent["samples"])))
    rows = np.concatenate(parts)
    if not len(rows):
        raise ErkGuidError("nothing to draw: SIGMAS has fewer than two levels")
    title = f"{name_of(options['solver'])}, {options['guidance'] or 'no guidance'}"
    return latent, _as_image(draw_trace(summarize(rows), title))


def _options_of(sampler: Any) -> dict[str, Any]:
    """Return the options of a sampler of this package that has an embedded pair."""
    options: dict[str, Any] = getattr(sampler, "extra_options", {})
    if getattr(sampler, "sampler_function", None) is not sample_in_comfyui:
        raise ErkGuidError(
            "only samplers of the node 'ERK-Guid sampler' can be traced; connect its SAMPLER"
        )
    if not options["solver"].has_pair:
        raise ErkGuidError(
            f"the solver {name_of(options['solver'])!r} has no embedded pair, so there is nothing "
            "to trace; take heun or dpm_2"
        )
    return options


def _check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "the drawing of a trace")


def _sampled(**inputs: Any) -> dict[str, Any]:
    """Call the stock node, of either API."""
    stock = module("nodes").NODE_CLASS_MAPPINGS["SamplerCustomAdvanced"]
    called = stock.execute if hasattr(stock, "execute") else getattr(stock(), stock.FUNCTION)
    found = called(**inputs)
    latent: dict[str, Any] = getattr(found, "result", found)[0]
    return latent


def in_sigma(info: StepInfo, process: Process) -> StepInfo:
    """Return what a step of a process did in noise over signal, the unit of its stiffness."""
    here, there = process.level(info.sigma_hat), process.level(info.sigma_next)
    size = info.correction_size
    return replace(
        info,
        sigma=process.level(info.sigma).sigma,
        sigma_hat=here.sigma,
        sigma_next=there.sigma,
        x_before=info.x_before / here.alpha,
        x=info.x / there.alpha,
        correction_size=None if size is None else size / there.alpha,
    )


def _as_image(png: bytes) -> Tensor:
    """Return a picture as ComfyUI's IMAGE, [1, H, W, 3] from 0 to 1."""
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
