"""What becomes of the config of diffusers' own scheduler when one of ours takes its place.

A value is carried over, or has no meaning beside our solver, or is refused by name. Nothing is
dropped without one of these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

CLASSES = {
    "discrete": {"heun": "ERKGuidHeunScheduler", "modal": "ModalScheduler"},
    "edm": {"heun": "EDMERKGuidHeunScheduler", "modal": "EDMModalScheduler"},
    "flow": {"heun": "FlowMatchERKGuidHeunScheduler", "modal": "FlowMatchModalScheduler"},
}
"""Our classes, by family and solver."""
SOLVERS_OWN = frozenset({
    "bound", "eta", "gate", "modal_order", "modal_response", "w_con", "w_stiff",
})  # fmt: skip
"""Options of one of our solvers, which the config of another has no use for."""
TOLD = SOLVERS_OWN | {"levels"}
"""What `for_pipeline` is told anew each time."""
OURS_ALONE = TOLD | {"own_lists", "spaced_by", "unit_variance"}
"""Options that none of diffusers' schedulers has; from ours they may be left in its config."""
OWN = {name: family for family, names in CLASSES.items() for name in names.values()}

REPLACED = frozenset(
    {
        # The solver that ours takes the place of.
        "algorithm_type", "corrector_order", "disable_corrector", "euler_at_final",
        "lower_order_final", "predict_x0", "predictor_order", "skip_prk_steps", "solver_order",
        "solver_p", "solver_type", "tau_func", "use_noise_sampler", "noise_sampler_seed",
        # How far that one's last step goes, and the noise of that one's steps.
        "lambda_min_clipped", "set_alpha_to_one",
        # Of no effect without `thresholding`.
        "dynamic_thresholding_ratio", "sample_max_value",
    }
)  # fmt: skip
"""Settings that belong to the solver that is replaced."""


class Refused(NamedTuple):
    """A setting that ours does not honour.

    Attributes:
        neutral: values that ask for nothing.
        remedy: what to do instead.
    """

    neutral: tuple[Any, ...]
    remedy: str


