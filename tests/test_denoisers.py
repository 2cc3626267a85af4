"""Model guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.problems import gaussian, reusing
from torch import Tensor

import erk_guid


def test_model_guidance_leads_away_from_the_guide() -> None:
    calls: list[str] = []

    def main(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append("main")
        return x * 0 + 3

    def guide(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append("guide")
        return x * 0 + 1

    x, sigma = torch.zeros(1, 2), torch.tensor(1.0)
    assert erk_guid.ModelGuidance(main, guide, 1.5)(x, sigma).tolist() == [[4.0, 4.0]]
    calls.clear()
    assert erk_guid.ModelGuidance(main, guide, 1)(x, sigma).tolist() == [[3.0, 3.0]]
    assert calls == ["main"]


def test_a_network_that_guides_itself_may_return_the_same_tensor_each_time() -> None:
    # Catches: the main output overwritten by the guiding one, where both are one network.
    x, sigmas = 80 * torch.randn(3, 4, dtype=torch.float64), erk_guid.karras_sigmas(5)

    def network(x: Tensor, sigma: Tensor, label: float = 0.0) -> Tensor:
        return gaussian(x, sigma) + label

    def run(net: Any) -> Tensor:
        guided = erk_guid.ModelGuidance(lambda x, s: net(x, s, 0.3), net, 2.0)
        return erk_guid.sample(guided, x, sigmas)

    assert torch.equal(run(network), run(reusing(network)))


def test_an_interval_guides_inside_only_and_calls_the_guide_there_only() -> None:
    """Catches: an open upper end, a closed lower one, a guide that is run and not used."""
    asked: list[float] = []

    def guide(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma))
        return x * 0 + 1

    guided = erk_guid.ModelGuidance(lambda x, sigma: x * 0 + 3, guide, 1.5, interval=(0.3, 5.42))
    x = torch.zeros(1, 2)
    # Both ends are no float32 numbers: a level at an end must be taken as it was written.
    for sigma, wanted in ((80, 3), (5.43, 3), (5.42, 4), (1, 4), (0.31, 4), (0.3, 3), (0.002, 3)):
        assert guided(x, torch.tensor(float(sigma))).tolist() == [[wanted] * 2], sigma
    assert asked == pytest.approx([5.42, 1, 0.31])
    # k-diffusion's [N] of one level is one level. Before: torch's error about one element.
    guided = erk_guid.ModelGuidance(
        lambda x, sigma: x * 0 + 3, lambda x, sigma: x * 0 + 1, 1.5, interval=(0.3, 5.42)
    )
    x = torch.zeros(2, 1)
    assert guided(x, torch.tensor([5.42, 5.42])).tolist() == [[4], [4]]
    assert guided(x, torch.tensor([0.3, 0.3])).tolist() == [[3], [3]]
    with pytest.raises(ValueError, match="one noise level for all samples, got 1 to 5"):
        guided(x, torch.tensor([5.0, 1.0]))


def test_a_run_with_an_interval_is_that_of_a_denoiser_written_by_hand() -> None:
    def net(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return gaussian(x, sigma)

    def gnet(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return gaussian(x, sigma) * 0.5

    def by_hand(x: Tensor, sigma: Tensor) -> Tensor:
        main = gaussian(x, sigma)
        return main + 0.5 * (main - 0.5 * main) if 0.2 < sigma <= 5 else main

    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    found = erk_guid.edm_sampler(
        net, noise, gnet=gnet, num_steps=6, guidance=1.5, guidance_interval=(0.2, 5),
        dtype=torch.float64,
    )  # fmt: skip
    sigmas = erk_guid.karras_sigmas(6)
    wanted = erk_guid.sample(by_hand, sigmas[0] * noise, sigmas)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "interval", [(5, 0.2), (-1, 2), (1, 1), (float("nan"), 2), (1,), "0.2,5", (1, 2, 3)]
)
def test_an_interval_that_is_none_is_refused(interval: Any) -> None:
    with pytest.raises(ValueError, match="0 <= low < high"):
        erk_guid.ModelGuidance(gaussian, gaussian, 1.5, interval=interval)
