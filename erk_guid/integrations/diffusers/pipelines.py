"""The scheduler for a pipeline, whatever it has, and levels fitted to it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from erk_guid.common.errors import printable
from erk_guid.generation.settings import PROCESS, Settings, read_settings
from erk_guid.guidance import Guidance, settings_of
from erk_guid.integrations.diffusers import heun, modal
from erk_guid.integrations.diffusers.configs import (
    CLASSES,
    OWN,
    SOLVERS_OWN,
    UNDERSTOOD,
    check_understood,
    family_of,
)
from erk_guid.integrations.diffusers.families import EDM, keep_shift
from erk_guid.integrations.diffusers.probe import PipelineDenoiser, usual_times
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, RectifiedFlow
from erk_guid.solvers import Heun, Modal, Solver, name_of
from erk_guid.studies.fitting import Fitted
from erk_guid.studies.fitting import fit as fit_denoiser
from erk_guid.studies.fitting.fit_files import settings_of_fit
from erk_guid.studies.fitting.levels import FEWEST, Progress

logger = logging.get_logger(__name__)

SOLVERS = ("modal", "heun")
DEFAULT_SOLVER = "modal"
TWICE = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
"""Pipelines that call `step` twice for each point, to learn the clean data first."""
STEPPED_IN = "stepped_in"
"""Entry of `Settings.measured` that names the process in which the fit took its steps."""
FAMILY = "family"
"""Entry of `Settings.measured` that names the family of the pipeline that was fitted."""
SPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "timestep_spacing")
"""Options that space levels, which say nothing beside fitted ones."""
RANGE = 1.01
"""How far fitted levels may reach above a model's highest noise level."""
MOST_STEPS = 1000
ENDS_HIGH = 0.9
"""A level with which a pipeline's finest run ends, as a part of the one with which its run ends,
below which the last level of a fit is fitted, too."""
_INDEXED = re.compile(r"(?<!inverse_scheduler\.)alphas_cumprod\[time")
SAMPLES = 64
BATCH = 4


