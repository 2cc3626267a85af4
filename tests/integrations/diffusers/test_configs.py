"""What becomes of the configs of diffusers' own schedulers, and of what its newest ones can do."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers import configuration_utils
from integrations.diffusers.test_heun import Network, noise

import erk_guid
from erk_guid.integrations import diffusers as ours
from erk_guid.integrations.diffusers import for_pipeline
from erk_guid.integrations.diffusers.configs import (
    CLASSES,
    REFUSED,
    REPLACED,
    UNDERSTOOD,
    WITHOUT_EFFECT,
    family_of,
)

HEUN = ("ERKGuidHeunScheduler", "EDMERKGuidHeunScheduler", "FlowMatchERKGuidHeunScheduler")
MODAL = ("ModalScheduler", "EDMModalScheduler", "FlowMatchModalScheduler")
UNIPC_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
UNIPC: Any = diffusers.UniPCMultistepScheduler
EULER: Any = diffusers.EulerDiscreteScheduler
FLOW_EULER: Any = diffusers.FlowMatchEulerDiscreteScheduler
# Wan, Sana and Cosmos 2.5 have such configs.
FLOWS = {
    "UniPC 3": lambda: diffusers.UniPCMultistepScheduler(**UNIPC_FLOW, flow_shift=3.0),
    "UniPC 5": lambda: diffusers.UniPCMultistepScheduler(**UNIPC_FLOW, flow_shift=5.0),
    "UniPC karras": lambda: diffusers.UniPCMultistepScheduler(
        **UNIPC_FLOW, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01
    ),
    "DPM++ 3": lambda: diffusers.DPMSolverMultistepScheduler(**UNIPC_FLOW, flow_shift=3.0),
}


def levels(scheduler: Any) -> torch.Tensor:
    """Noise levels of the steps: a two-stage scheduler repeats them."""
    return torch.tensor(list(dict.fromkeys(scheduler.sigmas.tolist())))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_flow_configs_of_other_schedulers_keep_their_levels(name: str, solver: str) -> None:
    # Before: shift 1.0 in place of 3 or 5, with no more than diffusers' "will be ignored".
    if "karras" in name and "sigma_max" not in UNIPC._get_init_keys(UNIPC):
        pytest.skip("this version's UniPC has no sigma_max")
    theirs: Any = FLOWS[name]()
    scheduler = for_pipeline(theirs, solver)
    assert type(scheduler).__name__ == CLASSES["flow"][solver]
    for each in (theirs, scheduler):
        each.set_timesteps(9)
    torch.testing.assert_close(levels(scheduler), levels(theirs))
    calls = len(scheduler.timesteps)
    assert calls == (9 if solver == "modal" else 17)
    network, x = Network(flow=True), noise()
    for k, time in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, scheduler.sigmas[k]), time, x).prev_sample
    assert x.isfinite().all()
    again = type(scheduler).from_config(scheduler.config)
    again.set_timesteps(9)
    assert torch.equal(again.sigmas, scheduler.sigmas)


class StableAudio:
    """Its scheduler needs a package that is not at hand; this is its config."""

    config: ClassVar[dict[str, Any]] = {
        "_class_name": "CosineDPMSolverMultistepScheduler", "sigma_data": 1.0, "sigma_min": 0.3,
        "sigma_max": 500, "sigma_schedule": "exponential", "prediction_type": "v_prediction",
    }  # fmt: skip


class Stochastic:
    """A config of a scheduler of later versions."""

    config: ClassVar[dict[str, Any]] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "stochastic_sampling": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("taker", "config", "message"),
    [
        ("ModalScheduler", FLOWS["UniPC 3"], "take FlowMatchModalScheduler"),
        ("ERKGuidHeunScheduler", FLOWS["UniPC 3"], "take FlowMatchERKGuidHeunScheduler"),
        ("ERKGuidHeunScheduler", diffusers.FlowMatchEulerDiscreteScheduler,
         "take FlowMatchERKGuidHeunScheduler"),
        ("ModalScheduler", diffusers.EDMEulerScheduler, "take EDMModalScheduler"),
        ("ERKGuidHeunScheduler", diffusers.EDMDPMSolverMultistepScheduler,
         "take EDMERKGuidHeunScheduler"),
        ("FlowMatchModalScheduler", diffusers.EulerDiscreteScheduler, "take ModalScheduler"),
        ("EDMModalScheduler", diffusers.DDIMScheduler, "take ModalScheduler"),
        ("ModalScheduler", diffusers.LCMScheduler, "distilled"),
        ("EDMModalScheduler", StableAudio, "another number"),
        ("ModalScheduler", lambda: diffusers.DDIMScheduler(thresholding=True), "thresholding=True"),
        ("ModalScheduler", lambda: diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True),
         "use_lu_lambdas=True"),
        ("ModalScheduler", lambda: diffusers.DDPMScheduler(variance_type="learned_range"),
         "variance_type='learned_range'"),
        ("FlowMatchModalScheduler", Stochastic, "stochastic_sampling=True"),
        ("ERKGuidHeunScheduler",
         lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous",
                                                  prediction_type="v_prediction"),
         "timestep_type='continuous'"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(taker: str, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, taker).from_config(config().config)


@pytest.mark.parametrize("taker", [*HEUN, *MODAL])
def test_an_option_that_a_class_has_not_is_an_error(taker: str) -> None:
    # Before: dropped in silence.
    kind = getattr(ours, taker)
    with pytest.raises(TypeError, match="has no option w_stif"):
        kind.from_config(kind().config, w_stif=0.5)
    if taker in HEUN:
        with pytest.raises(ValueError, match=r"w_con 0\.1 has no part in w_stiff 'auto'"):
            kind.from_config(kind().config, w_con=0.1)


NEWEST = {
    "discrete": [
        diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler, diffusers.DDIMScheduler,
        diffusers.DDPMScheduler, diffusers.PNDMScheduler, diffusers.LMSDiscreteScheduler,
        diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler, diffusers.DEISMultistepScheduler,
        diffusers.KDPM2DiscreteScheduler, diffusers.SASolverScheduler,
    ],
    "edm": [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler],
    "flow": [
        diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler,
        diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler,
    ],
}  # fmt: skip
MAPPED = {"use_flow_sigmas", "flow_shift"}
"""Names that the flow-matching classes have under another one."""


@pytest.mark.parametrize("solver", ["modal", "heun"])
@pytest.mark.parametrize("family", NEWEST)
def test_every_setting_of_the_newest_schedulers_is_honoured_or_refused(
    family: str, solver: str
) -> None:
    # Fails when a new version of diffusers brings a name that nobody here has thought about.
    kind = getattr(ours, CLASSES[family][solver])
    known = kind._get_init_keys(kind) | REFUSED.keys() | REPLACED | WITHOUT_EFFECT[family]
    known |= MAPPED if family == "flow" else set()
    for scheduler in NEWEST[family]:
        unknown = scheduler._get_init_keys(scheduler) - known - {"self"}
        assert not unknown, f"{scheduler.__name__}: {sorted(unknown)}"


@pytest.mark.parametrize(("levelled", "spacing", "solver"), [
    ("karras", "leading", "modal"), ("karras", "trailing", "heun"),
    ("exponential", "trailing", "modal"), ("beta", "trailing", "modal"),
])  # fmt: skip
@pytest.mark.parametrize("name", [
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPCMultistep",
    "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete",
])  # fmt: skip
def test_spaced_levels_are_those_of_the_pipelines_scheduler(
    name: str, levelled: str, spacing: str, solver: str
) -> None:
    # Before: between Euler's timesteps, also after schedulers that span all of the range. With 20
    # steps and "trailing" the last level was 0.22 in place of 0.03, and the error 6 times theirs.
    if levelled == "beta":
        pytest.importorskip("scipy")
    kind: Any = getattr(diffusers, f"{name}Scheduler")
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "timestep_spacing": spacing, "steps_offset": 1, f"use_{levelled}_sigmas": True,
             "lower_order_final": True}  # fmt: skip
    theirs = kind(
        **{key: value for key, value in given.items() if key in kind._get_init_keys(kind)}
    )
    ours = for_pipeline(theirs, solver)
    for each in (theirs, ours, again := for_pipeline(ours, solver)):
        each.set_timesteps(10)
    # The last step of some goes to the last level once more; ours ends at 0.
    assert len(levels(ours)) == 11
    wanted = levels(theirs)[levels(theirs) > 0]
    torch.testing.assert_close(levels(ours)[:-1], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(levels(again), levels(ours))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("ends", [{"sigma_min": 0.05}, {"sigma_max": 10.0},
                                  {"sigma_min": 0.05, "sigma_max": 10.0}])  # fmt: skip
def test_spaced_levels_with_ends_of_their_own(ends: dict[str, float], spacing: str) -> None:
    # Before: where one end was given, the other one was Euler's (0.49 in place of 0.03).
    if "sigma_min" not in UNIPC._get_init_keys(UNIPC):
        pytest.skip("this diffusers' UniPC has no ends of its own")
    theirs = UNIPC(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                   use_karras_sigmas=True, timestep_spacing=spacing, **ends)  # fmt: skip
    ours = for_pipeline(theirs)
    for each in (theirs, ours):
        each.set_timesteps(6)
    torch.testing.assert_close(levels(ours), levels(theirs), rtol=1e-4, atol=1e-6)


WAN = {**UNIPC_FLOW, "flow_shift": 4.0}


@pytest.mark.parametrize(("theirs", "again"), [
    (UNIPC(**WAN, solver_type="bh1"), FLOW_EULER),
    (diffusers.DPMSolverMultistepScheduler(**WAN, solver_order=3), FLOW_EULER),
    (FLOW_EULER(shift=3.0), FLOW_EULER),
    (diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), EULER),
    (diffusers.DDIMScheduler(set_alpha_to_one=False), EULER),
    (diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0), EULER),
    (diffusers.DDPMScheduler(variance_type="fixed_large"), EULER),
    (diffusers.EDMDPMSolverMultistepScheduler(solver_order=3), diffusers.EDMEulerScheduler),
], ids=lambda given: getattr(given, "__name__", type(given).__name__))  # fmt: skip
@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_the_way_back_by_from_config(theirs: Any, again: Any, solver: str) -> None:
    # As between diffusers' own. Before: what ours have no use for was lost, so that Wan's UniPC
    # came back with levels from betas, and another prediction.
    kind = type(theirs)
    ours = for_pipeline(theirs, solver)
    other = for_pipeline(ours, "heun" if solver == "modal" else "modal")
    longer = again.from_config(ours.config)  # by way of another one of diffusers'
    for made in (ours, other, longer, for_pipeline(longer, solver)):
        back = kind.from_config(made.config)
        for name in kind._get_init_keys(kind) - {"self", "prediction_type"}:
            assert back.config.get(name) == theirs.config.get(name), name
    theirs.set_timesteps(8)
    for made in (ours, other):
        back = kind.from_config(made.config)
        back.set_timesteps(8)
        for name in ("timesteps", "sigmas", "betas", "alphas_cumprod"):
            if hasattr(theirs, name):
                torch.testing.assert_close(getattr(back, name), getattr(theirs, name))


class Derived(ours.ModalScheduler):  # type: ignore[misc]
    """Somebody's own."""


