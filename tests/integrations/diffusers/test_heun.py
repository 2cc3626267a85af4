"""The schedulers for diffusers' pipelines, against diffusers' own and against our sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import oracle
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from diffusers.schedulers import AysSchedules

import erk_guid
from erk_guid.guidance import make_guidance
from erk_guid.integrations.diffusers import (
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
    ModalScheduler,
)
from erk_guid.integrations.k_diffusion import sample_erk_heun

Scheduler = Any
GUIDED = [{"w_stiff": "auto"}, {"w_stiff": 0.5, "w_con": 0.1}, {"w_stiff": 2.0, "bound": 0.2}]


class Network:
    """An exact denoiser in the shape of a network for images, in the scheduler's prediction."""

    def __init__(self, prediction: str = "epsilon", flow: bool = False) -> None:
        self.denoiser = oracle("tree5")[0]
        self.prediction, self.flow, self.calls = prediction, flow, 0

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        flat = self.denoiser(x.reshape(-1, 2).double(), sigma.double())
        return flat.reshape(x.shape).to(x.dtype)

    def __call__(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """x as the scheduler keeps it; level: sigma, or t for flow matching."""
        self.calls += 1
        if self.flow:
            rest = (1 - level).clamp_min(1e-7)
            return (x - self.denoised(x / rest, level / rest)) / level
        d = self.denoised(x, level)
        if self.prediction == "sample":
            return d
        if self.prediction == "v_prediction":  # D = x / (s^2 + 1) - s v / sqrt(s^2 + 1)
            return (x / (level**2 + 1) - d) * (level**2 + 1).sqrt() / level
        return (x - d) / level


def run(
    scheduler: Scheduler, network: Network, x: torch.Tensor, edit: int | None = None, begin: int = 0
) -> torch.Tensor:
    """What a pipeline does, from the timestep `begin` on; `edit`: change x after that call."""
    scheduler.set_begin_index(begin)
    for k, time in enumerate(scheduler.timesteps[begin:]):
        index = scheduler.step_index if scheduler.step_index is not None else begin
        x = scheduler.step(network(x, scheduler.sigmas[index]), time, x, return_dict=False)[0]
        if edit == k:
            x = x + 0.05
    return x


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_networks_here_predict_what_diffusers_expects(prediction: str) -> None:
    # diffusers' own Heun, and nothing of ours but the denoiser's integration: catches a
    # prediction that our schedulers and our tests get wrong in the same way.
    network = Network(prediction, flow=prediction == "flow")
    if prediction == "flow":
        scheduler: Any = diffusers.FlowMatchHeunDiscreteScheduler()
    else:
        scheduler = HeunDiscreteScheduler(prediction_type=prediction, use_karras_sigmas=True)
    scheduler.set_timesteps(9)
    start = noise() * scheduler.init_noise_sigma if prediction != "flow" else noise()
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])

    def denoised(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        rest = (1 - level).clamp_min(1e-7) if prediction == "flow" else torch.ones(())
        return network.denoised(x / rest, level / rest)

    expected = erk_guid.sample(denoised, start, sigmas)
    found = run(scheduler, network, start)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_without_guidance_every_call_is_diffusers_own(prediction: str) -> None:
    config = {"prediction_type": prediction, "use_karras_sigmas": True}
    ends = []
    for scheduler in (HeunDiscreteScheduler(**config), ERKGuidHeunScheduler(**config, w_stiff=0)):
        scheduler.set_timesteps(7)
        start = noise() * scheduler.init_noise_sigma
        ends.append(run(scheduler, Network(prediction), start))
    assert torch.equal(*ends)
    ends = []
    for flow in (FlowMatchHeunDiscreteScheduler(shift=3.0),
                 FlowMatchERKGuidHeunScheduler(shift=3.0, w_stiff=0)):  # fmt: skip
        flow.set_timesteps(7)
        ends.append(run(flow, Network(flow=True), noise()))
    assert torch.equal(*ends)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_in_bfloat16_it_is_nearer_than_diffusers_own(prediction: str) -> None:
    # Catches: a step that computes in the pipeline's precision, as diffusers' own does.
    flow = prediction == "flow"
    kinds: Any = (
        (FlowMatchHeunDiscreteScheduler, FlowMatchERKGuidHeunScheduler)
        if flow
        else (HeunDiscreteScheduler, ERKGuidHeunScheduler)
    )
    config = {} if flow else {"prediction_type": prediction, "use_karras_sigmas": True}

    def ended(scheduler: Scheduler, dtype: torch.dtype) -> torch.Tensor:
        scheduler.set_timesteps(7)
        start = noise(torch.bfloat16).to(dtype) * (1 if flow else scheduler.init_noise_sigma)
        return run(scheduler, Network(prediction, flow), start.to(dtype)).float()

    exact = ended(kinds[0](**config), torch.float32)
    theirs = ended(kinds[0](**config), torch.bfloat16)
    ours = ended(kinds[1](**config, w_stiff=0), torch.bfloat16)
    assert (ours - exact).norm() <= (theirs - exact).norm()


@pytest.mark.parametrize("settings", GUIDED)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guided_it_is_our_sampler(settings: dict[str, Any], prediction: str) -> None:
    scheduler = ERKGuidHeunScheduler(prediction_type=prediction, **settings)
    scheduler.set_timesteps(9)
    network = Network(prediction)
    start = noise() * scheduler.init_noise_sigma
    found = run(scheduler, network, start)
    assert network.calls == 17
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    guidance = make_guidance(**settings)
    expected = erk_guid.sample(network.denoised, start, sigmas, guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    plain = erk_guid.sample(network.denoised, start, sigmas)
    assert (expected - plain).abs().max() > 20 * (found - expected).abs().max()


@pytest.mark.parametrize("settings", [{"w_stiff": "auto"}])
def test_guided_flow_matching_is_our_sampler(settings: dict[str, Any]) -> None:
    # t / (1 - t) is sigma, x / (1 - t) the field's x.
    scheduler = FlowMatchERKGuidHeunScheduler(**settings)
    scheduler.set_timesteps(sigmas=[0.95, 0.8, 0.6, 0.4, 0.2, 0.05])
    network = Network(flow=True)
    start = noise() * 0.95
    found = run(scheduler, network, start)
    assert network.calls == 11
    times = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    guidance = erk_guid.ParameterFreeGuidance()
    sigmas = times / (1 - times)
    expected = erk_guid.sample(network.denoised, start / 0.05, sigmas, guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", GUIDED[1:])
def test_published_guidance_of_flow_matching_is_our_sampler(settings: dict[str, Any]) -> None:
    # The ODE dx/dt = (x - D) / t is ours with t for sigma, from pure noise on.
    scheduler = FlowMatchERKGuidHeunScheduler(shift=3.0, **settings)
    scheduler.set_timesteps(8)
    network = Network(flow=True)
    found = run(scheduler, network, noise())

    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t * network(x, t)

    times = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    guidance = make_guidance(**settings)
    expected = erk_guid.sample(denoised, noise(), times, guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = erk_guid.sample(denoised, noise(), times)
    assert (expected - plain).abs().max() > 20 * (found - expected).abs().max()


def test_the_k_diffusion_adapter_does_the_same_to_flow_models() -> None:
    scheduler = FlowMatchERKGuidHeunScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    network = Network(flow=True)
    found = run(scheduler, network, noise())

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t[0] * network(x, t[0])

    times = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    same = sample_erk_heun(model, noise(), times, flow=True, disable=True)
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-4)
    other = sample_erk_heun(model, noise(), times, disable=True)
    assert (other - found).abs().max() > 1e-3


@pytest.mark.parametrize("settings", GUIDED)
def test_flow_matching_from_pure_noise(settings: dict[str, Any]) -> None:
    # t = 1 is sigma = infinity; and guidance must not do harm where a finer run is known.
    def ended(steps: int, **settings: Any) -> torch.Tensor:
        scheduler = FlowMatchERKGuidHeunScheduler(shift=3.0, **settings)
        scheduler.set_timesteps(steps)
        return run(scheduler, Network(flow=True), noise())

    fine = ended(400, w_stiff=0)
    plain, guided = ((ended(8, **s) - fine).norm() for s in ({"w_stiff": 0}, settings))
    assert guided.isfinite()
    if settings["w_stiff"] == "auto":
        assert guided < plain


@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
        {"use_exponential_sigmas": True, "num_train_timesteps": 500},
        {"use_beta_sigmas": True, "beta_start": 0.001, "beta_end": 0.01},
        {"trained_betas": [0.001, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]},
        {"clip_sample": True, "clip_sample_range": 0.3},
    ],
)
def test_every_option_reaches_diffusers_own(config: dict[str, Any]) -> None:
    network, ends = Network(), []
    theirs, ours = HeunDiscreteScheduler(**config), ERKGuidHeunScheduler(**config, w_stiff=0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, network, noise() * scheduler.init_noise_sigma))
    assert torch.equal(theirs.sigmas, ours.sigmas)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    assert torch.equal(*ends)


