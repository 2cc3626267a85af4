"""The schedulers in real diffusers pipelines, with tiny random models: nothing is fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderTiny,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from integrations.diffusers.tiny import (
    SD,
    counting,
    tiny_conditional_unet,
    tiny_dit,
    tiny_flux,
    tiny_unet,
    tiny_vae,
)

import erk_guid
from erk_guid.integrations.diffusers import (
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
    for_pipeline,
)
from erk_guid.solvers import DPMpp, Modal
from erk_guid.studies.fitting.fit_files import to_paste
from erk_guid.studies.fitting.results import Cost, Fitted, Interval


def tiny_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with single characters for words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def tiny_text_encoder() -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        "unet": tiny_conditional_unet(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def latents(pipe: Any, network: torch.nn.Module, **options: Any) -> tuple[torch.Tensor, int]:
    """What the pipeline makes, and how often it called its network."""
    pipe.set_progress_bar_config(disable=True)
    with counting(network) as calls:
        made = pipe(generator=torch.Generator().manual_seed(1), output_type="latent", **options)
    return made.images, len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_to_image", [False, True])
def test_stable_diffusion(
    stable_diffusion: dict[str, Any], dtype: torch.dtype, image_to_image: bool
) -> None:
    parts = {
        name: part.to(dtype) if isinstance(part, torch.nn.Module) else part
        for name, part in stable_diffusion.items()
    }
    config = PNDMScheduler(**SD).config
    kind: Any = StableDiffusionPipeline
    options: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6}
    if image_to_image:
        kind = StableDiffusionImg2ImgPipeline
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        options |= {"image": image.to(dtype), "strength": 0.5}
    else:
        options |= {"height": 16, "width": 16}
    found = {}
    for name, scheduler in (
        ("theirs", HeunDiscreteScheduler.from_config(config)),
        ("off", ERKGuidHeunScheduler.from_config(config, w_stiff=0)),
        ("auto", ERKGuidHeunScheduler.from_config(config)),
        ("published", ERKGuidHeunScheduler.from_config(config, w_stiff=0.5, w_con=0)),
    ):
        pipe = kind(scheduler=scheduler, requires_safety_checker=False, **parts)
        found[name] = latents(pipe, parts["unet"], **options)
    theirs, calls = found["theirs"]
    assert all(count == calls for _, count in found.values())
    if dtype == torch.float32:  # ours keeps float32 within a run of half precision
        assert torch.equal(found["off"][0], theirs)
    for name in ("auto", "published"):
        assert found[name][0].dtype == theirs.dtype
        assert found[name][0].isfinite().all()
        assert not torch.equal(found[name][0], theirs)


def test_the_lines_to_paste_of_a_fit(stable_diffusion: dict[str, Any]) -> None:
    # The lines themselves are run, with a real pipeline for `pipe`.
    levels = [14.0, 6.0, 3.0, 1.4, 0.6, 0.2, 0.05]
    nothing = Interval(1, 1, 1)
    fitted = Fitted(
        torch.tensor(levels, dtype=torch.float64), Modal(2, (0.1, 0.3, 0.2, 0.5, 0.4)), None, 6,
        "fitted", nothing, "", nothing, nothing, {}, (), 0.0, (1, 1, 1), Cost(1, 1, 1.0),
    )  # fmt: skip
    real = StableDiffusionPipeline(
        scheduler=PNDMScheduler(**SD),
        requires_safety_checker=False, **stable_diffusion,
    )  # fmt: skip
    real.set_progress_bar_config(disable=True)
    calls: list[list[int]] = []

    class Pipe:
        scheduler: Any = real.scheduler

        def __call__(self, *_: Any, **options: Any) -> None:
            real.scheduler = self.scheduler
            with counting(real.unet) as made:
                real("a cat", output_type="latent", height=16, width=16, **options)
            calls.append(made)

    pipe = Pipe()
    names = {"pipe": pipe, "torch": torch}
    exec(to_paste(fitted).partition("# diffusers")[2].partition("```")[0].partition("\n")[2], names)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(levels))
    assert pipe.scheduler.config.modal_order == 2
    assert pipe.scheduler.config.modal_response == [0.1, 0.3, 0.2, 0.5, 0.4]
    # Another solver's lines: for schedulers that take sigmas, then for those that take timesteps.
    other = to_paste(replace(fitted, solver=DPMpp(2)))
    assert "modal" not in other.lower()
    first, second = other.partition("# diffusers")[2].split("# diffusers: schedulers that take t")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    exec(first.partition("\n")[2], names)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor(levels))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    exec(second.partition("```")[0].partition("\n")[2], names)
    # To the nearest of a thousand times.
    torch.testing.assert_close(
        pipe.scheduler.sigmas[:-1], torch.tensor(levels[:-1]), rtol=0.05, atol=0
    )
    assert [len(made) for made in calls] == [6, 6, 6]

    # A flow-matching scheduler adds the 0 by itself. The lines for a pipeline of that kind:
    times = [1.0, 0.9, 0.6, 0.3, 0.1, 0.01]
    flow = replace(fitted, sigmas=torch.tensor(times), solver=Modal(2, (0.1, 0.3, 0.2, 0.5)))
    pasted = to_paste(flow, erk_guid.RectifiedFlow())
    assert "process=erk_guid.RectifiedFlow())" in pasted
    pasted = pasted.partition("# diffusers")[2].partition("```")[0]

    class Flow:
        scheduler: Any = FlowMatchEulerDiscreteScheduler()

        def __call__(self, *_: Any, sigmas: list[float], **options: Any) -> None:
            self.scheduler.set_timesteps(sigmas=sigmas)  # as FLUX's pipeline does

    names = {"pipe": Flow()}
    exec(pasted.partition("\n")[2], names)
    scheduler = names["pipe"].scheduler
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*times[:-1], 0.0]))
    x = torch.randn(2, 1, 4, 4)
    for time in scheduler.timesteps:
        x = scheduler.step(x / 2, time, x).prev_sample
    assert len(scheduler.timesteps) == 5
    assert x.isfinite().all()


@pytest.mark.parametrize(
    "levels", [{"sigmas": [9.0, 3.0, 1.0, 0.0]}, {"timesteps": [900, 500, 99]}]
)
def test_pipelines_hand_on_noise_levels(
    stable_diffusion: dict[str, Any], levels: dict[str, Any]
) -> None:
    # They look at the signature of set_timesteps to see whether the scheduler takes them.
    parts = {k: v.float() if isinstance(v, torch.nn.Module) else v
             for k, v in stable_diffusion.items()}  # fmt: skip
    pipe = StableDiffusionPipeline(
        scheduler=ERKGuidHeunScheduler(), requires_safety_checker=False, **parts
    )
    made, calls = latents(pipe, parts["unet"], prompt="a cat", height=16, width=16, **levels)
    assert calls == 5
    assert made.isfinite().all()


def test_a_saved_pipeline_comes_back(tmp_path: Path) -> None:
    scheduler = ERKGuidHeunScheduler(w_stiff=0.3, gate="step")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is ERKGuidHeunScheduler
    assert again.scheduler.guidance == erk_guid.ERKGuidance(0.3, gate="step")


def test_a_callback_that_edits_the_latents(stable_diffusion: dict[str, Any]) -> None:
    # Every step starts without a pair; nothing breaks, and the published form does nothing.
    config = PNDMScheduler(**SD).config

    def edit(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 1.01}

    parts = {k: v.float() if isinstance(v, torch.nn.Module) else v
             for k, v in stable_diffusion.items()}  # fmt: skip
    ends = []
    for w_stiff in (0.0, 0.5):
        scheduler = ERKGuidHeunScheduler.from_config(config, w_stiff=w_stiff, w_con=0)
        pipe = StableDiffusionPipeline(scheduler=scheduler, requires_safety_checker=False, **parts)
        ends.append(latents(pipe, parts["unet"], prompt="a dog", num_inference_steps=5, height=16,
                            width=16, callback_on_step_end=edit)[0])  # fmt: skip
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_in_painting(stable_diffusion: dict[str, Any]) -> None:
    # The pipeline puts the known half back, noised, after every call. A pair that took that for
    # the step's error would move the published form by much more than it moves without a mask.
    parts = {k: v.float() if isinstance(v, torch.nn.Module) else v
             for k, v in stable_diffusion.items()}  # fmt: skip
    config = PNDMScheduler(**SD).config
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    options: dict[str, Any] = {
        "prompt": "a cat", "num_inference_steps": 6, "strength": 1.0, "height": 16, "width": 16,
        "image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        "mask_image": mask,
    }  # fmt: skip
    found = {}
    for name, scheduler in (
        ("theirs", HeunDiscreteScheduler.from_config(config)),
        ("off", ERKGuidHeunScheduler.from_config(config, w_stiff=0)),
        ("published", ERKGuidHeunScheduler.from_config(config, w_stiff=1.0, w_con=0)),
        ("auto", ERKGuidHeunScheduler.from_config(config)),
    ):
        pipe = StableDiffusionInpaintPipeline(
            scheduler=scheduler, requires_safety_checker=False, **parts
        )
        found[name], calls = latents(pipe, parts["unet"], **options)
        assert calls == 11
        assert found[name].isfinite().all()
    assert torch.equal(found["off"], found["theirs"])
    assert 0 < (found["published"] - found["off"]).abs().max() < 0.01
    # The known half is what was given, in every case.
    for made in found.values():
        torch.testing.assert_close(made[..., :4], found["off"][..., :4], rtol=1e-5, atol=1e-5)


def test_a_diffusion_transformer(stable_diffusion: dict[str, Any]) -> None:
    torch.manual_seed(0)
    transformer = tiny_dit()
    images, sizes = [], []
    for settings in (
        {"w_stiff": 0, "unit_variance": True},
        {"unit_variance": True},
        {"unit_variance": False},
    ):
        pipe = DiTPipeline(
            transformer, stable_diffusion["vae"].float(), ERKGuidHeunScheduler(**settings)
        )
        pipe.set_progress_bar_config(disable=True)
        seen: list[float] = []
        hook = transformer.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(float(args[0].std()))
        )
        made = pipe([3], num_inference_steps=4, output_type="np",
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
        hook.remove()
        assert len(seen) == 7
        sizes.append(seen[0])
        images.append(torch.from_numpy(made.images))
    assert images[1].isfinite().all()
    assert not torch.equal(images[0], images[1])
    # This pipeline does not multiply its noise by init_noise_sigma: the network would begin with
    # next to nothing.
    assert sizes[0] == sizes[1] == pytest.approx(1, abs=0.2)
    assert sizes[2] < 0.2


def flux_pipeline(scheduler: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A tiny FLUX without text encoders, and what stands for a prompt."""
    torch.manual_seed(0)
    transformer = tiny_flux().to(dtype)
    pipe: Any = FluxPipeline(
        scheduler=scheduler, vae=AutoencoderTiny(latent_channels=1), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": torch.randn(1, 4, 32, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, 16, dtype=dtype),
    }


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux(dynamic: bool, dtype: torch.dtype) -> None:
    config = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic).config
    found = []
    for settings in ({"w_stiff": 0}, {}, {"w_stiff": 0.5, "w_con": 0}):
        scheduler = FlowMatchERKGuidHeunScheduler.from_config(config, **settings)
        pipe, prompt = flux_pipeline(scheduler, dtype)
        made, calls = latents(
            pipe, pipe.transformer, **prompt, num_inference_steps=4, height=16, width=16
        )
        assert calls == 7
        assert made.isfinite().all()
        found.append(made)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_image_to_image_with_lists_of_levels(
    stable_diffusion: dict[str, Any], solver: str, strength: float
) -> None:
    # Before: SD with sigmas= gave an empty batch, FLUX at 0.6 began elsewhere and at 0.3 failed.
    parts = {k: v.float() if isinstance(v, torch.nn.Module) else v
             for k, v in stable_diffusion.items()}  # fmt: skip
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    levels = [9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0]
    pipe: Any = StableDiffusionImg2ImgPipeline(
        scheduler=for_pipeline(PNDMScheduler(**SD), solver), requires_safety_checker=False, **parts
    )
    begins: list[float] = []
    step = pipe.scheduler.step

    def noted(output: Any, time: Any, *args: Any, **options: Any) -> Any:
        begins.append(float(pipe.scheduler.sigmas[pipe.scheduler.step_index]))
        return step(output, time, *args, **options)

    pipe.scheduler.step = noted
    made, calls = latents(
        pipe, parts["unet"], prompt="a cat", image=image, strength=strength, sigmas=levels
    )
    whole = 7 if solver == "modal" else 13
    assert calls == int(whole * strength)
    assert made.isfinite().all()
    # It begins at the level that its share of the calls leads to, and passes all after it.
    rest = [level for level in levels[:-1] if level <= begins[0] * (1 + 1e-6)]
    assert list(dict.fromkeys(begins)) == pytest.approx(rest)

    flux, prompt = flux_pipeline(for_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), solver))
    other = FluxImg2ImgPipeline(**flux.components)
    made, calls = latents(
        other, flux.transformer, **prompt, image=image, strength=strength, num_inference_steps=7,
        height=16, width=16,
    )  # fmt: skip
    assert calls == whole - int(max(whole - whole * strength, 0))
    assert made.isfinite().all()