def test_a_class_derived_from_ours_is_saved_and_loaded(tmp_path: Path) -> None:
    # Before: "none of the schedulers whose samples and times are known here".
    made = Derived(beta_schedule="scaled_linear", modal_order=2)
    made.save_pretrained(tmp_path)
    again = Derived.from_pretrained(tmp_path)
    assert type(again) is Derived
    assert again.config.modal_order == 2
    again.set_timesteps(5)
    made.set_timesteps(5)
    torch.testing.assert_close(again.sigmas, made.sigmas)


def test_what_ours_leave_in_another_config_is_not_taken_up_again() -> None:
    # Before: fitted levels and UniPC's spacing came back out of a config of diffusers' Euler.
    fitted = for_pipeline(FLOW_EULER(), levels=[0.9, 0.5, 0.2, 0.0])
    spaced = for_pipeline(UNIPC(**WAN))
    for each in (fitted, spaced):
        euler = FLOW_EULER.from_config(each.config)
        again = for_pipeline(euler)
        for one in (euler, again):
            one.set_timesteps(5)
        torch.testing.assert_close(levels(again), levels(euler))
    euler = EULER.from_config(for_pipeline(diffusers.DDIMScheduler()).config)
    assert not for_pipeline(euler).config.unit_variance  # as its samples, of size sigma