def test_what_cannot_be_guided_is_refused() -> None:
    scheduler = FlowMatchERKGuidHeunScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="s_churn must be 0"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), s_churn=0.5)
    with pytest.raises(TypeError, match="s_chrun"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), s_chrun=0.5)


def test_flow_timesteps_and_spacings_are_the_euler_schedulers() -> None:
    for config in ({"use_karras_sigmas": True}, {"use_beta_sigmas": True}, {"shift_terminal": 0.1}):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        ours = FlowMatchERKGuidHeunScheduler(**config)
        for each in (theirs, ours):
            each.set_timesteps(5)
        levels = torch.cat([ours.sigmas[:1], ours.sigmas[1::2]])
        torch.testing.assert_close(levels, theirs.sigmas)
    times = [900.0, 500.0, 100.0]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    ours = FlowMatchERKGuidHeunScheduler()
    ours.set_timesteps(timesteps=times)
    theirs.set_timesteps(timesteps=times)
    assert torch.cat([ours.timesteps[:1], ours.timesteps[1::2]]).tolist() == pytest.approx(
        theirs.timesteps.tolist()
    )
    assert torch.equal(ours.timesteps[1::2], ours.timesteps[2::2])


def test_a_flows_noise_levels_are_checked() -> None:
    scheduler = FlowMatchERKGuidHeunScheduler()
    for sigmas in ([1.0, 0.6, 0.3], [1.0, 0.6, 0.3, 0.0]):  # the 0 is implied
        scheduler.set_timesteps(sigmas=sigmas)
        torch.testing.assert_close(scheduler.sigmas[1::2], torch.tensor([0.6, 0.3, 0.0]))
    with pytest.raises(ValueError, match="must fall strictly"):
        scheduler.set_timesteps(sigmas=[0.3, 0.6, 1.0])


