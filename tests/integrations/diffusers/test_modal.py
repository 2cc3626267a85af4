"""The modal solver as schedulers for diffusers, against our sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from integrations.diffusers.test_heun import Network, noise
from integrations.diffusers.test_heun import run as any_run

import erk_guid
from erk_guid.integrations.diffusers import (
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
    FlowMatchModalScheduler,
    ModalScheduler,
    for_pipeline,
)
from erk_guid.solvers import Modal


def run(
    scheduler: Any, network: Network, x: torch.Tensor, edit: int | None = None, begin: int = 0
) -> torch.Tensor:
    """What a pipeline does, from the timestep `begin` on; `edit`: change x after that call."""
    scheduler.set_begin_index(begin)
    for k, time in enumerate(scheduler.timesteps[begin:]):
        scheduler.scale_model_input(x, time) if not network.flow else None
        x = scheduler.step(
            network(x, scheduler.sigmas[begin + k]), time, x, return_dict=False
        )[0]  # fmt: skip
        if edit == k:
            x = x + 0.05
    return x


@pytest.mark.parametrize("config", [
    {}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}, {"use_exponential_sigmas": True},
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
], ids=str)  # fmt: skip
def test_noise_levels_and_scales_are_diffusers_eulers(config: dict[str, Any]) -> None:
    # diffusers' own class beside ours: catches levels or scales that are right only by our word.
    ours, theirs = ModalScheduler(**config), diffusers.EulerDiscreteScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    x, fresh = noise(), torch.randn(6, 2, 1, 1)
    time = ours.timesteps[2]
    scaled = [s.scale_model_input(x, time) for s in (ours, theirs)]
    assert torch.equal(*scaled)
    added = [s.add_noise(x, fresh, time[None]) for s in (ours, theirs)]
    assert torch.equal(*added)


@pytest.mark.parametrize("order", [1, 3, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_is_our_sampler(order: int, prediction: str) -> None:
    scheduler = ModalScheduler(prediction_type=prediction, modal_order=order)
    scheduler.set_timesteps(9)
    network = Network(prediction)
    start = noise() * scheduler.sigmas[0]
    found = run(scheduler, network, start)
    assert network.calls == 9
    expected = erk_guid.sample(network.denoised, start, scheduler.sigmas, solver=Modal(order))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


class Reusing(Network):
    """The same network, but it returns one and the same tensor each time, as CUDA graphs do."""

    kept: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        found = super().__call__(x, level)
        self.kept = found.clone() if self.kept is None else self.kept.copy_(found)
        return self.kept


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "flow"])
@pytest.mark.parametrize("kind", ["modal", "heun"])
def test_a_network_may_return_the_same_tensor_each_time(kind: str, prediction: str) -> None:
    # Catches: a history that holds the network's own output.
    flow = prediction == "flow"
    schedulers: dict[str, Any] = {
        "modal": FlowMatchModalScheduler if flow else ModalScheduler,
        "heun": FlowMatchERKGuidHeunScheduler if flow else ERKGuidHeunScheduler,
    }
    options = {} if flow else {"prediction_type": prediction}
    ends = []
    for network in (Network, Reusing):
        scheduler = schedulers[kind](**options)
        scheduler.set_timesteps(8)
        start = noise() * (1 if flow else scheduler.sigmas[0])
        ends.append(any_run(scheduler, network(prediction, flow=flow), start))
    assert torch.equal(*ends)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_our_sampler(shift: float) -> None:
    scheduler = FlowMatchModalScheduler(shift=shift)
    scheduler.set_timesteps(9)
    network = Network(flow=True)
    found = run(scheduler, network, noise())
    assert network.calls == 9

    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t * network(x, t)

    expected = erk_guid.sample(
        denoised, noise(), scheduler.sigmas, solver="modal", process=erk_guid.RectifiedFlow()
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fine = erk_guid.sample(denoised, noise(), torch.linspace(1, 0, 400), solver="heun")
    euler = erk_guid.sample(denoised, noise(), scheduler.sigmas, solver="euler")
    assert (found - fine).norm() < 0.9 * (euler - fine).norm()


@pytest.mark.parametrize("flow", [False, True])
def test_noise_comes_from_the_pipelines_generator(flow: bool) -> None:
    # Catches noise that the correction takes for a part of the prediction, or noise in another
    # unit than the solver's.
    kind: Any = FlowMatchModalScheduler if flow else ModalScheduler
    scheduler, network = kind(eta=0.7), Network(flow=flow)
    scheduler.set_timesteps(9)
    start = noise() * (1 if flow else scheduler.sigmas[0])

    def seeded(x: torch.Tensor, generators: Any) -> torch.Tensor:
        scheduler.set_timesteps(9)
        scheduler.set_begin_index(0)
        for k, time in enumerate(scheduler.timesteps):
            if not flow:
                scheduler.scale_model_input(x, time)
            output = network(x, scheduler.sigmas[k])
            x = scheduler.step(output, time, x, generator=generators).prev_sample
        return x

    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t * network(x, t) if flow else network.denoised(x, t)

    generator = torch.Generator().manual_seed(5)
    expected = erk_guid.sample(
        denoised, start, scheduler.sigmas, solver=Modal(eta=0.7),
        process=erk_guid.RectifiedFlow() if flow else None,
        randn_like=lambda x: torch.randn(x.shape, generator=generator),
    )  # fmt: skip
    found = seeded(start, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)
    assert not torch.equal(seeded(start, torch.Generator().manual_seed(6)), found)
    # A generator for each sample: its image does not depend on the others.
    each = [torch.Generator().manual_seed(seed) for seed in range(len(start))]
    alone = seeded(start[2:3], [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(seeded(start, each)[2:3], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="eta must be a number from 0"):
        kind(eta=2)


@pytest.mark.parametrize("begin", [0, 3])
def test_fitted_responses(begin: int, tmp_path: Path) -> None:
    answers = (0.1, 0.7, 0.3, 0.6, 0.2, 0.4)
    scheduler = ModalScheduler(
        modal_order=2, modal_response=list(answers), final_sigmas_type="zero"
    )
    scheduler.set_timesteps(8)  # 8 levels above 0, 6 corrected steps between them
    network = Network()
    start = noise() * scheduler.sigmas[begin]
    expected = erk_guid.sample(
        network.denoised, start, scheduler.sigmas[begin:], solver=Modal(2, answers[begin:])
    )
    found = run(scheduler, network, start, begin=begin)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    scheduler.save_pretrained(tmp_path)
    assert ModalScheduler.from_pretrained(tmp_path).config.modal_response == list(answers)
    for steps in (5, 7, 12):
        scheduler.set_timesteps(steps)
        with pytest.raises(ValueError, match="modal_response has 6 numbers, but this schedule has"):
            run(scheduler, network, start)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_edited_samples_keep_their_history(flow: bool, inference: bool) -> None:
    # Samples 0 and 1 are edited after call 3. The others must not notice; and those two, from
    # the edit on, go on from where they were put with the denoised values of before.
    kind: Any = FlowMatchModalScheduler if flow else ModalScheduler
    network = Network(flow=flow)

    def ended(edits: dict[int, float], copied: bool = False) -> torch.Tensor:
        scheduler = kind()
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(0)
        x = noise() * (1 if flow else scheduler.sigmas[0])
        for k, time in enumerate(scheduler.timesteps):
            if not flow:
                scheduler.scale_model_input(x, time)
            x = scheduler.step(network(x, scheduler.sigmas[k]), time, x).prev_sample
            x = x.clone() if copied else x
            if k in edits:
                x[:2] += edits[k]  # in place: the same tensor comes back
        return x

    with torch.inference_mode(inference):
        left, same, edited = ended({}), ended({}, copied=True), ended({3: 0.05})
        every = ended(dict.fromkeys(range(7), 1e-4))
    assert torch.equal(left, same)
    torch.testing.assert_close(edited[2:], left[2:], rtol=1e-5, atol=1e-5)
    assert (edited[:2] - left[:2]).abs().max() > 1e-3
    # An edit at each call that changes next to nothing leaves a method of high order (without a
    # correction). Starting anew it would be Euler's.
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler if flow else EulerDiscreteScheduler
    other = euler()
    other.set_timesteps(8)
    ends = run(other, network, noise() * (1 if flow else other.sigmas[0]))
    fine = kind()
    fine.set_timesteps(100)
    exact = run(fine, network, noise() * (1 if flow else fine.sigmas[0]))
    assert (every - exact)[:2].norm() < 0.9 * (ends - exact)[:2].norm()


def test_a_start_in_mid_schedule_and_a_second_run() -> None:
    scheduler = ModalScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    network = Network()
    start = noise() * scheduler.sigmas[3]
    first = run(scheduler, network, start, begin=3)
    expected = erk_guid.sample(network.denoised, start, scheduler.sigmas[3:], solver="modal")
    torch.testing.assert_close(first, expected, rtol=2e-4, atol=2e-4)
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, network, start, begin=3), first)


@pytest.mark.parametrize("flow", [False, True])
def test_a_new_run_forgets_the_last(flow: bool) -> None:
    # The sample returned last comes back, at the next noise level: only set_timesteps tells that
    # this is another run.
    kind: Any = FlowMatchModalScheduler if flow else ModalScheduler
    network, scheduler, fresh = Network(flow=flow), kind(), kind()
    for each in (scheduler, fresh):
        each.set_timesteps(8)
    x = noise() * (1 if flow else scheduler.sigmas[0])
    for k, time in enumerate(scheduler.timesteps[:4]):
        x = scheduler.step(network(x, scheduler.sigmas[k]), time, x).prev_sample
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, network, x, begin=4), run(fresh, network, x, begin=4))


def test_a_schedule_that_ends_above_zero() -> None:
    scheduler = ModalScheduler(final_sigmas_type="sigma_min")
    scheduler.set_timesteps(6)
    network = Network()
    start = noise() * scheduler.sigmas[0]
    # As diffusers spaces them, the last step has no length.
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2] > 0
    expected = erk_guid.sample(network.denoised, start, scheduler.sigmas[:-1], solver="modal")
    found = run(scheduler, network, start)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_in_bfloat16_what_it_remembers_is_float32() -> None:
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = ModalScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(12)
        x = (noise(torch.bfloat16) * scheduler.sigmas[0]).to(dtype)
        ends[dtype] = run(scheduler, Network(), x)
    assert ends[torch.bfloat16].dtype == torch.bfloat16
    apart = (ends[torch.bfloat16].float() - ends[torch.float32]).abs()
    assert apart.median() < 0.05


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_configs_of_other_schedulers(name: str) -> None:
    # Their solver_order is not ours.
    theirs = getattr(diffusers, name)(beta_end=0.01, beta_schedule="scaled_linear")
    ours = ModalScheduler.from_config(theirs.config)
    assert ours.config.beta_end == 0.01
    assert ours.config.modal_order == 4
    with pytest.raises(ValueError, match="modal combines 1 to 4 evaluations, got order 5"):
        ModalScheduler(modal_order=5)


def test_in_a_pipeline_that_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, norm_num_groups=4, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = DDPMPipeline(unet, ModalScheduler(modal_order=3))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.modal_order == 3
    images = [
        each(generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np")
        .images
        for each in (pipe, again)
    ]  # fmt: skip
    # Checkpoint weights may lie otherwise in memory, which moves the last digit.
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=1e-3, atol=1e-3)


def test_two_times_next_to_pure_noise() -> None:
    # Catches: both taken for one level, so that steps and levels no longer match.
    network = Network(flow=True)
    scheduler = FlowMatchModalScheduler()
    scheduler.set_timesteps(6, sigmas=[1.0, 0.99995, 0.8, 0.6, 0.4, 0.2])
    found = run(scheduler, network, noise())

    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t * network(x, t)

    expected = erk_guid.sample(
        denoised, noise(), scheduler.sigmas, process=erk_guid.RectifiedFlow()
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 2.0, 0.0], "must fall"),
        ([float("nan"), 0.0], "finite"),
        ([-1.0, 0.0], "negative"),
        ([2.0, 1.0, 1.0, 0.0], "must fall"),
        ([2.0, 1.0, 0.0, 0.0], "must fall"),
        ([1.0], "at least two"),
        ([], "at least two"),
    ],
)
def test_levels_that_rise_are_refused(sigmas: list[float], message: str) -> None:
    # Catches: finite nonsense for a list in the wrong order; a level that is there twice, which
    # diffusers' search for the step does not tell apart; noise given back where no step is asked.
    with pytest.raises(ValueError, match=message):
        ModalScheduler().set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("times", [[5000.0, 100.0], [500.0, -5.0]])
def test_timesteps_that_no_network_knows(times: list[float]) -> None:
    # Catches: times beyond the network's, which diffusers takes for the nearest one in silence.
    for kind in (ModalScheduler, ERKGuidHeunScheduler):
        with pytest.raises(ValueError, match="timesteps must be within 0 and 1000"):
            kind().set_timesteps(timesteps=times)


@pytest.mark.parametrize(
    ("solver", "told"), [("modal", "by its timestep"), ("modal", "by index"), ("heun", "by index")]
)
@pytest.mark.parametrize("flow", [False, True])
def test_a_loop_that_goes_back_begins_anew(flow: bool, solver: str, told: str) -> None:
    # RePaint and restart sampling add noise to go back. Catches: modal went on with what it
    # remembered of lower levels (13 times the error at 12 steps of EDM's levels).
    kind: Any = FlowMatchEulerDiscreteScheduler if flow else EulerDiscreteScheduler
    network, before, again = Network(flow=flow), 6, 3
    scale = 2 if solver == "heun" else 1  # calls a step

    def made() -> Any:
        scheduler = for_pipeline(kind(**({} if flow else {"use_karras_sigmas": True})), solver)
        scheduler.set_timesteps(10)
        return scheduler

    def calls(scheduler: Any, x: torch.Tensor, indices: range) -> torch.Tensor:
        for index in indices:
            time = scheduler.timesteps[index]
            if not flow:
                scheduler.scale_model_input(x, time)
            x = scheduler.step(network(x, scheduler.sigmas[index]), time, x).prev_sample
        return x

    scheduler = made()
    begin, end = scale * again, len(scheduler.timesteps)
    start = noise() * (1 if flow else scheduler.init_noise_sigma)
    half = calls(scheduler, start, range(scale * before))
    back = half + noise() * scheduler.sigmas[begin]
    scheduler._step_index = begin if told == "by index" else None
    found = calls(scheduler, back, range(begin, end))
    fresh = made()
    fresh.set_begin_index(begin)
    assert torch.equal(found, calls(fresh, back, range(begin, end)))


@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_the_number_of_a_call_is_no_timestep(solver: str) -> None:
    # As in diffusers: enumerate's number in place of the timestep.
    scheduler = for_pipeline(EulerDiscreteScheduler(), solver)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 0 is an index"):
        scheduler.step(noise(), 0, noise())
