"""Pipelines of tiny networks, and what `erk_guid.sample` makes of the same networks by hand.

Nothing here reads one of our schedulers. Noise levels, timesteps and the factor of the first noise
are those of diffusers' own schedulers. The formulas of the denoisers are those of the papers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from integrations.diffusers.tiny import (
    SD,
    counting,
    tiny_conditional_unet,
    tiny_cosmos,
    tiny_dit,
    tiny_flux,
    tiny_sd3,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor

import erk_guid
from erk_guid.guidance import Guidance
from erk_guid.solvers import Solver

STEPS = 5
SCALE = 3.0
"""Of classifier-free guidance."""
FIRST, LATER = 1, 3
"""Seeds of the pipeline's generator, and of torch's own."""
SIDE = 8
"""Of the latents; images are twice as large."""

Combine = Callable[[list[Tensor]], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
Ended = tuple[Tensor, int]
"""Latents, and calls of the network."""


@dataclass
class Case:
    """A pipeline, what it is called with, and what one must know of it to do without it.

    Attributes:
        pipe: with diffusers' own scheduler.
        part: name of its network.
        call: arguments of the call.
        family: "discrete", "edm" or "flow".
        combine: makes one prediction of the network's outputs.
        passes: calls of the network for one prediction.
        shape: of the first noise.
        first_dtype: of the first noise; None is the network's.
        pack: what becomes of latents before the network sees them.
        image: latents of the image to start from or to fill in.
        mask: 1 where an image is to be filled in; None where the pipeline edits nothing.
        strength: share of the run.
        counts_calls: whether the strength counts calls, not steps.
        pure: whether an in-painting run begins with noise alone.
        scaled: factor of the first noise: "set", init_noise_sigma once the timesteps are set; or
            "sigma_max".
        unit_variance: whether samples are x / sqrt(1 + sigma^2).
        generator: whether the noise of later steps is drawn by the pipeline's generator.
        copies: how often the scheduler sees each sample.
        before: how often noise is drawn and thrown away before that of each step.
        told: what the network is told, given the scheduler's timestep.
    """

    pipe: Any
    part: str
    call: dict[str, Any]
    family: str
    combine: Combine
    passes: int = 1
    shape: tuple[int, ...] = (1, 4, SIDE, SIDE)
    first_dtype: torch.dtype | None = None
    pack: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    counts_calls: bool = False
    pure: bool = False
    scaled: str = "set"
    unit_variance: bool = False
    generator: bool = False
    copies: int = 1
    before: int = 0
    told: Callable[[Tensor], Tensor] = field(default=lambda t: t)

    @property
    def network(self) -> torch.nn.Module:
        """The network."""
        found: torch.nn.Module = getattr(self.pipe, self.part)
        return found


# What pipelines make of their networks' outputs.


def alone(outputs: list[Tensor]) -> Tensor:
    """No guidance."""
    return outputs[0]


def guided(outputs: list[Tensor]) -> Tensor:
    """Both halves in one batch, the one without a prompt first."""
    without, prompted = outputs[0].chunk(2)
    return without + SCALE * (prompted - without)


def guided_dit(outputs: list[Tensor]) -> Tensor:
    """The one without a class second; behind the noise there is a variance, of no use here."""
    labelled, without = outputs[0][:, :4].chunk(2)
    return without + SCALE * (labelled - without)


def guided_cosmos(outputs: list[Tensor]) -> Tensor:
    """Two calls, the one without a prompt second; the strength counts from 0."""
    prompted, without = outputs
    return prompted + SCALE * (prompted - without)


# The pipelines.


def _random(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stronger(network: Any, layer: str, factor: float) -> Any:
    """Return the network with larger outputs: an untrained one hardly answers to x."""
    with torch.no_grad():
        getattr(network, layer).weight.mul_(factor)
    return network.eval().requires_grad_(False)


def _half() -> Tensor:
    """Return a mask of the image's size: the right half is to be filled in."""
    mask = torch.zeros(1, 1, 2 * SIDE, 2 * SIDE)
    mask[..., SIDE:] = 1
    return mask


