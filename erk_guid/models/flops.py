"""Cost of one evaluation of a network: parameters and multiply-adds."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from erk_guid.models.networks import Network


class Cost(NamedTuple):
    """Cost of one evaluation for one image."""

    parameters: int
    multiply_adds: int
    """Of convolutions and matrix products; a multiply-add is two floating-point operations."""
    by_operation: dict[str, int]
    """`multiply_adds`, split by torch's name of the operation."""


def count(net: Network) -> Cost:
    """Count the parameters of a network, and the multiply-adds of one evaluation.

    torch counts them (`torch.utils.flop_counter`) on shapes alone. Nothing is computed, so a large
    network takes no longer than a small one. Element-wise operations are not counted.

    Args:
        net: called as ``net(x, sigma, class_labels)``, with `img_channels`, `img_resolution`,
            `label_dim`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from erk_guid.models.checkpoints.build import NETWORKS

    kind: Any = type(net)
    if kind in NETWORKS.values():  # ours: built again without its weights
        with torch.device("meta"):
            shapes = kind(**getattr(net, "config")).eval()  # noqa: B009 (not in the protocol)
    else:
        shapes = copy.deepcopy(net).to("meta")
    shapes.requires_grad_(False)  # torch 2.4's counter looks for gradients even in no_grad
    size = [1, net.img_channels, net.img_resolution, net.img_resolution]
    x, sigma = torch.empty(size, device="meta"), torch.empty([1], device="meta")
    labels = torch.empty([1, net.label_dim], device="meta") if net.label_dim else None
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shapes(x, sigma, labels)
    found = counter.get_flop_counts().get("Global", {})
    return Cost(
        sum(p.numel() for p in net.parameters()),
        counter.get_total_flops() // 2,
        {str(operation).removeprefix("aten."): value // 2 for operation, value in found.items()},
    )
