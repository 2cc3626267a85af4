"""Inference networks that load published checkpoints under their own parameter names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from erk_guid.models.networks.precond import Preconditioned

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Network(Protocol):
    """A network that images are generated with: it has EDM's call and attributes.

    Attributes:
        img_resolution, img_channels: shape of x, [N, img_channels, img_resolution, img_resolution].
        label_dim: number of classes, 0 for an unconditional network.
    """

    img_resolution: int
    img_channels: int
    label_dim: int

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, /) -> Tensor:
        """Return D(x; sigma), like x; `class_labels` are one-hot rows [N, label_dim]."""
        ...

    def to(self, device: torch.device | str, /) -> Self:
        """Move the weights, and return the network."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights; they are on the device of the network."""
        ...


DOUBLED = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Elements of a batch up to which one call with twice as many images was faster than two calls.

Two cores of a CPU: 0.73 to 0.99 of the time, and 1.05 to 1.09 with twice these. H200: 0.50 to
0.81, more not measured. See benchmarks/doubled.py.
"""


class Unconditional(nn.Module):
    """A class-conditional network that is never told the class.

    A network trained with label dropout is also an unconditional model. This class makes it the
    guiding network of classifier-free guidance.
    """

    label_dim = 0

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        self.img_resolution = net.img_resolution
        self.img_channels = net.img_channels

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, **options: Any
    ) -> Any:
        """Call the network without `class_labels`."""
        return self.net(x, sigma, None, **options)  # type: ignore[arg-type]

    def pair(
        self, net: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, /
    ) -> tuple[Tensor, Tensor] | None:
        """Return D with one-hot `labels` and D without, by one call with a doubled batch.

        None if `net` is not the network in here, or is not one of ours (for which no label is a row
        of zeros), or if two calls are faster: with more than `DOUBLED` elements in x.
        """
        if net is not self.net or not isinstance(net, Preconditioned):
            return None
        if labels is None or labels.ndim != 2 or x.numel() > DOUBLED.get(x.device.type, 0):
            return None
        rows = labels.expand(len(x), -1)
        sigmas = torch.as_tensor(sigma)
        sigmas = sigmas.reshape(()) if sigmas.numel() == 1 else torch.cat([sigmas, sigmas])
        out = net(torch.cat([x, x]), sigmas, torch.cat([rows, torch.zeros_like(rows)]))
        main, guide = out.chunk(2)
        return main, guide