def test_the_dtype_of_what_comes_back_is_diffusers() -> None:
    # A network under autocast gives float16 for a float32 sample.
    for settings in ({"w_stiff": 0}, {"w_stiff": "auto"}):
        scheduler = ERKGuidHeunScheduler(**settings)
        scheduler.set_timesteps(4)
        x = noise() * scheduler.init_noise_sigma
        made = scheduler.step(noise().half(), scheduler.timesteps[0], x).prev_sample
        assert made.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_solution_is_not_built_on_a_rounded_point(dtype: torch.dtype) -> None:
    # The same denoised images in both precisions: what the pipeline's rounding of Euler's
    # solution does to the end of the step is that of the end itself, no more.
    first, second = noise(dtype), 0.9 * noise(dtype)
    ends = {}
    for kept in (torch.float32, dtype):
        scheduler = ERKGuidHeunScheduler(prediction_type="sample", use_karras_sigmas=True)
        scheduler.set_timesteps(20)
        x = (noise(dtype) * 10).to(kept)
        for output, time in zip((first, second), scheduler.timesteps, strict=False):
            x = scheduler.step(output.to(kept), time, x).prev_sample
        ends[kept] = x
    torch.testing.assert_close(ends[dtype], ends[torch.float32].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("edit", [3, 4])
def test_a_sample_edited_everywhere_has_no_pair(flow: bool, edit: int) -> None:
    # After call 3 a step begins and after call 4 it is in the middle. With the pair kept, the
    # step after the edit would be corrected by a difference that is mostly the edit.
    kind: Any = FlowMatchERKGuidHeunScheduler if flow else ERKGuidHeunScheduler
    network = Network(flow=flow)
    scheduler, plain = kind(w_stiff=0.7, w_con=0), kind(w_stiff=0)
    for each in (scheduler, plain):
        each.set_timesteps(6)
    x = noise() * (1 if flow else scheduler.init_noise_sigma)
    scheduler.set_begin_index(0)
    plain.set_begin_index(0)
    # The guided run up to the edit; from there on one step by each from the same x.
    levels = scheduler.sigmas
    for k, time in enumerate(scheduler.timesteps[: edit + 1]):
        x = scheduler.step(network(x, levels[k]), time, x, return_dict=False)[0]
    x = x + 0.05
    plain._step_index, plain._step = scheduler.step_index, scheduler._step
    ends = []
    for each in (scheduler, plain):
        y = x
        for k in range(edit + 1, edit + 3):
            y = each.step(network(y, levels[k]), each.timesteps[k], y, return_dict=False)[0]
            if k % 2 == 1:  # the step ends
                break
        ends.append(y)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


def test_a_start_in_mid_schedule_and_a_second_run() -> None:
    scheduler = ERKGuidHeunScheduler(w_stiff="auto")
    scheduler.set_timesteps(8)
    network = Network()
    start = noise() * scheduler.sigmas[6]
    first = run(scheduler, network, start, begin=6)  # 3 steps in, as image-to-image has it
    sigmas = torch.cat([scheduler.sigmas[6:7], scheduler.sigmas[7::2]])
    auto = erk_guid.ParameterFreeGuidance()
    expected = erk_guid.sample(network.denoised, start, sigmas, guidance=auto)
    torch.testing.assert_close(first, expected, rtol=2e-4, atol=2e-4)
    scheduler.set_timesteps(8)  # as every pipeline call does
    assert torch.equal(run(scheduler, network, start, begin=6), first)


ALIGNED = AysSchedules["StableDiffusionXLSigmas"]
"""AYS (Sabour et al. 2024), ten steps for SDXL."""


def test_noise_levels_from_elsewhere() -> None:
    scheduler = ERKGuidHeunScheduler(w_stiff=0.5, w_con=0.1, use_karras_sigmas=True)
    scheduler.set_timesteps(sigmas=ALIGNED)
    theirs = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012)
    theirs.set_timesteps(sigmas=ALIGNED)
    torch.testing.assert_close(
        torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]), theirs.sigmas
    )
    torch.testing.assert_close(
        torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]]), theirs.timesteps
    )
    network = Network()
    start = noise() * ALIGNED[0]
    found = run(scheduler, network, start)
    assert network.calls == 19
    expected = erk_guid.sample(
        network.denoised, start, torch.tensor(ALIGNED), guidance=erk_guid.ERKGuidance(0.5, 0.1)
    )
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    # Timesteps do as in diffusers' own.
    plain, ours = HeunDiscreteScheduler(), ERKGuidHeunScheduler()
    for each in (plain, ours):
        each.set_timesteps(timesteps=[999, 850, 500, 100])
    assert torch.equal(plain.timesteps, ours.timesteps)
    assert torch.equal(plain.sigmas, ours.sigmas)
    with pytest.raises(ValueError, match="sigmas stand alone"):
        scheduler.set_timesteps(10, sigmas=ALIGNED)
    with pytest.raises(ValueError, match=r"must fall strictly, but sigmas\[1\] = 2"):
        scheduler.set_timesteps(sigmas=[1.0, 2.0, 0.0])


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
     "UniPCMultistepScheduler"],
)  # fmt: skip
def test_configs_of_other_schedulers(name: str) -> None:
    theirs = getattr(diffusers, name)(
        beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )  # fmt: skip
    ours = ERKGuidHeunScheduler.from_config(theirs.config, w_stiff=0.4)
    assert ours.config.prediction_type == "v_prediction"
    assert ours.config.beta_end == 0.01
    assert ours.guidance == erk_guid.ERKGuidance(0.4)
    assert HeunDiscreteScheduler.from_config(ours.config).config.beta_end == 0.01


