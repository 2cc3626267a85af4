"""Model guidance."""

from __future__ import annotations

from typing import Any

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
