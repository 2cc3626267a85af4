"""What all schedulers refuse by name, in place of a wrong sample or an error of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from erk_guid.integrations.diffusers import (
    EDMERKGuidHeunScheduler,
    EDMModalScheduler,
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
    FlowMatchModalScheduler,
    ModalScheduler,
)

ALL = [
    ERKGuidHeunScheduler, ModalScheduler, EDMERKGuidHeunScheduler, EDMModalScheduler,
    FlowMatchERKGuidHeunScheduler, FlowMatchModalScheduler,
]  # fmt: skip
every = pytest.mark.parametrize("kind", ALL)


@every
@pytest.mark.parametrize("steps", [0, -1, 2.5, "8"])
def test_a_number_of_steps_that_is_none(kind: Callable[[], Any], steps: Any) -> None:
    # Catches: 0 steps, which returned the noise; and torch's words about linspace.
    with pytest.raises(ValueError, match="whole number of at least 1"):
        kind().set_timesteps(steps)


@every
def test_no_number_of_steps(kind: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="say how many steps"):
        kind().set_timesteps()
    scheduler = kind()
    scheduler.set_timesteps(np.int64(3))  # numpy's numbers are numbers
    assert len(scheduler.timesteps) in (3, 5)


@every
@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_levels_in_any_container(kind: Callable[[], Any], make: Callable[..., Any]) -> None:
    # Catches: "the truth value of an array is ambiguous".
    scheduler, levels = kind(), [0.9, 0.5, 0.1]
    if kind in (ERKGuidHeunScheduler, ModalScheduler):
        levels.append(0.0)  # of these the end is given
    scheduler.set_timesteps(sigmas=make(levels))
    assert scheduler.sigmas.unique().tolist() == pytest.approx([0, 0.1, 0.5, 0.9])


@every
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 3, 4, 4), (4, 3, 4, 4), (2, 6, 4, 4)])
def test_an_output_of_another_shape(kind: Callable[[], Any], shape: tuple[int, ...]) -> None:
    # Catches: an output that torch broadcasts, such as one channel for all three.
    scheduler, x = kind(), torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"sample's shape \[2, 3, 4, 4\], got"):
        scheduler.step(torch.zeros(shape), scheduler.timesteps[0], x)


@every
def test_a_run_that_is_over(kind: Callable[[], Any]) -> None:
    # Catches: a step beyond the last one, which Heun's schedulers took from level 0 on.
    scheduler, x = kind(), torch.randn(1, 3, 4, 4)
    scheduler.set_timesteps(3)
    calls = len(scheduler.timesteps)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    with pytest.raises(ValueError, match=f"all {calls} calls of this run were made"):
        scheduler.step(torch.zeros_like(x), scheduler.timesteps[-1], x)
    scheduler.set_timesteps(3)
    scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    "kind", [ERKGuidHeunScheduler, EDMERKGuidHeunScheduler, FlowMatchERKGuidHeunScheduler]
)
def test_the_schedulers_own_list_given_back(kind: Callable[[], Any]) -> None:
    # Catches: `sigmas` of a two-stage scheduler, which holds levels twice, laid out again: the
    # flow scheduler took 13 calls in place of 5, eight of them for steps of no length.
    scheduler = kind()
    scheduler.set_timesteps(3)
    given = scheduler.sigmas if kind is ERKGuidHeunScheduler else scheduler.sigmas[:-1]
    with pytest.raises(ValueError, match="fall strictly"):
        scheduler.set_timesteps(sigmas=given.tolist())


HEUN = [ERKGuidHeunScheduler, EDMERKGuidHeunScheduler, FlowMatchERKGuidHeunScheduler]


@pytest.mark.parametrize("kind", HEUN)
@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 2)])
def test_a_batch_that_changes_within_a_step(
    kind: Callable[..., Any], counts: tuple[int, int]
) -> None:
    # Catches: torch's words about sizes; and 1 against 2, which torch broadcasts to a step that is
    # nobody's.
    scheduler = kind(w_stiff=0.5)
    scheduler.set_timesteps(3)
    for t, count in zip(scheduler.timesteps[:2], counts, strict=True):
        x = torch.randn(count, 3, 4, 4)
        scheduler.step(torch.randn_like(x), t, x)
    with pytest.raises(ValueError, match="both calls of a step of Heun need the same"):
        scheduler.step(torch.randn_like(x), scheduler.timesteps[2], x)
    scheduler.set_timesteps(3)  # another run is none the worse for it
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    assert x.isfinite().all()
