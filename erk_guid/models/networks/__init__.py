"""Inference networks that load published checkpoints under their own parameter names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Unconditional(nn.Module):
    """A class-conditional network that is never told the class.

    A network trained with label dropout is its own unconditional model: this makes it the guiding
    network of classifier-free guidance.
    """

    label_dim = 0

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.img_resolution: int = net.img_resolution
        self.img_channels: int = net.img_channels

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, **options: Any
    ) -> Any:
        """As the network's own, with `class_labels` ignored."""
        return self.net(x, sigma, None, **options)