def _task(task: str, channels: int, strength: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a call and a case need for a task: "text", "image" or "paint"."""
    if task == "text":
        return {"height": 2 * SIDE, "width": 2 * SIDE}, {}
    image = _random(1, channels, SIDE, SIDE, seed=4)
    call = {"image": image, "strength": strength}
    known: dict[str, Any] = {"image": image, "strength": strength}
    if task == "paint":
        call |= {"mask_image": _half(), "height": 2 * SIDE, "width": 2 * SIDE}
        known["mask"] = _half()[..., ::2, ::2]
        known["pure"] = strength == 1
    return call, known


def _prompts(numbers: int, pooled: bool) -> dict[str, Any]:
    found = {"prompt_embeds": _random(1, 4, numbers, seed=5),
             "negative_prompt_embeds": _random(1, 4, numbers, seed=6)}  # fmt: skip
    if pooled:
        found |= {"pooled_prompt_embeds": _random(1, 16, seed=7),
                  "negative_pooled_prompt_embeds": _random(1, 16, seed=8)}  # fmt: skip
    return found


def stable_diffusion(task: str, nine: bool = False, **config: Any) -> Case:
    """Stable Diffusion; `nine`: the network that knows mask and image by itself."""
    kind: Any = {
        "text": diffusers.StableDiffusionPipeline,
        "image": diffusers.StableDiffusionImg2ImgPipeline,
        "paint": diffusers.StableDiffusionInpaintPipeline,
    }[task]
    unet = _stronger(tiny_conditional_unet(9 if nine else 4), "conv_out", 10)
    pipe = kind(
        vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=unet, safety_checker=None,
        scheduler=diffusers.PNDMScheduler(**SD | config), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    call, known = _task(task, 4, 1.0 if task == "paint" else 0.7)
    if task == "paint":
        call["masked_image_latents"] = call["image"]
    if nine:
        known = {}
    return Case(
        pipe, "unet", _prompts(16, False) | {"guidance_scale": SCALE} | call, "discrete", guided,
        generator=True, **known,
    )  # fmt: skip


def sdxl(task: str, scheduler: Any) -> Case:
    """SDXL, or with EDM's scheduler Playground 2.5."""
    kind: Any = {
        "text": diffusers.StableDiffusionXLPipeline,
        "image": diffusers.StableDiffusionXLImg2ImgPipeline,
        "paint": diffusers.StableDiffusionXLInpaintPipeline,
    }[task]
    family = "edm" if type(scheduler).__name__.startswith("EDM") else "discrete"
    unet = _stronger(tiny_conditional_unet(xl=True), "conv_out", 3 if family == "edm" else 10)
    pipe = kind(
        vae=tiny_vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    call, known = _task(task, 4, 0.8)
    return Case(
        pipe, "unet", _prompts(16, True) | {"guidance_scale": SCALE} | call, family, guided,
        generator=True, **known,
    )  # fmt: skip


def sd3(task: str) -> Case:
    """SD3."""
    kind: Any = {
        "text": diffusers.StableDiffusion3Pipeline,
        "image": diffusers.StableDiffusion3Img2ImgPipeline,
        "paint": diffusers.StableDiffusion3InpaintPipeline,
    }[task]
    pipe = kind(
        transformer=_stronger(tiny_sd3(), "proj_out", 4), vae=tiny_vae(16), text_encoder=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call, known = _task(task, 16, 0.8)
    if task == "paint":
        call["masked_image_latents"] = call["image"]
    return Case(
        pipe, "transformer", _prompts(32, True) | {"guidance_scale": SCALE} | call, "flow", guided,
        shape=(1, 16, SIDE, SIDE), **known,
    )  # fmt: skip


def flux(task: str) -> Case:
    """FLUX, its times shifted by the number of tokens."""
    kind: Any = {
        "text": diffusers.FluxPipeline,
        "image": diffusers.FluxImg2ImgPipeline,
        "paint": diffusers.FluxInpaintPipeline,
    }[task]
    pipe = kind(
        transformer=_stronger(tiny_flux(64), "proj_out", 10), vae=tiny_vae(16), text_encoder=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    call, known = _task(task, 16, 0.7)
    call |= {"height": 2 * SIDE, "width": 2 * SIDE}
    if task == "paint":
        call["masked_image_latents"] = call["image"]
        known["mask"] = known["mask"].repeat(1, 16, 1, 1)
    prompts = {"prompt_embeds": _random(1, 4, 32, seed=5),
               "pooled_prompt_embeds": _random(1, 16, seed=7)}  # fmt: skip
    return Case(
        pipe, "transformer", prompts | call, "flow", alone, shape=(1, 16, SIDE, SIDE),
        pack=lambda x: diffusers.FluxPipeline._pack_latents(x, 1, 16, SIDE, SIDE),
        counts_calls=True, told=lambda t: t / 1000, **known,
    )  # fmt: skip


def unconditional(name: str) -> Case:
    """DDPM or DDIM, which scale nothing; DDPM's config limits the clean data."""
    unet = _stronger(tiny_unet(), "conv_out", 4 if name == "DDPM" else 30)
    scheduler = getattr(diffusers, f"{name}Scheduler")(clip_sample=name == "DDPM")
    pipe = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
    return Case(
        pipe, "unet", {"output_type": "pt"}, "discrete", alone, shape=(1, 3, SIDE, SIDE),
        unit_variance=True, generator=True,
    )  # fmt: skip


def ldm() -> Case:
    """Latent diffusion without conditions."""
    unet = _stronger(tiny_unet(), "conv_out", 30)
    vae = diffusers.VQModel(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=4, latent_channels=3,
    )  # fmt: skip
    pipe = diffusers.LDMPipeline(vae, unet, diffusers.DDIMScheduler(**SD, clip_sample=False))
    return Case(
        pipe, "unet", {"output_type": "np"}, "discrete", alone, shape=(1, 3, SIDE, SIDE),
        first_dtype=torch.float32, unit_variance=True,
    )  # fmt: skip


def dit() -> Case:
    """DiT, which scales no noise and gives the scheduler each sample twice."""
    transformer = _stronger(tiny_dit(), "proj_out_2", 30)
    pipe = diffusers.DiTPipeline(
        transformer, tiny_vae(), diffusers.DDIMScheduler(clip_sample=False)
    )
    return Case(
        pipe, "transformer", {"class_labels": [3], "guidance_scale": SCALE, "output_type": "pt"},
        "discrete", guided_dit, unit_variance=True, copies=2,
    )  # fmt: skip


class NoSafetyChecker(diffusers.ModelMixin, ConfigMixin):
    """In place of Cosmos' guardrail, which would be fetched; latents are not shown to it."""

    device = torch.device("cpu")
    dtype = torch.float32


def cosmos() -> Case:
    """Cosmos 1, which asks the scheduler for clean data, and then again for a step."""
    transformer = _stronger(tiny_cosmos(), "proj_out", 1)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64,
        num_layers=1, patch_size=4,
    )  # fmt: skip
    pipe = diffusers.CosmosTextToWorldPipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=vae,
        scheduler=diffusers.EDMEulerScheduler(), safety_checker=NoSafetyChecker(),
    )  # fmt: skip
    call = _prompts(32, False) | {
        "guidance_scale": SCALE, "height": 32, "width": 32, "num_frames": 9,
    }  # fmt: skip
    return Case(
        pipe, "transformer", call, "edm", guided_cosmos, passes=2, shape=(1, 4, 2, 4, 4),
        first_dtype=torch.float32, before=2, scaled="sigma_max",
    )  # fmt: skip


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Change networks and conditions of a case to a dtype."""
    case.pipe.set_progress_bar_config(disable=True)
    for part in case.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    case.call = {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "mask_image" else value
        for name, value in case.call.items()
    }
    if case.image is not None:
        case.image = case.image.to(dtype)
    return case


# A run of the pipeline.


def run(case: Case, scheduler: Any) -> Ended:
    """Return the latents that the pipeline ends with, with some scheduler."""
    pipe, last = copy.copy(case.pipe), []
    pipe.scheduler = scheduler
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature
    def noted(*args: Any, **options: Any) -> Any:
        found = step(*args, **options)
        last.append(found[0])
        return found

    scheduler.step = noted
    torch.manual_seed(LATER)
    latents = "output_type" not in case.call
    options = case.call | ({"output_type": "latent"} if latents else {})
    with counting(case.network) as calls:
        ended = pipe(
            generator=torch.Generator().manual_seed(FIRST), num_inference_steps=STEPS,
            return_dict=False, **options,
        )[0]  # fmt: skip
    found: Tensor = ended if latents else last[-1][: case.shape[0]]
    return found, len(calls)


# The same by hand.

OWN = {
    ("discrete", "modal"): "EulerDiscreteScheduler",
    ("discrete", "heun"): "HeunDiscreteScheduler",
    ("edm", "modal"): "EDMEulerScheduler",
    ("edm", "heun"): "EDMEulerScheduler",
    ("flow", "modal"): "FlowMatchEulerDiscreteScheduler",
    ("flow", "heun"): "FlowMatchEulerDiscreteScheduler",
}
"""diffusers' own schedulers with the noise levels of ours, by family and solver."""


def own(case: Case, solver: str) -> Any:
    """Return diffusers' own scheduler, with the case's config."""
    kind: Any = getattr(diffusers, OWN[case.family, solver])
    # With the values of the pipeline's, also those that it left at its own class's defaults.
    config = {k: v for k, v in case.pipe.scheduler.config.items() if k != "_use_default_values"}
    return kind.from_config(config)


def euler(case: Case) -> Any:
    """Return diffusers' own scheduler that is Euler's method for the case.

    DDIM is Euler's method in sigma, for pipelines that keep samples at unit variance.
    """
    if not case.unit_variance:
        return own(case, "modal")
    return diffusers.DDIMScheduler.from_config(case.pipe.scheduler.config)


@dataclass
class Schedule:
    """Noise levels of a run.

    Attributes:
        levels: falling strictly, the end included.
        begins: level of each call.
        times: timestep of each call.
        first: factor of the first noise.
    """

    levels: list[float]
    begins: list[float]
    times: list[Tensor]
    first: float

    @classmethod
    def of(cls, case: Case, solver: str) -> Schedule:
        """Read diffusers' own scheduler."""
        theirs = own(case, solver)
        early = 1.0 if case.family == "flow" else float(theirs.init_noise_sigma)  # as yet
        if case.counts_calls:  # FLUX names the times and the shift
            evenly = np.linspace(1.0, 1 / STEPS, STEPS)
            theirs.set_timesteps(sigmas=evenly, mu=calculate_shift((SIDE // 2) ** 2))
        else:
            theirs.set_timesteps(STEPS)
        first = early
        if case.family != "flow" and case.scaled == "set":
            first = float(theirs.init_noise_sigma)
        elif case.scaled == "sigma_max":
            first = theirs.config.sigma_max
        levels = list(dict.fromkeys(theirs.sigmas.tolist()))
        times = dict(zip(theirs.sigmas.tolist(), theirs.timesteps, strict=False))
        begins = levels[:-1]
        if solver == "heun":
            begins = [levels[0], *(level for level in levels[1:-1] for _ in range(2))]
        return cls(levels, begins, [times[level] for level in begins], first)

    def from_strength(self, case: Case) -> int:
        """Return the number of the call that a run begins with."""
        if case.counts_calls:
            calls = len(self.begins)
            return int(calls - calls * case.strength)
        steps = len(self.levels) - 1
        skipped = steps - min(int(steps * case.strength), steps)
        # With two calls at a level, the first of them ends the step before.
        return len(self.begins) - 1 - self.begins[::-1].index(self.levels[skipped])

    def time(self, level: float) -> Tensor:
        """Return what the network is told at a level."""
        k = int(np.abs(np.array(self.begins) - level).argmin())
        assert abs(self.begins[k] - level) <= 1e-6 * level
        return self.times[k]


class Asked:
    """The network, in float32, with the conditions of a pipeline's own call.

    `rounding` makes it the pipeline's own network again, in the pipeline's precision.
    """

    rounding = False

    def __init__(self, case: Case) -> None:
        calls: list[tuple[Any, Any]] = []
        hook = case.network.register_forward_pre_hook(
            lambda module, args, options: calls.append((args, options)), with_kwargs=True
        )
        run(case, euler(case))
        hook.remove()
        self._own: Any = case.network
        self._network: Any = copy.deepcopy(case.network).float()
        self._conditions = [_to(call, torch.float32) for call in calls[: case.passes]]
        self._combine, self._told = case.combine, case.told

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        with torch.no_grad():
            return self._combine([self._one(x, time, *each) for each in self._conditions])

    def _one(self, x: Tensor, time: Tensor, args: Any, options: Any) -> Tensor:
        named = dict(options)
        given = args[0] if args else named.pop("hidden_states")
        when = args[1] if len(args) > 1 else named.pop("timestep")
        x = torch.cat([x] * (len(given) // len(x)))
        if given.shape[1] > x.shape[1]:  # mask and masked image
            x = torch.cat([x, given[:, x.shape[1] :]], 1)
        time = self._told(time).float().expand(when.shape)
        named.pop("return_dict", None)
        network = self._network
        if self.rounding:
            network, x, named = self._own, x.to(self._own.dtype), _to(named, self._own.dtype)
        if not args:
            named |= {"hidden_states": x, "timestep": time}
        found: Tensor = network(*([x, time] if args else []), return_dict=False, **named)[0]
        return found.float()


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Return conditions in a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {name: _to(each, dtype) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(each, dtype) for each in value)
    return value


def denoiser(case: Case, asked: Asked, schedule: Schedule) -> Denoiser:
    """Return the denoiser D(x; sigma) of a case, by the formula of its family."""
    config = case.pipe.scheduler.config
    clipped = case.family == "discrete" and config.get("clip_sample", False)

    def denoised(x: Tensor, level: Tensor) -> Tensor:
        s, time = float(level), schedule.time(float(level))
        if case.family == "flow":
            return x - s * asked(x, time)
        data = config.sigma_data if case.family == "edm" else 1.0
        root = (s**2 + data**2) ** 0.5
        output = asked(x / root, time)
        if case.family == "edm":  # Karras et al. 2022, table 1
            return x * data**2 / root**2 + output * s * data / root
        if config.prediction_type == "v_prediction":  # Salimans and Ho 2022
            return x / root**2 - output * s / root
        found = x - s * output
        return found.clamp(-1, 1) if clipped else found

    return denoised


def knowing(
    inner: Denoiser, mask: Tensor, image: Tensor, there: Callable[[float], Tensor]
) -> Denoiser:
    """Return a denoiser that knows the part of an image outside of a mask.

    The pipelines for in-painting put the known part back after each call, always with the same
    noise. Such a path solves the ODE of a denoiser that knows the part, and every solver follows it
    exactly. So no loop with a mask is needed here.

    Args:
        inner: denoises the rest.
        mask: 1 for the rest.
        image: clean.
        there: what the network sees of the known part at a level.
    """

    def denoised(x: Tensor, level: Tensor) -> Tensor:
        seen = torch.where(mask > 0, x, there(float(level)))
        return torch.where(mask > 0, inner(seen, level), image)

    return denoised


def by_hand(
    case: Case,
    asked: Asked,
    solver: Solver,
    guidance: Guidance | None,
    process: erk_guid.processes.Process | None,
) -> Ended:
    """Return the latents that the pipeline should end with, and the calls it should take."""
    schedule = Schedule.of(case, "heun" if isinstance(solver, erk_guid.solvers.Heun) else "modal")
    call = schedule.from_strength(case)
    begin = schedule.begins[call]
    generator = torch.Generator().manual_seed(FIRST)
    dtype = case.first_dtype or case.network.dtype
    noise = case.pack(torch.randn(case.shape, dtype=dtype, generator=generator).float())
    image = torch.zeros_like(noise) if case.image is None else case.pack(case.image.float())
    mask = torch.ones_like(noise) if case.mask is None else case.pack(case.mask)

    def noised(level: float) -> Tensor:
        if case.image is None or (case.pure and level == begin):
            first = (1 + begin**2) ** 0.5 if case.unit_variance else schedule.first
            return noise * first
        return image * (1 - level if case.family == "flow" else 1) + level * noise

    def later(x: Tensor) -> Tensor:
        for _ in range(case.before):
            torch.randn(x.shape)
        drawn = generator if case.generator else None
        return torch.randn((case.copies * len(x), *x.shape[1:]), generator=drawn)[: len(x)]

    torch.manual_seed(LATER)
    end = erk_guid.sample(
        knowing(denoiser(case, asked, schedule), mask, image, noised), noised(begin),
        torch.tensor(schedule.levels[schedule.levels.index(begin) :]), solver=solver,
        guidance=guidance, process=process, randn_like=later,
    )  # fmt: skip
    calls = (len(schedule.begins) - call) * case.passes
    return torch.where(mask > 0, end, image), calls


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a share of b's largest value."""
    return float((a.float() - b).abs().max() / b.abs().max())


def relative(a: Tensor, b: Tensor) -> float:
    """Return the distance of a to b, as a share of b's norm."""
    return float((a.float() - b).norm() / b.norm())


def seeded(build: Callable[..., Case], *args: Any, dtype: torch.dtype = torch.float32) -> Case:
    """Return a case with always the same weights."""
    torch.manual_seed(0)
    return in_dtype(build(*args), dtype)
