"""What multistep methods share."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from erk_guid.sampling import sample
from erk_guid.schedules import karras_sigmas
from erk_guid.solvers import Modal, Step, make_solver
from erk_guid.solvers.multistep import PredictorCorrectorStep, dynamic_threshold, trust_in_past


def test_thresholding_by_hand_and_its_limits() -> None:
    # Values from NumPy's quantile; the published function is held to in test_diff_sampler.py.
    x = 3 * torch.randn(4, 3, 20, 20, dtype=torch.float64)
    x[0] /= 30  # stays as it is: all of it lies within 1
    found = dynamic_threshold(x)
    for one, result in zip(x.numpy(), found.numpy(), strict=True):
        limit = max(np.quantile(np.abs(one), 0.995), 1)
        np.testing.assert_allclose(result, np.clip(one, -limit, limit) / limit, rtol=1e-12)
    assert torch.equal(found[0], x[0])
    with pytest.raises(ValueError, match="needs predict_x0"):
        make_solver("unipc", threshold=True, predict_x0=False)


@pytest.mark.parametrize(
    ("confirmed", "trust"),
    # The correction moved so far of the way from the low to the predicted point.
    [(0.25, 0.25), (1.0, 1.0), (0.0, 0.0), (1.7, 1.0), (-0.4, 0.0)],
)
def test_trust_in_the_past_by_hand(confirmed: float, trust: float) -> None:
    low = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    apart = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    across = torch.tensor([[-4.0, 3.0]], dtype=torch.float64)  # what lies across does not count
    found = trust_in_past(low, low + apart, low + confirmed * apart + 5 * across)
    assert found.tolist() == pytest.approx([trust], abs=1e-12)


def test_trust_is_whole_where_there_is_nothing_to_trust_in() -> None:
    low = torch.ones(2, 3)
    assert trust_in_past(low, low, low + 1).tolist() == [1.0, 1.0]


def test_the_last_step_of_modal_relies_on_its_past_as_far_as_the_one_before_was_right() -> None:
    """Catches: a trust that the last step ignores, or that samples of a batch share."""
    sigmas = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    start = torch.tensor([[5.0, 1.0], [0.4, -2.0]], dtype=torch.float64)

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(8 * x / (sigma + 0.3)) * x.new_tensor([1.0, 0.1])

    steps = Modal().plan(sigmas)
    x, memory = start, None
    for step in steps[:-1]:
        result, memory = step(denoiser, x, memory)
        x = result.x
    assert memory is not None
    assert memory.trust is not None
    assert len(set(memory.trust.tolist())) == 2
    last = steps[-1]
    assert isinstance(last, PredictorCorrectorStep)
    high = last.scale * x + sum(w * v for w, v in zip(last.predictor, memory.values, strict=False))
    low = last.scale * x + sum(last.predictor) * memory.values[0]
    trust = memory.trust[:, None]
    wanted = (1 - trust) * low + trust * high
    assert (high - low).abs().max() > 1e-3
    torch.testing.assert_close(
        sample(denoiser, start, sigmas, solver=Modal()), wanted, rtol=0, atol=1e-12
    )
    # In a run that is cut after the second step nothing measured it.
    assert not any(step.measures_trust for step in Modal().steps([5.0, 2.0]))


@pytest.mark.slow
def test_the_last_step_of_modal_does_not_run_away_on_discrete_data() -> None:
    """Against plain extrapolation; three points, and an exact end by 4,000 steps of Heun."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.3], [-0.6, 0.9]], dtype=torch.float64)

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        apart = torch.cdist(x, points).square()
        return torch.softmax(-apart / (2 * sigma**2), dim=1) @ points

    torch.manual_seed(0)
    sigmas = karras_sigmas(10)[:-1]
    start = 80 * torch.randn(200, 2, dtype=torch.float64)
    fine = torch.logspace(math.log10(80), math.log10(0.002), 4000, dtype=torch.float64)
    exact = sample(denoiser, start, fine, solver="heun")

    def error(steps: list[Step]) -> float:
        x, memory = start, None
        for step in steps:
            result, memory = step(denoiser, x, memory)
            x = result.x
        return float((x - exact).norm(dim=1).median())

    planned = Modal().steps(sigmas.tolist())
    without = [replace(step, measures_trust=False) for step in planned]
    assert error(planned) < 0.7 * error(without)
