"""Numbers that no run can use are refused before one begins, and not in its midst."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from erk_guid.common.errors import ErkGuidError
from erk_guid.edm2 import edm_sampler
from erk_guid.generation.config import GenerationConfig
from erk_guid.schedules import MOST_STEPS, SCHEDULES, make_sigmas


class Alone:
    """The only process."""

    def agree(self, work: Any) -> Any:
        return work()


def open_config(**fields: Any) -> None:
    GenerationConfig(net="digits", **fields).open(torch.device("cpu"), Alone())


def sampled(**options: Any) -> torch.Tensor:
    def net(x: torch.Tensor, sigma: torch.Tensor, labels: object = None) -> torch.Tensor:
        return x / (1 + sigma**2)

    noise = torch.ones(1, 1, 2, 2)
    return edm_sampler(net, noise, gnet=lambda x, s, labels=None: x, num_steps=3, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [MOST_STEPS + 1, 10**8, 10**12, 10**30])
def test_steps_beyond_memory(schedule: str, steps: int) -> None:
    # Catches: 8 TB asked of the allocator (a traceback), or gigabytes that are there.
    with pytest.raises(ValueError, match=f"num_steps can be {MOST_STEPS} at most, got {steps}"):
        make_sigmas(schedule, steps, 0.002, 80, 7)


def test_the_most_steps_are_possible() -> None:
    # Catches: a limit that levels in double precision do not reach, so that its error misleads.
    assert len(make_sigmas("logsnr", MOST_STEPS, 0.002, 80, 7)) == MOST_STEPS + 1


@pytest.mark.parametrize(("low", "high"), [(0.002, 1e308), (1e-9, 1e200), (79.9, 80.0)])
def test_time_uniform_levels_that_overflow(low: float, high: float) -> None:
    # Catches: an OverflowError, which is not a ValueError and is a traceback on a command line.
    with pytest.raises(ValueError, match="cannot be told apart"):
        make_sigmas("time_uniform", 5, low, high, 1)


@pytest.mark.parametrize("strength", [1e308, -1e39, float("nan"), float("inf"), "2", 1j])
def test_strengths_that_the_dtype_does_not_hold(strength: Any) -> None:
    # Catches: 'value cannot be converted to type float without overflow' from within a step.
    with pytest.raises(ValueError, match=r"guidance must be a number of at most 3\.40282e\+38"):
        sampled(guidance=strength)


def test_a_larger_dtype_holds_larger_strengths() -> None:
    # Catches: the limits of another dtype than the loop's.
    assert sampled(guidance=1e39, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match=r"at most 65504.*float16"):
        sampled(guidance=1e5, dtype=torch.float16)


@pytest.mark.parametrize("levels", [(1e39, 1.0), (80.0, 1e-46)])
def test_levels_that_the_dtype_does_not_hold(levels: tuple[float, ...]) -> None:
    # Catches: noise levels that become infinite or 0 in float32, where NaN is all that comes out.
    assert sampled(schedule=levels, dtype=torch.float64, check_finite=False) is not None
    with pytest.raises(ValueError, match="float32 does not hold the noise levels from"):
        sampled(schedule=levels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance": 1e308, "gnet": "uncond:digits"}, "guidance must be a number of at most"),
        ({"num_steps": 10**12}, "num_steps can be"),
        ({"schedule": "logsnr", "sigma_max": 1e300}, "float32 does not hold"),
        ({"schedule": "time_uniform", "sigma_max": 1e308}, "cannot be told apart"),
    ],
)
def test_a_config_is_refused_before_networks_are_loaded(
    fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a ValueError in the midst of a job, which its command line shows as a traceback.
    monkeypatch.setattr(GenerationConfig, "_fetch", lambda self, refresh: pytest.fail("fetched"))
    with pytest.raises(ErkGuidError, match=message):
        open_config(**fields)


@pytest.mark.parametrize(
    ("gnet", "expectation"),
    [
        ("/nonexistent", pytest.raises(ErkGuidError, match="'/nonexistent' is no file, no URL")),
        ("", pytest.raises(ErkGuidError, match="the name of the network is empty")),
        ("digit", pytest.raises(ErkGuidError, match="did you mean digits")),
        ("digits-weak", pytest.raises(ErkGuidError, match="is no file")),
        # What would have to be fetched is not: it is not run.
        ("https://example.invalid/net.pkl", nullcontext()),
        ("edm2-img512-xs-fid", nullcontext()),
        ("uncond:digits", nullcontext()),
    ],
)
def test_a_guiding_network_that_is_not_run_must_be_one(
    gnet: str, expectation: AbstractContextManager[Any]
) -> None:
    # Catches: a slip in --gnet that is taken in silence while --guidance is 1.
    with expectation:
        open_config(gnet=gnet)