def for_pipeline(
    pipe: Any,
    solver: str | None = None,
    *,
    settings: str | Path | Settings | PipelineFit | None = None,
    **options: Any,
) -> Any:
    """Return one of our schedulers for a pipeline, with the settings of the one it has.

        pipe.scheduler = for_pipeline(pipe)
        pipe.scheduler = for_pipeline(pipe, "heun", w_stiff=0.5, w_con=0.1)
        pipe.scheduler = for_pipeline(pipe, settings="settings.json")

    Args:
        pipe: a pipeline of diffusers, or one of its schedulers.
        solver: "modal" (one call of the network per step) or "heun" (two, with guidance). None
            takes that of the settings, or "modal".
        settings: what `fit` found, or the file that ``erk-guid fit`` wrote: noise levels with
            their solver. Of a file without a list of levels (``erk-guid calibrate``) solver and
            guidance are taken; the levels stay the pipeline's.
        options: arguments of the scheduler's class, in place of the config's. Strength, noise and
            levels that an earlier call was told are not kept.

    Returns:
        A scheduler of the family of the pipeline's: for betas, EDM's or flow matching.

    Raises:
        ValueError: the pipeline's scheduler is of none of these families, its config asks for
            what ours does not honour, or the settings are for another solver or family.
        TypeError: the scheduler has no such option, or `pipe` or `settings` is something else.
        ErkGuidError: the settings cannot be read.
    """
    config = _config(pipe)
    if config["_class_name"] in OWN:
        # What an earlier call was told makes way for what is asked for now.
        config = {k: v for k, v in config.items() if k not in (*SOLVERS_OWN, "levels")}
    check_understood(config)
    family = family_of(config)
    if settings is not None and not isinstance(settings, (str, Path, Settings, PipelineFit)):
        raise TypeError(
            "settings must be the path of a file, or what fit returned, got "
            f"{type(settings).__name__}"
        )
    found = settings.settings if isinstance(settings, PipelineFit) else settings
    if isinstance(found, (str, Path)):
        found = read_settings(found, times=True)
    if found is not None:
        of_settings = _options_of(found, solver, family)
        if options.get("levels") is not None and "levels" in of_settings:
            raise ValueError("the settings hold the noise levels: leave levels out")
        options = of_settings | options
        idle = [name for name in SPACING if options.get(name) and options.get("levels")]
        if idle:
            raise ValueError(f"the settings hold the noise levels: leave {idle[0]} out")
        solver = name_of(found.solver())
    solver = DEFAULT_SOLVER if solver is None else solver
    inner = [name for name, part in vars(pipe).items() if isinstance(part, DiffusionPipeline)]
    if inner:
        raise ValueError(
            f"{type(pipe).__name__} runs other pipelines ({', '.join(inner)}), which keep the "
            f"scheduler that they were made with: set pipe.{inner[-1]}.scheduler to "
            f"for_pipeline(pipe.{inner[-1]})"
        )
    if jumps(pipe):
        raise ValueError(
            f"the network of {type(pipe).__name__} says where to jump to (use_meanflow), which is "
            "no derivative: the pipeline's own steps are exact; keep its scheduler"
        )
    if hasattr(pipe, "scheduler") and needs_whole_times(type(pipe)):
        raise ValueError(
            f"{type(pipe).__name__} looks its own numbers up by the scheduler's timesteps, which "
            "must be whole for that; ours are not. Keep its scheduler"
        )
    if solver == "heun" and hasattr(pipe, "scheduler") and forgets_order(type(pipe)):
        raise ValueError(
            f"{type(pipe).__name__} counts calls where it means steps, so that with Heun's two "
            "calls a step its strength (or how long its adapter acts) would be another one; take "
            "'modal'"
        )
    if family == "discrete" and (keeps_unit_variance(pipe) or scales_nothing(type(pipe))):
        options = {"unit_variance": True} | options
    loop = _loop(type(pipe))
    if solver == "heun" and loop is not None and "* skip_layer_guidance" in _program(loop):
        logger.warning(
            f"{type(pipe).__name__} counts calls in skip_layer_guidance_start and _stop: with "
            "Heun's two calls a step give twice their values"
        )
    scheduler = _class(family, solver).from_config(config, **options)
    if "shift" not in options:
        keep_shift(getattr(pipe, "scheduler", pipe), scheduler)
    if options.get("levels"):
        _check_range(scheduler, options["levels"])
    return scheduler


def _check_range(scheduler: Any, levels: Sequence[float]) -> None:
    """Refuse levels that were fitted to a model with other noise levels.

    Raises:
        ValueError: they reach above what the model has been trained on, or do not begin where a
            pipeline over EDM's levels does.
    """
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is not None:
        highest = float(((1 - kept[-1]) / kept[-1]) ** 0.5)
    elif scheduler.name == EDM.name:
        highest = float(scheduler.config.sigma_max)
    else:
        return
    if scheduler.name == EDM.name and levels[0] < highest / RANGE:
        raise ValueError(
            f"the levels begin at {levels[0]:g}, and the pipeline's first noise is of size "
            f"{highest:g}: fit with that sigma_max, or for this pipeline"
        )
    if levels[0] > RANGE * highest:
        raise ValueError(
            f"the levels reach {levels[0]:g}, this model's noise only {highest:.3g}: they were "
            "fitted to another model; fit for this pipeline"
        )


def keeps_unit_variance(pipe: Any) -> bool:
    """Return whether the samples of a pipeline, or scheduler, have unit variance now.

    With most of diffusers' schedulers (DDIM's, DPM++'s) they do, with those over sigma (Euler's,
    Heun's) they do not. Ours goes on as the one before: callbacks, guidance that works on the
    samples and a second pipeline (SDXL's refiner) meet what they have met.
    """
    scheduler = getattr(pipe, "scheduler", pipe)
    return float(getattr(scheduler, "init_noise_sigma", 0.0)) == 1.0


