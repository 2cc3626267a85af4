"""The scheduler for a pipeline, whatever it has."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging

from erk_guid.generation.settings import Settings, read_settings
from erk_guid.integrations.diffusers import heun, modal
from erk_guid.integrations.diffusers.configs import (
    CLASSES,
    OURS_ALONE,
    OWN,
    TOLD,
    UNDERSTOOD,
    check_understood,
    family_of,
)
from erk_guid.integrations.diffusers.families import keep_shift
from erk_guid.integrations.diffusers.fitted import (
    SOLVERS,
    PipelineFit,
    check_range,
    options_of_settings,
)
from erk_guid.solvers import name_of

logger = logging.get_logger(__name__)

DEFAULT_SOLVER = "modal"
SPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "timestep_spacing")
"""Options that space levels, which say nothing beside fitted ones."""
_COUNTED = (
    "i < int(num_inference_steps *", "guidance_schedule[i]", "edit_warmup_steps",
    "max_iter_to_alter",
)  # fmt: skip
"""Parts of programs that count the calls of a run where they mean its steps."""
_INDEXED = re.compile(r"(?<!inverse_scheduler\.)alphas_cumprod\[time")


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
    config = config_of(pipe)
    # What an earlier call was told makes way for what is asked for now.
    left = TOLD if config["_class_name"] in OWN else OURS_ALONE
    config = {key: value for key, value in config.items() if key not in left}
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
        of_settings = options_of_settings(found, solver, family)
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
            "calls a step its strength (or how long an adapter or guidance acts) would be another "
            "one; take 'modal'"
        )
    if solver == "heun" and has_guider(pipe):
        raise ValueError(
            f"the guider of {type(pipe).__name__} counts calls where it means steps, so that with "
            "Heun's two calls a step guidance would end halfway; take 'modal'"
        )
    if family == "discrete" and (keeps_unit_variance(pipe) or scales_nothing(type(pipe))):
        options = {"unit_variance": True} | options
    loop = _loop(type(pipe))
    if solver == "heun" and loop is not None and "* skip_layer_guidance" in _program(loop):
        logger.warning(
            f"{type(pipe).__name__} counts calls in skip_layer_guidance_start and _stop: with "
            "Heun's two calls a step give twice their values"
        )
    if family == "flow" and options.get("levels") and hasattr(pipe, "scheduler"):
        # Mochi and Stable Audio 3 name noise levels that are not evenly spaced.
        own = "sigmas" not in inspect.signature(type(pipe).__call__).parameters
        options = {"own_lists": own} | options
    scheduler = _class(family, solver).from_config(config, **options)
    if "shift" not in options:
        keep_shift(getattr(pipe, "scheduler", pipe), scheduler)
    if options.get("levels"):
        check_range(scheduler, options["levels"])
    return scheduler


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


def has_guider(pipe: Any) -> bool:
    """Return whether a modular pipeline has a guider, which is told calls and the number of steps.

    Most of them (SDXL's, SD3's, Wan's) then guide the first N of Heun's 2 N - 1 calls alone. A few
    tell it the number of calls; which, their program does not say in one place.
    """
    modular = any(kind.__name__ == "ModularPipeline" for kind in type(pipe).__mro__)
    return modular and getattr(pipe, "guider", None) is not None


def forgets_order(kind: type[Any]) -> bool:
    """Return whether a class of pipelines counts calls where it means steps.

    Kandinsky's image-to-image pipelines do, SDXL's with an adapter, and those with a list of
    strengths or numbers of steps to act in (Ideogram 4, semantic guidance, Attend-and-Excite). With
    two calls a step another strength comes out.
    """
    base = _loop(kind)
    program = "" if base is None else _program(base)
    strength = "timesteps[t_start" in program and "t_start * self.scheduler" not in program
    return strength or any(part in program for part in _COUNTED)


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


def config_of(pipe: Any) -> Mapping[str, Any]:
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
