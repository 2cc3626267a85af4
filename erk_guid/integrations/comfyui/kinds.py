"""What kind of x a model of ComfyUI has: clean plus sigma noise, or a flow between the two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch

from erk_guid.common.errors import ErkGuidError, reason_of
from erk_guid.guidance import Guidance
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, Process, RectifiedFlow
from erk_guid.solvers import Modal, Solver

Kind = Literal["sigma", "flow"]
DETECT = "detect"
MODEL_TYPES = (DETECT, *get_args(Kind))

DEEPEST = 16
"""Wrappers around a model that are looked through."""
PROBED = 0.25
"""Noise level at which a model is asked how it mixes noise and data."""
REMEDY = "set model_type to 'sigma' or 'flow' in the node 'ERK-Guid sampler'"


def process_for(
    solver: Solver, guidance: Guidance | None, model: Any, model_type: str
) -> Process | None:
    """Return the process to integrate a model of ComfyUI in, for `erk_guid.sample`.

    Plain and published one-step methods have the same formula for both kinds of model. For them
    nothing is detected, so that nothing can go wrong.

    Args:
        solver, guidance: the method.
        model: what ComfyUI calls samplers with.
        model_type: one of `MODEL_TYPES`.

    Raises:
        ErkGuidError: it must be detected, and cannot be.
    """
    in_flow = _process_of_flows(solver, guidance)
    if isinstance(in_flow, VE):
        return None
    kind = kind_of(model_sampling_of(model)) if model_type == DETECT else model_type
    return in_flow if kind == "flow" else None


def _process_of_flows(solver: Solver, guidance: Guidance | None) -> Process:
    if solver.one_step or isinstance(solver, Modal):
        return flow_process(solver, guidance)
    return RectifiedFlow()  # the other multistep solvers suppose smooth D in log sigma


def model_sampling_of(model: Any) -> Any:
    """Return the part of a model that mixes noise and data; None if it cannot be found.

    Args:
        model: a model, wrapped by any number of objects that keep it as their `inner_model`, or
            by a guider, which knows it as its `model_patcher`.
    """
    holders = list(_unwrapped(model))
    for holder in holders:
        found = getattr(holder, "model_sampling", None)
        if found is not None:
            return found
    for holder in holders:
        ask = getattr(getattr(holder, "model_patcher", None), "get_model_object", None)
        if ask is not None:
            return ask("model_sampling")
    return None


def _unwrapped(model: Any) -> Iterator[Any]:
    """Give a model and what it wraps, from outside to inside."""
    for _ in range(DEEPEST):
        if model is None:
            return
        yield model
        model = getattr(model, "inner_model", None)


def kind_of(model_sampling: Any) -> Kind:
    """Return what a model's x is, by how it mixes noise and data.

    A model is asked, and not its class: packs bring classes of their own.

    Raises:
        ErkGuidError: it is neither, or nothing is known of it.
    """
    if model_sampling is None:
        raise ErkGuidError(
            f"cannot tell whether this is a flow-matching model: something wraps it; {REMEDY}"
        )
    try:
        noise, data = _shares(model_sampling)
    except Exception as error:
        raise ErkGuidError(
            "cannot tell whether this is a flow-matching model: its "
            f"{type(model_sampling).__name__} does not mix noise and data ({reason_of(error)}); "
            f"{REMEDY}"
        ) from error
    if abs(noise - PROBED) < 1e-3:
        if abs(data - 1) < 1e-3:
            return "sigma"
        if abs(data - (1 - PROBED)) < 1e-3:
            return "flow"
    begins = "begins at a picture and not at noise" if abs(noise) < 1e-3 else "mixes unlike both"
    raise ErkGuidError(
        f"the model {begins} ({noise:.3g} noise and {data:.3g} data at level {PROBED}), which "
        f"'auto' and the modal solver do not suppose; take the form 'published' or 'none', or "
        f"{REMEDY}"
    )


def _shares(model_sampling: Any) -> tuple[float, float]:
    """Return the shares of noise and of data at the level `PROBED`."""
    level, one, nothing = torch.tensor(PROBED), torch.ones(1, 1), torch.zeros(1, 1)
    noise = model_sampling.noise_scaling(level, one.clone(), nothing.clone(), False)
    data = model_sampling.noise_scaling(level, nothing.clone(), one.clone(), False)
    return float(noise), float(data)
