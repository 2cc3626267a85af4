"""Noise levels that were found for a model (`erk_guid.fit`), in place of the usual spacing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import printable
from erk_guid.solvers import check_levels


def chosen_levels(
    levels: Sequence[float] | None,
    num_inference_steps: int | None,
    sigmas: Any = None,
    timesteps: Any = None,
    own_lists: bool = False,
) -> list[float] | None:
    """Return the levels of the config if a run takes them; None if there are none.

    Args:
        levels: of the config, the end included.
        num_inference_steps, sigmas, timesteps: what the pipeline asks for. Many name evenly spaced
            sigmas where the user names none; those make way for the levels.
        own_lists: whether sigmas are never the user's.

    Raises:
        ValueError: the pipeline asks for nothing, for no whole number of steps, for another one
            than that of the levels, or for other levels.
    """
    if num_inference_steps is not None:
        whole = isinstance(num_inference_steps, (int, np.integer))
        if not whole or num_inference_steps < 1:
            raise ValueError(
                "num_inference_steps must be a whole number of at least 1, got "
                f"{num_inference_steps!r}"
            )
    if levels is None:
        if num_inference_steps is None and sigmas is None and timesteps is None:
            raise ValueError("say how many steps to take: num_inference_steps, or a list of levels")
        return None
    steps = len(levels) - 1
    own = own_lists and timesteps is None
    if not own and not _named_by_the_pipeline(sigmas, timesteps):
        raise ValueError(
            f"this scheduler has {steps} fitted levels: leave sigmas and timesteps out, or make "
            "it with levels=None"
        )
    asked = len(sigmas) if sigmas is not None else num_inference_steps
    if asked not in (None, steps):
        raise ValueError(
            f"the levels were fitted for {steps} steps, not {asked}: pass "
            f"num_inference_steps={steps}, or fit for {asked}"
        )
    return [float(level) for level in levels]


def check_falling(sigmas: Any) -> None:
    """Refuse noise levels that do not fall strictly, are none, or are too few for a step.

    Raises:
        ValueError: naming the first at fault.
    """
    check_levels(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"))


def check_times(timesteps: Any, train_steps: int | None = None) -> None:
    """Refuse timesteps that do not fall strictly, or that no network was trained on.

    Args:
        timesteps: a list, or None.
        train_steps: how many the network knows, from 0 on; None asks for nothing.

    Raises:
        ValueError: naming the first at fault.
    """
    given = [] if timesteps is None else [float(t) for t in timesteps]
    for k, time in enumerate(given):
        if train_steps is not None and not 0 <= time <= train_steps:
            raise ValueError(
                f"timesteps must be within 0 and {train_steps}, but timesteps[{k}] is {time:g}"
            )
    for k, (before, after) in enumerate(pairwise(given)):
        if not after < before:
            raise ValueError(
                f"timesteps must fall, but timesteps[{k + 1}] = {after:g} follows {before:g}"
            )


def check_fitted(levels: Sequence[float] | None) -> None:
    """Raise ValueError unless levels are numbers that fall strictly."""
    if levels is not None:
        if isinstance(levels, str):  # a config that somebody edited
            raise ValueError(f"levels must be a list of numbers, got {printable(levels, 40)!r}")
        check_levels(torch.tensor(levels, dtype=torch.float64))


def _named_by_the_pipeline(sigmas: Any, timesteps: Any) -> bool:
    """Return whether these are none, or what a pipeline names where its user names none.

    In equal steps from 1 to 0, which is left out (FLUX, Qwen, HunyuanVideo), or to the timestep 1
    of 1000 (Bria); shares from 0 to 1 (Cosmos 2); or timesteps beside the same as sigmas, to 0 or
    to the timestep 1 (CogView 4).
    """
    if sigmas is None:
        return timesteps is None
    found = np.asarray(sigmas, dtype=np.float64)
    count = len(found)
    if count == 0 or found.ndim != 1:
        return False
    first, lasts = found[0], [found[0] / count, 1e-3]
    if timesteps is not None:
        times = np.asarray(timesteps, dtype=np.float64)
        if times.shape != found.shape or not np.allclose(times, times[0] * found, atol=1e-3):
            return False
        lasts.append(1 / times[0])
    if count > 1 and np.allclose(found, np.linspace(0, 1, count), atol=1e-6):
        return True
    evenly = (np.linspace(first, last, count) for last in lasts)
    return bool(0.99 <= first <= 1) and any(np.allclose(found, one, atol=2e-3) for one in evenly)


def as_tensor(levels: Sequence[float]) -> Tensor:
    """Return levels as schedulers keep them, float32 on the CPU."""
    return torch.tensor(levels, dtype=torch.float32)