REFUSED = {
    "thresholding": Refused((False,), "keep diffusers' scheduler, or set thresholding=False"),
    "use_lu_lambdas": Refused((False,), "set use_lu_lambdas=False, or use_karras_sigmas=True"),
    "stochastic_sampling": Refused((False,), "for noise take eta of a modal scheduler"),
    "interpolation_type": Refused(("linear",), "set interpolation_type='linear'"),
    "timestep_type": Refused(("discrete",), "take ModalScheduler, which honours it"),
    "final_sigmas_type": Refused(("zero",), "set final_sigmas_type='zero'"),
    "rescale_betas_zero_snr": Refused((False,), "take a scheduler for betas"),
    "variance_type": Refused(
        (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "the network predicts a variance, too, which this scheduler does not take off",
    ),
    "clip_sample": Refused((False,), "set clip_sample=False"),
    "use_flow_sigmas": Refused((False,), "take a FlowMatch scheduler"),
    "use_dynamic_shifting": Refused((False,), "take a FlowMatch scheduler"),
    "shift_terminal": Refused((None,), "take a FlowMatch scheduler"),
    "trained_betas": Refused((None,), "take a scheduler for betas"),
    "sigma_schedule": Refused(("karras",), "take an EDM scheduler"),
    "snr_shift_scale": Refused((1.0,), "keep diffusers' scheduler"),
    "use_exponential_sigmas": Refused((False,), "set use_exponential_sigmas=False"),
    "use_karras_sigmas": Refused((False, None), "set use_karras_sigmas=False"),
    "use_beta_sigmas": Refused((False,), "set use_beta_sigmas=False"),
    "invert_sigmas": Refused((False,), "take a FlowMatch scheduler"),
}  # fmt: skip
"""Settings that raise unless neutral, where a class has no argument of that name."""

WITHOUT_EFFECT = {
    "discrete": frozenset({"flow_shift", "time_shift_type", "clip_sample_range", "sigma_data",
                           "rho", "shift", "base_shift", "max_shift", "base_image_seq_len",
                           "max_image_seq_len"}),
    "edm": frozenset({"clip_sample_range", "flow_shift", "time_shift_type"}),
    "flow": frozenset({"beta_start", "beta_end", "beta_schedule", "prediction_type",
                       "timestep_spacing", "steps_offset", "clip_sample_range"}),
}  # fmt: skip
"""Settings that say nothing in a family."""

UNDERSTOOD = frozenset({
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler",
    "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
"""Schedulers whose samples, times and predictions are those of one of our families."""
DISTILLED = ("LCM", "TCD", "SCM", "CMStochastic", "Consistency", "HeliosDMD", "FlowMap", "PiFlow")
"""Parts of the names of schedulers for distilled models."""
ONLY_DISTILLED = "original_inference_steps"
"""Setting that only they have; a config need not name its class."""
FLOW_PREDICTION = "flow_prediction"
SPACINGS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
"""Schedulers whose spacing of flow-matching times `spaced_by` may name."""
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Values of beta_schedule that diffusers' Euler and Heun know."""


def family_of(config: Mapping[str, Any]) -> str:
    """Return to which family a scheduler's config belongs: "discrete", "edm" or "flow"."""
    name = str(config.get("_class_name", ""))
    if name in OWN:
        return OWN[name]
    if config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW_PREDICTION:
        return "flow"
    if name.startswith("FlowMatch") or ("shift" in config and "beta_start" not in config):
        return "flow"
    if name.startswith("EDM") or ("sigma_data" in config and "beta_start" not in config):
        return "edm"
    return "discrete"


def check_understood(config: Mapping[str, Any]) -> None:
    """Refuse the config of a scheduler that is not sampled by solving our families' ODEs.

    Raises:
        ValueError: the message says what it is.
    """
    name = str(config.get("_class_name", ""))
    if any(part in name for part in DISTILLED) or ONLY_DISTILLED in config:
        raise ValueError(
            f"{name or 'this scheduler'} belongs to a distilled model, which is not sampled by "
            "solving an ODE; keep it"
        )
    if name == "CosineDPMSolverMultistepScheduler":
        raise ValueError(f"{name} tells its network another number than EDM's; keep it")
    if name and name not in UNDERSTOOD and name not in OWN:
        raise ValueError(
            f"{name} is none of the schedulers whose samples and times are known here; keep it, "
            "or, where they are those of one of diffusers' usual ones, give for_pipeline that one"
        )


def carried_over(
    config: Mapping[str, Any], family: str, taker: str, known: Collection[str]
) -> dict[str, Any]:
    """Return the config for one of our classes.

    Args:
        config: of any scheduler.
        family: of the class.
        taker: its name.
        known: names of its arguments.

    Raises:
        ValueError: the config belongs to another family, or holds what is refused.
    """
    name = str(config.get("_class_name", ""))
    check_understood(config)
    theirs = family_of(config)
    if theirs != family:
        solver = next(s for names in CLASSES.values() for s, n in names.items() if n == taker)
        raise ValueError(
            f"{taker} cannot take the config of {name or 'this scheduler'}: its samples and "
            f"predictions are of another kind; take {CLASSES[theirs][solver]}"
        )
    schedule = config.get("beta_schedule", BETAS[0])
    known_betas = schedule in BETAS or ("Heun" in taker and schedule == "exp")
    if family == "discrete" and config.get("trained_betas") is None and not known_betas:
        raise ValueError(
            f"{taker} does not honour beta_schedule={schedule!r}: pass the betas themselves, "
            "trained_betas=scheduler.betas.tolist()"
        )
    # The values of this scheduler, even those that it left at their defaults: ours differ.
    found = {key: value for key, value in config.items() if key != "_use_default_values"}
    if family == "flow":
        found = _flow(found, name)
    for key, value in list(found.items()):
        if key.startswith("_") or key in known:
            continue
        refused = REFUSED.get(key)
        if refused is not None and not any(value == neutral for neutral in refused.neutral):
            raise ValueError(f"{taker} does not honour {key}={value!r}: {refused.remedy}")
        if refused is not None or key in REPLACED or key in WITHOUT_EFFECT[family]:
            del found[key]
    return found


def _flow(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the config of a flow with the names of diffusers' flow-matching schedulers."""
    if name.startswith("FlowMatch"):  # the rest is what it kept from a scheduler before it
        left = ("use_flow_sigmas", "flow_shift", "trained_betas", "rescale_betas_zero_snr")
        return {key: value for key, value in config.items() if key not in left}
    if not config.pop("use_flow_sigmas", False):
        if config.get("prediction_type") == FLOW_PREDICTION and "beta_start" in config:
            raise ValueError(
                f"{name or 'this scheduler'} takes {FLOW_PREDICTION!r} over levels from betas: set "
                "use_flow_sigmas=True, or keep it"
            )
        config.pop("flow_shift", None)
        return config
    predicted = config.get("prediction_type", FLOW_PREDICTION)
    if predicted != FLOW_PREDICTION:
        raise ValueError(
            f"{name or 'this scheduler'} has a network that predicts {predicted!r} over the levels "
            f"of a flow; ours take {FLOW_PREDICTION!r} alone: keep it"
        )
    shift = config.pop("flow_shift", 1.0)
    config.pop("trained_betas", None)
    config.pop("rescale_betas_zero_snr", None)
    if name and name not in SPACINGS:
        raise ValueError(
            f"{name} spaces the times of a flow in its own way; keep it, or take "
            f"{' or '.join(SPACINGS)} first"
        )
    if not name:
        name = "DPMSolver" if "algorithm_type" in config else "UniPC"
        name += "MultistepScheduler"
    return config | {"shift": shift, "spaced_by": name}
