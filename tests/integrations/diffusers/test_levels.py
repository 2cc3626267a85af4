"""Lists of noise levels, times and timesteps that a user gives to our schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

pytest.importorskip("diffusers", reason="needs the package diffusers (extra diffusers)")

from erk_guid.integrations.diffusers import (
    EDMERKGuidHeunScheduler,
    EDMModalScheduler,
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
    FlowMatchModalScheduler,
    ModalScheduler,
)


def made(kind: Any, **lists: Any) -> Any:
    scheduler = kind()
    scheduler.set_timesteps(**lists)
    return scheduler


@pytest.mark.parametrize("kind", [EDMERKGuidHeunScheduler, EDMModalScheduler])
def test_the_end_of_a_list_may_be_named(kind: Any) -> None:
    # A second 0 gave a timestep of -inf and NaN, or an IndexError.
    with_end, without = (made(kind, sigmas=[10, 1, 0.1, *end]) for end in ([0.0], []))
    assert torch.equal(with_end.sigmas, without.sigmas)
    assert torch.equal(with_end.timesteps, without.timesteps)
    assert torch.isfinite(with_end.timesteps).all()
    assert made(kind, sigmas=[5.0]).sigmas.tolist() == [5.0, 0.0]


@pytest.mark.parametrize("kind", [EDMERKGuidHeunScheduler, EDMModalScheduler])
@pytest.mark.parametrize("sigmas", [[0.1, 1, 10], [10, 10, 1], [1, 2], []])
def test_levels_that_do_not_fall(kind: Any, sigmas: list[float]) -> None:
    # Rising levels were taken for shares of the range: one was -5e7.
    with pytest.raises(ValueError, match=r"sigmas|levels"):
        made(kind, sigmas=sigmas)


@pytest.mark.parametrize("kind", [EDMERKGuidHeunScheduler, EDMModalScheduler])
def test_shares_of_the_range(kind: Any) -> None:
    # As in diffusers' EDMEulerScheduler, rho 7: a share of 0 is sigma_max, of 1 sigma_min.
    sigmas = made(kind, sigmas=[0.0, 0.5, 1.0]).sigmas
    assert float(sigmas[0]) == pytest.approx(80, rel=1e-5)
    assert float(sigmas[-2]) == pytest.approx(0.002, rel=1e-5)


@pytest.mark.parametrize("kind", [FlowMatchERKGuidHeunScheduler, FlowMatchModalScheduler])
def test_levels_of_another_family(kind: Any) -> None:
    # Levels of Stable Diffusion gave finite nonsense, at a timestep of 14600.
    with pytest.raises(ValueError, match=r"times of a flow are at most 1, got 14\.6"):
        made(kind, sigmas=[14.6, 3.0, 0.5, 0.0])
    fitted = kind(levels=[5.0, 1.0, 0.1])
    with pytest.raises(ValueError, match="times of a flow are at most 1, got 5"):
        fitted.set_timesteps(2)


TIMES = np.linspace(1000, 1, 4).astype(np.int64)


@pytest.mark.parametrize("kind", [FlowMatchERKGuidHeunScheduler, FlowMatchModalScheduler])
@pytest.mark.parametrize(("lists", "usual"), [
    ({"sigmas": np.linspace(1, 1 / 4, 4)}, True),  # FLUX, Qwen
    ({"sigmas": np.linspace(1, 0, 5)[:-1]}, True),  # HunyuanVideo
    ({"sigmas": np.linspace(0.999, 0, 5)[:-1]}, True),  # OmniGen 2
    ({"sigmas": torch.linspace(0, 1, 4)}, True),  # Cosmos 2. Before: its own levels were refused
    ({"sigmas": TIMES / 1000, "timesteps": TIMES}, True),  # CogView 4. Before: refused
    ({"sigmas": np.array([1, 0.667, 0.334, 0.001])}, True),  # Bria. Before: refused
    ({"sigmas": [1.0, 0.7, 0.4, 0.1]}, False),
    ({"sigmas": [1.0, 0.9, 0.5, 0.25]}, False),
    ({"sigmas": [0.8, 0.6, 0.4, 0.2]}, False),
    ({"sigmas": [0.0, 0.3, 0.5, 1.0]}, False),
    ({"timesteps": [1000, 750, 500, 250]}, False),
    ({"sigmas": TIMES / 1000, "timesteps": [1000, 900, 500, 1]}, False),
], ids=str)  # fmt: skip
def test_fitted_levels_stand_before_lists_that_pipelines_name(
    kind: Any, lists: dict[str, Any], usual: bool
) -> None:
    # What pipelines name themselves is not a wish; what a user names is not ignored in silence.
    scheduler = kind(levels=[1.0, 0.8, 0.5, 0.1, 0.0])
    if usual:
        scheduler.set_timesteps(**lists)
        found = torch.unique_consecutive(scheduler.sigmas)
        torch.testing.assert_close(found, torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]))
    else:
        with pytest.raises(ValueError, match="this scheduler has 4 fitted levels"):
            scheduler.set_timesteps(**lists)


@pytest.mark.parametrize("kind", [FlowMatchERKGuidHeunScheduler, FlowMatchModalScheduler])
@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=str)
def test_levels_do_not_stand_before_timesteps_that_are_not_theirs(
    kind: Any, shift: dict[str, Any]
) -> None:
    # CogView 4 and GLM-Image name both, and the scheduler shifts the levels alone: at the level
    # 0.75 the network is told 500. Before: with fitted levels it was told 750.
    lists: dict[str, Any] = {"sigmas": TIMES / 1000, "timesteps": TIMES}
    lists |= {"mu": 1.1} if "shift" not in shift else {}
    with pytest.raises(ValueError, match="tells its network other times than those of its noise"):
        kind(**shift, levels=[1.0, 0.8, 0.5, 0.1, 0.0]).set_timesteps(**lists)
    ours, theirs = kind(**shift), FlowMatchEulerDiscreteScheduler(**shift)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**lists)
    told = list(dict.fromkeys(ours.timesteps.tolist()))
    assert told == theirs.timesteps.tolist() == TIMES.tolist()


@pytest.mark.parametrize("kind", [ERKGuidHeunScheduler, ModalScheduler])
@pytest.mark.parametrize("timesteps", [[1, 500, 999], [500, 500, 1]])
def test_timesteps_that_do_not_fall(kind: Any, timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"timesteps must fall, but timesteps\[1\] = 500"):
        made(kind, timesteps=timesteps)