def test_saved_and_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in (ERKGuidHeunScheduler, FlowMatchERKGuidHeunScheduler):
        kind(w_stiff=0.3, w_con=0.2, bound=0.5).save_pretrained(tmp_path)
        again = kind.from_pretrained(tmp_path)
        assert again.guidance == erk_guid.ERKGuidance(0.3, 0.2, bound=0.5)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ours = FlowMatchERKGuidHeunScheduler.from_config(flow.config, w_stiff=0.3)
    ours.set_timesteps(sigmas=[1.0, 0.7, 0.4], mu=0.8)
    flow.set_timesteps(sigmas=[1.0, 0.7, 0.4], mu=0.8)
    torch.testing.assert_close(torch.cat([ours.sigmas[:1], ours.sigmas[1::2]]), flow.sigmas)
    torch.testing.assert_close(
        torch.cat([ours.timesteps[:1], ours.timesteps[1::2]]), flow.timesteps
    )
    assert len(ours.timesteps) == 5
    assert "not expected" not in caplog.text
    with pytest.raises(ValueError, match="w_con must not be negative"):
        ERKGuidHeunScheduler(w_stiff=0.5, w_con=-1)


def test_in_bfloat16_the_pair_is_kept_in_float32() -> None:
    # The pair's difference is a few hundredths of x: in bfloat16 it would be mostly rounding.
    network, ends = Network(), {}
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = ERKGuidHeunScheduler()
        scheduler.set_timesteps(8)
        x = noise(torch.bfloat16).to(dtype) * scheduler.init_noise_sigma
        ends[dtype] = run(scheduler, network, x)
    assert ends[torch.bfloat16].dtype == torch.bfloat16
    apart = (ends[torch.bfloat16].float() - ends[torch.float32]).abs()
    assert apart.median() < 0.05
    assert apart.max() < 0.5


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(ModalScheduler, {}), *((ERKGuidHeunScheduler, s) for s in ({"w_stiff": 0}, *GUIDED))],
)
def test_at_unit_variance_it_is_the_same_run(kind: Any, settings: dict[str, Any]) -> None:
    network = Network()
    plain, unit = kind(**settings), kind(**settings, unit_variance=True)
    for scheduler in (plain, unit):
        scheduler.set_timesteps(7)
    x = noise() * plain.sigmas[0]
    y = x / (1 + plain.sigmas[0] ** 2).sqrt()
    for k, time in enumerate(plain.timesteps):
        sigma = plain.sigmas[k]
        scale = (1 + sigma**2).sqrt()
        torch.testing.assert_close(y, plain.scale_model_input(x, time), rtol=1e-3, atol=1e-3)
        assert torch.equal(unit.scale_model_input(y, time), y)
        x = plain.step(network(x, sigma), time, x).prev_sample
        y = unit.step(network(y * scale, sigma), time, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)
    assert unit.init_noise_sigma == 1
    # Image to image begins with this.
    unit.set_timesteps(7)
    time = unit.timesteps[2:3].repeat(6)
    plain.set_timesteps(7)
    noisy = plain.add_noise(noise(), noise(), time)
    sigma = plain.sigmas[plain.index_for_timestep(time[0])]
    torch.testing.assert_close(
        unit.add_noise(noise(), noise(), time), noisy / (1 + sigma**2).sqrt()
    )


