"""Noise levels fitted to a pipeline, with everything in its loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from erk_guid.generation.settings import PROCESS
from erk_guid.guidance import ERKGuidance, Guidance
from erk_guid.integrations.diffusers.configs import family_of
from erk_guid.integrations.diffusers.fitted import (
    FAMILY,
    SOLVERS,
    STEPPED_IN,
    PipelineFit,
    options_of_solver,
)
from erk_guid.integrations.diffusers.pipelines import DEFAULT_SOLVER, config_of, for_pipeline
from erk_guid.integrations.diffusers.probe import PipelineDenoiser, end_of_run, usual_times
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, RectifiedFlow
from erk_guid.sampling import sample
from erk_guid.solvers import Heun, Modal, Solver, name_of
from erk_guid.studies.fitting import fit as fit_denoiser
from erk_guid.studies.fitting.fit_files import settings_of_fit
from erk_guid.studies.fitting.levels import FEWEST, Progress

SAMPLES = 64
BATCH = 4
RUNS_AGREE = 1e-2
"""How far a run of the pipeline may end from the same run outside of it, as a share."""
TWICE = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
"""Pipelines that call `step` twice for each point, to learn the clean data first."""
MOST_STEPS = 1000
ENDS_HIGH = 0.9
"""A level with which a pipeline's finest run ends, as a part of the one with which its run ends,
below which the last level of a fit is fitted, too."""
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
    if any(kind.__name__ in TWICE for kind in type(pipe).__mro__):
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
    config = config_of(pipe)
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

    def check_run(scheduler: Any, solver: Solver, times: Sequence[float], when: str) -> None:
        """Refuse a pipeline that does not end where `fit` takes it to end."""
        theirs = end_of_run(pipe, scheduler, steps, arguments([0]))
        ours = sample(
            lambda x, t: denoiser(x, t, torch.zeros(1, 1)), denoiser.starts([0]),
            torch.tensor(times, dtype=torch.float64),
            solver=solver, guidance=guidance, process=process,
        )  # fmt: skip
        apart = float((theirs[: len(ours)].to(ours) - ours).norm() / ours.norm())
        if not apart <= RUNS_AGREE:
            raise ValueError(
                f"{type(pipe).__name__} {when} ends elsewhere ({apart:.2g} of its size) than the "
                "same steps with the same network outside of its loop: it does more between its "
                "steps than fit can see, so that no fit would be true of it. Look at what is in "
                "call, and at its guidance; without, keep the pipeline's own levels"
            )

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
        options = options_of_solver(chosen[0], guidance or ERKGuidance())
        levels = [*times, 0.0]
        own = for_pipeline(pipe, name, **options)
        check_run(own, chosen[0], levels, "with its own levels")
        given = for_pipeline(pipe, name, **options, levels=levels)
        check_run(given, chosen[0], levels, "with levels that it is given")
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
        measured = {
            PROCESS: None if family != "flow" else repr(RectifiedFlow()),
            STEPPED_IN: repr(process),
            FAMILY: family,
            "pipeline": type(pipe).__name__,
            "seeds": [seed, samples],
        }
        found = PipelineFit(fitted, settings_of_fit(fitted, measured))
        made = for_pipeline(pipe, settings=found)
        check_run(made, fitted.solver, fitted.sigmas.tolist(), "with the fitted levels")
    finally:
        denoiser.close()
    return found


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