@pytest.mark.parametrize("kind", ["DEISMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_flows_spaced_in_a_way_of_their_own_are_refused(kind: str) -> None:
    theirs = getattr(diffusers, kind)(**UNIPC_FLOW)
    with pytest.raises(ValueError, match=f"{kind} spaces the times of a flow in its own way"):
        for_pipeline(theirs)
    # The way that the message names.
    through = for_pipeline(UNIPC.from_config(theirs.config))
    assert type(through).__name__ == "FlowMatchModalScheduler"


@pytest.mark.parametrize("predicted", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_flows_of_another_prediction_are_refused(predicted: str, solver: str) -> None:
    # diffusers' multistep solvers take these over the levels of a flow (measured with exact
    # denoisers: 0.1 to 0.4 % off with 40 steps). Before: taken for a velocity, 58 to 123 % off.
    for kind in (UNIPC, diffusers.DPMSolverMultistepScheduler):
        scheduler = kind(use_flow_sigmas=True, prediction_type=predicted)
        with pytest.raises(ValueError, match=f"predicts '{predicted}' over the levels of a flow"):
            for_pipeline(scheduler, solver)
        mixed = kind(prediction_type="flow_prediction")  # over levels from betas
        with pytest.raises(ValueError, match="set use_flow_sigmas=True, or keep it"):
            for_pipeline(mixed, solver)
        right = kind(use_flow_sigmas=True, prediction_type="flow_prediction")
        assert for_pipeline(right, solver).name == "flow"


DECLINED = {
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler", "DDIMInverseScheduler", "DDPMWuerstchenScheduler",
    "DPMSolverMultistepInverseScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler",
    "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler", "LCMScheduler",
    "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RFD4ProteinaScheduler", "RePaintScheduler", "SCMScheduler", "ScoreSdeVeScheduler",
    "TCDScheduler", "UnCLIPScheduler", "VQDiffusionScheduler",
}  # fmt: skip
"""Distilled, discrete, stochastic, inverted, or with other times than our families'."""


def test_every_scheduler_of_the_newest_version_is_understood_or_declined() -> None:
    # Catches: usual betas invented for a scheduler that has none (consistency models, UnCLIP, score
    # SDEs). Fails when a new version brings a scheduler that nobody here has thought about.
    flax = "Flax"  # those of earlier versions, for another framework
    names = {name for name in dir(diffusers)
             if name.endswith("Scheduler") and not name.startswith(flax)}  # fmt: skip
    assert names <= UNDERSTOOD | DECLINED
    assert not UNDERSTOOD & DECLINED
    for name in DECLINED:
        kind = type(name, (), {"config": {}, "set_timesteps": None})
        with pytest.raises(ValueError, match=f"^{name} "):
            for_pipeline(kind())
    for name in names & UNDERSTOOD:
        if name == "DPMSolverSDEScheduler":
            continue  # it needs a package that is not at hand
        theirs = getattr(diffusers, name)
        if name.startswith("CogVideoX"):  # its usual betas are shifted, which is refused
            theirs = functools.partial(theirs, snr_shift_scale=1.0)
        own = for_pipeline(theirs())
        own.set_timesteps(5)
        assert own.sigmas[0] > own.sigmas[1]


def test_a_scheduler_of_somebodys_own() -> None:
    class Own(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
        pass

    assert isinstance(for_pipeline(Own()), ours.ModalScheduler)
    for scheduler in (diffusers.UNet2DModel, diffusers.AutoencoderTiny):
        with pytest.raises(TypeError, match="no pipeline of diffusers"):
            for_pipeline(scheduler.__new__(scheduler))
    with pytest.raises(TypeError, match="settings must be the path of a file"):
        for_pipeline(Own(), settings=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_betas_that_eulers_scheduler_does_not_know(solver: str) -> None:
    theirs = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match=r"trained_betas=scheduler\.betas\.tolist\(\)"):
        for_pipeline(theirs, solver)
    own = for_pipeline(theirs, solver, trained_betas=theirs.betas.tolist())
    torch.testing.assert_close(own.alphas_cumprod, theirs.alphas_cumprod)


SET_TIMESTEPS: dict[str, Any] = {
    "discrete": diffusers.EulerDiscreteScheduler, "edm": diffusers.EDMEulerScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}  # fmt: skip


@pytest.mark.parametrize("solver", ["modal", "heun"])
@pytest.mark.parametrize("family", SET_TIMESTEPS)
def test_set_timesteps_and_step_take_what_diffusers_take(family: str, solver: str) -> None:
    # Pipelines look at these signatures to see what they may pass.
    kind, theirs = getattr(ours, CLASSES[family][solver]), SET_TIMESTEPS[family]
    for name in ("set_timesteps", "step"):
        asked = inspect.signature(getattr(theirs, name)).parameters
        has = inspect.signature(getattr(kind, name)).parameters
        assert asked.keys() <= has.keys(), f"{name}: {asked.keys() - has.keys()}"
    assert issubclass(kind, theirs if family != "discrete" or solver == "modal" else
                      diffusers.HeunDiscreteScheduler)  # fmt: skip


def test_defaults_of_the_other_class_are_carried_over() -> None:
    # Before: values that a config left to its class became the defaults of ours.
    theirs = diffusers.DPMSolverMultistepScheduler()
    assert theirs.config.beta_end == 0.02
    assert for_pipeline(theirs, "heun").config.beta_end == 0.02
    assert for_pipeline(diffusers.PNDMScheduler()).config.timestep_spacing == "leading"


SD_1_5 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
"""What Stable Diffusion 1.5's repository has: no spacing, for that came later."""
SHORT = [SD_1_5] + [
    {"_class_name": name}
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
                 "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
]  # fmt: skip


@pytest.mark.parametrize("solver", ["modal", "heun"])
@pytest.mark.parametrize("short", SHORT, ids=lambda short: f"{short['_class_name']}-{len(short)}")
def test_a_file_that_leaves_defaults_out(short: Any, solver: str, tmp_path: Path) -> None:
    # Catches: our defaults (spacing, clipping, betas) for those of the class that the file names.
    # Outside: what diffusers' own class makes of the file.
    (tmp_path / "scheduler_config.json").write_text(json.dumps(short))
    theirs = getattr(diffusers, short["_class_name"]).from_pretrained(tmp_path)
    kind = getattr(ours, CLASSES["discrete"][solver])
    right, made = kind.from_config(theirs.config), kind.from_pretrained(tmp_path)
    for one in (right, made, copied := kind.from_config(short)):
        one.set_timesteps(10)
        assert torch.equal(one.sigmas, right.sigmas)
        assert torch.equal(one.timesteps, right.timesteps)
    for name in ("clip_sample", "prediction_type", "timestep_spacing", "beta_start"):
        if name in theirs.config:
            assert made.config[name] == copied.config[name] == theirs.config[name], name


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_terminal_snr(prediction: str) -> None:
    # Before: ERK Heun began at sigma 14.6.
    config = diffusers.EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction
    )
    for scheduler in (for_pipeline(config), for_pipeline(config, "heun")):
        for each in (config, scheduler):
            each.set_timesteps(6)
        torch.testing.assert_close(levels(scheduler), levels(config))
        assert scheduler.sigmas[0] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("solver", ["modal", "heun"])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edms_preconditioning(solver: str, kind: str, prediction: str) -> None:
    # Before: taken for a scheduler with betas, sigma 157 to 0.010. The network's output is made
    # by the formulas of EDM's paper (table 1), not by diffusers' methods.
    theirs = diffusers.EDMEulerScheduler(
        sigma_schedule=kind, sigma_data=0.7, sigma_max=40.0, prediction_type=prediction
    )
    scheduler = for_pipeline(theirs, solver)
    for each in (theirs, scheduler):
        each.set_timesteps(8)
    assert levels(scheduler).tolist() == levels(theirs).tolist()
    assert scheduler.init_noise_sigma == theirs.init_noise_sigma
    network = Network()
    x = noise() * 40
    sign = 1 if prediction == "epsilon" else -1
    for k, time in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k]
        scaled = scheduler.scale_model_input(x, time)
        torch.testing.assert_close(scaled, x / (sigma**2 + 0.49).sqrt())
        torch.testing.assert_close(time, sigma.log() / 4)
        c_skip = 0.49 / (sigma**2 + 0.49)
        c_out = sign * 0.7 * sigma / (sigma**2 + 0.49).sqrt()
        output = (network.denoised(x, sigma) - c_skip * x) / c_out
        x = scheduler.step(output, time, x).prev_sample
    expected = erk_guid.sample(
        network.denoised, noise() * 40, levels(theirs), solver=solver,
        guidance=erk_guid.ParameterFreeGuidance() if solver == "heun" else None,
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


def test_edms_levels_and_given_clean_data() -> None:
    scheduler = ours.EDMModalScheduler()
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0])  # as levels
    assert scheduler.sigmas.tolist() == [10.0, 3.0, 1.0, 0.0]
    theirs = diffusers.EDMEulerScheduler()
    shares = torch.linspace(0, 1, 5)  # as in diffusers
    for each in (theirs, scheduler):
        each.set_timesteps(sigmas=shares)
    torch.testing.assert_close(theirs.sigmas, scheduler.sigmas)
    # Cosmos hands the clean data over; the output is then of no use.
    network, x = Network(), noise() * 80
    for k, time in enumerate(scheduler.timesteps):
        clean = network.denoised(x, scheduler.sigmas[k])
        nothing = torch.full_like(x, torch.nan)
        x = scheduler.step(nothing, time, x, pred_original_sample=clean).prev_sample
    assert x.isfinite().all()


@pytest.mark.parametrize("solver", ["modal", "heun"])
def test_a_flow_scheduler_with_edms_sigmas(solver: str) -> None:
    # Cosmos Predict2: sigma_max 80 by a flow-matching scheduler, x = clean + sigma noise, and
    # shares that rise for `sigmas`. Before: refused by one, NaN by the other.
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    theirs.register_to_config(sigma_max=80.0, sigma_min=0.002, final_sigmas_type="sigma_min")
    scheduler = for_pipeline(theirs, solver)
    for each in (theirs, scheduler):
        each.set_timesteps(sigmas=torch.linspace(0, 1, 9))
        each.sigmas[-1] = each.sigmas[-2]  # the pipeline does this
    torch.testing.assert_close(levels(scheduler), levels(theirs))
    network, x = Network(), noise() * 80
    for k, time in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k]
        x = scheduler.step((x - network.denoised(x, sigma)) / sigma, time, x).prev_sample
    expected = erk_guid.sample(
        network.denoised, noise() * 80, levels(theirs), solver=solver,
        guidance=erk_guid.ParameterFreeGuidance() if solver == "heun" else None,
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "settings"), [("modal", {}), ("heun", {}), ("heun", {"w_stiff": 0.0})]
)
def test_inverted_times(solver: str, settings: dict[str, Any]) -> None:
    # Mochi: sigmas rise from 0 to 1 and the network predicts clean data minus noise. It is the
    # same run as with falling times and the other sign. Before: refused.
    ends = []
    for inverted in (False, True):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted, shift=3.0)
        scheduler = for_pipeline(theirs, solver, **settings)
        for each in (theirs, scheduler):
            each.set_timesteps(8)
        assert levels(scheduler).tolist() == levels(theirs).tolist()
        network, x = Network(flow=True), noise()
        for k, time in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[k]
            output = -network(x, 1 - sigma) if inverted else network(x, sigma)
            x = scheduler.step(output, time, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["FlowMatchModalScheduler", "FlowMatchERKGuidHeunScheduler"])