def unconditional() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [
        (ERKGuidHeunScheduler(w_stiff=0, unit_variance=True), {}),
        (ERKGuidHeunScheduler(unit_variance=True), {"guidance": erk_guid.ParameterFreeGuidance()}),
        (ModalScheduler(unit_variance=True), {"solver": "modal"}),
    ],
)
def test_an_unconditional_pipeline(scheduler: Scheduler, solver: dict[str, Any]) -> None:
    # DDPMPipeline scales nothing: only at unit variance does its network see what it was
    # trained on. Its end is that of our sampler, the network made a denoiser.
    unet = unconditional()
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    calls: list[Any] = []
    hook = unet.register_forward_hook(lambda *args: calls.append(args[0]))
    made = pipe(generator=torch.Generator().manual_seed(1), num_inference_steps=5, output_type="np")
    hook.remove()
    assert len(calls) == (5 if isinstance(scheduler, ModalScheduler) else 9)
    levels = torch.cat([scheduler.sigmas[:-1], scheduler.sigmas[-1:]])
    times = dict(zip(levels.tolist(), scheduler.timesteps, strict=False))

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found = unet(x / (1 + sigma**2).sqrt(), times[float(sigma)]).sample
        return x - sigma * found

    sigmas = torch.tensor(list(dict.fromkeys(levels.tolist())))
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        end = erk_guid.sample(denoiser, start * (1 + sigmas[0] ** 2).sqrt(), sigmas, **solver)
    expected = (end / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert 0.02 < expected.mean() < 0.98  # not all of it clamped
    torch.testing.assert_close(torch.from_numpy(made.images), expected, rtol=1e-4, atol=1e-4)