def jumps(pipe: Any) -> bool:
    """Return whether a pipeline's network gives the mean velocity up to the next timestep.

    Such networks (MeanFlow, arXiv 2505.13447; HunyuanImage distilled) are not for solvers.
    """
    configs = [getattr(part, "config", None) for part in vars(pipe).values()]
    return any(isinstance(one, Mapping) and one.get("use_meanflow") for one in configs)


def scales_nothing(kind: type[Any]) -> bool:
    """Return whether a class of pipelines calls its network with the samples as they are.

    Such a pipeline (DDPM's, Kandinsky's, Marigold's) never calls `scale_model_input`, or does not
    scale its first noise (DiT's, Bria's). So its samples must have unit variance. There is no
    flag: this looks into diffusers' program. Of a class from elsewhere that of the pipeline it is
    derived from is taken.
    """
    base = _loop(kind)
    if base is None:
        return False
    program = _program(base)
    noise = "init_noise_sigma" in program or "add_noise" in program
    return not noise or "scale_model_input" not in program


def forgets_order(kind: type[Any]) -> bool:
    """Return whether a class of pipelines counts calls where it means steps.

    Kandinsky's image-to-image pipelines do, and SDXL's with an adapter. With two calls a step
    another strength comes out.
    """
    base = _loop(kind)
    program = "" if base is None else _program(base)
    strength = "timesteps[t_start" in program and "t_start * self.scheduler" not in program
    return strength or "i < int(num_inference_steps *" in program


def needs_whole_times(kind: type[Any]) -> bool:
    """Return whether a class of pipelines indexes a table by the scheduler's timesteps.

    Kandinsky 2.1's image to image, SAG and LEDITS++ do.
    """
    base = _loop(kind)
    return base is not None and bool(_INDEXED.search(_program(base)))


def _loop(kind: type[Any]) -> type[Any] | None:
    """Return the class of diffusers that a pipeline has its loop from; None for none of them."""
    ours = (base for base in kind.__mro__ if base.__module__.startswith("diffusers."))
    return next((base for base in ours if "__call__" in vars(base)), None)


def _program(kind: type[Any]) -> str:
    """Return the text of a class's module; nothing where programs are kept without their text."""
    try:
        return inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError):
        return ""


def _config(pipe: Any) -> Mapping[str, Any]:
    scheduler = getattr(pipe, "scheduler", pipe)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping) or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(
            f"{type(pipe).__name__} is no pipeline of diffusers: it has no scheduler with a config"
        )
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    known = (name for name in names if name in OWN or name in UNDERSTOOD)
    return {**config, "_class_name": next(known, names[0])}


def _class(family: str, solver: str) -> Any:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be {' or '.join(map(repr, SOLVERS))}, got {solver!r}")
    name = CLASSES[family][solver]
    return getattr(heun if solver == "heun" else modal, name)


def _options_of(settings: Settings, solver: str | None, family: str) -> dict[str, Any]:
    """Return the arguments of a scheduler that settings stand for."""
    made = settings.solver()
    name = name_of(made)
    if name not in SOLVERS:
        raise ValueError(
            f"the settings are for the solver {name!r}, which has no scheduler here; fit with "
            f"{' or '.join(SOLVERS)}"
        )
    if solver not in (None, name):
        raise ValueError(f"the settings are for the solver {name!r}, not {solver!r}")
    options: dict[str, Any] = {}
    if isinstance(made, Modal):
        response = None if made.response is None else list(made.response)
        options = {"modal_order": made.order, "modal_response": response, "eta": made.eta}
    else:
        options = {k: v for k, v in settings_of(settings.guidance).items() if v is not None}
    levels = settings.made_for.get("schedule")
    if isinstance(levels, (list, tuple)):
        if (settings.process is not None) != (family == "flow"):
            what = "sigmas" if settings.process is None else f"times of {settings.process}"
            raise ValueError(
                f"the settings hold {what}, and the pipeline's family is {family!r}; fit for this "
                "pipeline"
            )
        own = flow_process(made, settings.guidance) if family == "flow" else None
        if isinstance(own, VE) and settings.measured.get(STEPPED_IN) != repr(own):
            raise ValueError(
                f"the settings were fitted to {name!r} with steps in noise over signal, and this "
                "scheduler takes them in t; fit for this pipeline again"
            )
        of = settings.measured.get(FAMILY)
        if of is not None and of != family:
            raise ValueError(
                f"the settings were fitted to a pipeline of the family {printable(of, 20)!r}, "
                f"this one is of {family!r}; fit for this pipeline"
            )
        end = [0.0] if settings.made_for.get("denoise_to_zero", True) else []
        options["levels"] = [*levels, *end]
    return options