def test_training_scripts_find_what_they_call(kind: str) -> None:
    # Before: flow Heun had no set_shift, and its scale_noise failed with a batch of timesteps.
    scheduler = getattr(ours, kind)(shift=3.0, shift_terminal=0.1)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    for each in (scheduler, theirs):
        each.set_shift(2.0)
        each.set_timesteps(6)
    torch.testing.assert_close(levels(scheduler), levels(theirs))
    time = scheduler.timesteps[[0, 0, 0]]
    x, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(
        scheduler.scale_noise(x, time, eps), theirs.scale_noise(x, theirs.timesteps[[0, 0, 0]], eps)
    )
    assert scheduler.time_shift(0.7, 1.0, np.array([0.5])) == theirs.time_shift(
        0.7, 1.0, np.array([0.5])
    )
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.ones(3, 4))


def test_families() -> None:
    assert family_of(diffusers.EulerDiscreteScheduler().config) == "discrete"
    assert family_of(diffusers.FlowMatchHeunDiscreteScheduler().config) == "flow"
    assert family_of({"sigma_data": 0.5, "sigma_max": 80}) == "edm"
    with pytest.raises(TypeError, match="no pipeline of diffusers"):
        for_pipeline(object())
    with pytest.raises(ValueError, match="solver must be 'modal' or 'heun', got 'dpmpp'"):
        for_pipeline(diffusers.EulerDiscreteScheduler(), "dpmpp")


@pytest.mark.parametrize("scheduler", ["DDIM", "FlowMatchEulerDiscrete", "EDMEuler"])
def test_our_solvers_follow_each_other_without_warnings(
    scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: "The config attributes {...} will be ignored. Please verify" for options that are of
    # our other solver.
    said: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda text, *_: said.append(text))
    first = for_pipeline(getattr(diffusers, f"{scheduler}Scheduler")())
    second = for_pipeline(first, "heun", w_stiff=0.5)
    highest = 80.0 if scheduler == "EDMEuler" else 0.9
    third = for_pipeline(second, eta=0.5, levels=[highest, 0.5, 0.0])
    fourth = for_pipeline(third)
    assert said == []
    assert (second.config.w_stiff, third.config.eta) == (0.5, 0.5)
    # Each call says all of it; there is a way back from fitted levels and from noise.
    assert (fourth.config.eta, fourth.config.levels) == (0, None)
    assert for_pipeline(second, "heun").config.w_stiff == "auto"