def test_flow_matching_without_guidance_is_diffusers_own_loop() -> None:
    def drift(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (1 + t / 1000)

    ends = []
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        FlowMatchERKGuidHeunScheduler(shift=3.0, w_stiff=0),
    ):
        scheduler.set_timesteps(6)
        x = torch.ones(1, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(drift(x, t), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_networks_of_mean_velocities_are_refused() -> None:
    # HunyuanImage distilled: its pipeline tells the network where the step ends. Before: a solver
    # took that for a velocity, with errors of 2 to 6 % where Euler has none.
    kind = getattr(diffusers, "HunyuanImageTransformer2DModel", None)
    if kind is None:
        pytest.skip("this diffusers has no such network")
    transformer = kind(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=8, num_layers=0,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False,
        text_embed_dim=8, text_embed_2_dim=None, rope_axes_dim=(4, 4), use_meanflow=True,
    )  # fmt: skip
    pipe = DiffusionPipeline()
    pipe.register_modules(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0)
    )
    for solver in ("modal", "heun"):
        with pytest.raises(ValueError, match=r"says where to jump to \(use_meanflow\)"):
            for_pipeline(pipe, solver)


def test_pipelines_around_others_are_refused() -> None:
    # VisualCloze: the inner pipeline has the scheduler from the start. Before: nothing changed.
    flux, _ = flux_pipeline(FlowMatchEulerDiscreteScheduler())

    class Around(DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, transformer: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)
            self.generation_pipe = flux

    pipe = Around(flux.transformer, flux.scheduler)
    with pytest.raises(ValueError, match=r"set pipe\.generation_pipe\.scheduler to"):
        for_pipeline(pipe)
    assert for_pipeline(pipe.generation_pipe).name == "flow"