@dataclass(frozen=True)
class PipelineFit:
    """What `fit` found for a pipeline.

    Attributes:
        fitted: levels, errors before and after, cost; see `erk_guid.studies.fitting.Fitted`.
        settings: the same as settings, for `for_pipeline`.
    """

    fitted: Fitted
    settings: Settings

    def write(self, path: str | Path) -> None:
        """Write the settings, for ``for_pipeline(pipe, settings=path)``."""
        self.settings.write(path)

    def __str__(self) -> str:
        return str(self.fitted)


GIVEN = {
    "num_inference_steps": "steps says how many are fitted for",
    "generator": "seed says it",
    "latents": "seed says where to begin",
    "output_type": "latents are what is compared",
    "sigmas": "the levels are what is fitted",
    "timesteps": "the levels are what is fitted",
    "num_images_per_prompt": "each prompt is one sample; name it several times in prompts",
    "num_videos_per_prompt": "each prompt is one sample; name it several times in prompts",
}
"""Arguments of a pipeline that `fit` gives itself, and what says them."""


def fit(
    pipe: Any,
    prompts: Sequence[Any] | None,
    steps: int = 8,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    guidance: Guidance | None = None,
    samples: int = SAMPLES,
    batch: int = BATCH,
    seed: int = 0,
    argument: str = "prompt",
    call: Mapping[str, Any] | None = None,
    trials: int | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> PipelineFit:
    """Find the noise levels at which a pipeline needs the fewest steps, with its own guidance.

    The pipeline's own loop is run, so that everything in it counts: classifier-free guidance,
    adapters, its dtype. What is measured is the distance of the end points from those of a fine
    solution, from the same noise; not which images look better.

        found = fit(pipe, prompts, steps=8, call={"guidance_scale": 5.0})
        found.write("settings.json")
        pipe.scheduler = for_pipeline(pipe, settings="settings.json")

    Args:
        pipe: a pipeline of diffusers that makes images from noise. It is not changed.
        prompts: one for each sample, repeated as needed; None for a pipeline without.
        steps: `num_inference_steps` to fit for.
        solver: "modal" tries its orders 4, 3 and 2; "heun"; or one of their objects.
        guidance: ERK guidance of "heun", such as `erk_guid.ParameterFreeGuidance()`.
        samples: how many; a quarter searches, a quarter chooses, half reports. 16 at least.
        batch: samples in one call of the pipeline.
        seed: of the first sample's noise; the others follow.
        argument: name by which the pipeline takes the prompts (DiT: "class_labels").
        call: further arguments of the pipeline, such as guidance_scale, height and width.
        trials, progress, journal: see `erk_guid.fit`.

    Returns:
        What was found, with the errors before (the pipeline's own levels are among what a fit
        must beat) and after, and the calls and seconds that it took.

    Raises:
        ValueError: a value out of range, or a pipeline that cannot be asked point by point: what
            it does depends on the number of the step, or on chance.
    """
    if prompts is not None and len(prompts) == 0:
        raise ValueError("prompts: give at least one, or None for a pipeline without")
    for what, value, least in (("steps", steps, 2), ("samples", samples, FEWEST),
                               ("batch", batch, 1), ("seed", seed, 0)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")
    if prompts is None and "batch_size" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no batch_size: give prompts")
    given_twice = {**GIVEN, argument: "prompts says it", "batch_size": "batch says it"}
    for key in call or {}:
        if key in given_twice:
            raise ValueError(f"call: leave {key} out; {given_twice[key]}")
    if type(pipe).__name__ in TWICE:
        raise ValueError(
            f"{type(pipe).__name__} calls its scheduler twice for each point, which fit cannot "
            "follow; fit its network as a denoiser with erk_guid.fit"
        )
    if any(getattr(part, "is_cache_enabled", False) for part in vars(pipe).values()):
        raise ValueError(
            "the network's cache answers from calls before, and fit asks in another order: fit "
            "without it (disable_cache), and look whether the levels help with it"
        )
    chosen = _candidates(solver)
    config = _config(pipe)
    family = family_of(config)
    name = name_of(chosen[0])
    spaced = for_pipeline(pipe, name)

    def arguments(rows: Sequence[int]) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed + row) for row in rows]
        given = (
            {"batch_size": len(rows)}
            if prompts is None
            else {argument: [prompts[row % len(prompts)] for row in rows]}
        )
        return {**given, "generator": generators, **(call or {})}

    @functools.cache
    def usual(intervals: int) -> list[float]:
        # One level more than intervals; the step to 0 comes on top.
        return usual_times(pipe, spaced, intervals + 1, arguments([0]))

    times = usual(steps - 1)
    # As the scheduler will step: Heun in t itself, but for its parameter-free form.
    in_flow = family == "flow" and max(times) <= 1
    process = flow_process(chosen[0], guidance) if in_flow else VE()
    probed = for_pipeline(pipe, "modal")
    evaluations = steps if name == "modal" else 2 * steps - 1
    asking = functools.partial(
        PipelineDenoiser, pipe, type(probed), probed.config, arguments, times[0], steps
    )
    denoiser = asking()
    once = asking(evaluations)
    try:
        once.check_steps(denoiser, times)
    except BaseException:
        denoiser.close()
        raise
    finally:
        once.close()
    try:
        rows = [range(i, min(i + batch, samples)) for i in range(0, samples, batch)]
        x = torch.cat([denoiser.starts(part) for part in rows])
        # At t = 1 of a flow there is no signal: the process knows where to begin.
        whole = isinstance(process, RectifiedFlow) and times[0] >= 1
        first, last = process.level(times[0]).sigma, process.level(times[-1]).sigma
        # FLUX's last level is 1 / steps, shifted; "trailing" timesteps end high, too.
        lowest = process.level(usual(_most_intervals(spaced))[-1]).sigma
        fitted = fit_denoiser(
            denoiser, x, evaluations=evaluations,
            solver=chosen if len(chosen) > 1 else chosen[0], guidance=guidance,
            labels=torch.arange(samples)[:, None].to(x), sigma_min=last,
            sigma_max=None if whole else first, process=process, denoise_to_zero=True,
            floor=lowest if lowest < ENDS_HIGH * last else None,
            trials=trials, batch=batch, progress=progress, journal=journal,
            spacings={"pipeline": lambda n: [process.level(t).sigma for t in usual(n)]},
        )  # fmt: skip
    finally:
        denoiser.close()
    flow = None if family != "flow" else repr(RectifiedFlow())
    measured = {
        PROCESS: flow,
        STEPPED_IN: repr(process),
        FAMILY: family,
        "pipeline": type(pipe).__name__,
        "seeds": [seed, samples],
    }
    return PipelineFit(fitted, settings_of_fit(fitted, measured))


def _most_intervals(scheduler: Any) -> int:
    """Return between how many intervals a pipeline divides its range at most, for a fine run."""
    return int(min(scheduler.config.get("num_train_timesteps") or MOST_STEPS, MOST_STEPS)) - 1


def _candidates(solver: str | Solver) -> list[Solver]:
    if solver == "modal":
        return [Modal(), Modal(3), Modal(2)]
    if solver == "heun":
        return [Heun()]
    if isinstance(solver, (Modal, Heun)):
        return [solver]
    raise ValueError(
        f"solver must be {' or '.join(map(repr, SOLVERS))}, or one of their objects, got {solver!r}"
    )
