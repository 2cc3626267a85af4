#!/usr/bin/env python3
"""Measure the gain by constant weights and fused attention, on EDM2-XS at batch 1.

Times one call of the network as it is against the same network that normalizes every weight at
every call and writes out softmax attention, in turn, in one run.

    python benchmarks/network.py
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import click
import torch
from common import edm2_xs, in_turn, machine, report_ratio
from torch import Tensor

from erk_guid.models.networks import edm2


def explicit_attention(qkv: Tensor, heads: int) -> Tensor:
    """Compute `edm2.attention` with the softmax written out."""
    n, c3, height, width = qkv.shape
    parts = edm2.normalize(qkv.reshape(n, heads, -1, 3, height * width), dim=2)
    q, k, v = parts.unbind(3)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c3 // 3, height, width)


@contextlib.contextmanager
def spelled_out() -> Iterator[None]:
    """Run the same network without what this benchmark measures."""
    always = mock.patch.object(
        edm2.MPConv,
        "effective_weight",
        lambda self, dtype, gain=1.0, scale=1.0: self._compute(dtype, gain, scale),
    )
    with always, mock.patch.object(edm2, "attention", explicit_attention):
        yield


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@torch.no_grad()
def main(rounds: int, batch: int, device: str) -> None:
    net = edm2_xs(device)
    x = torch.randn(batch, 4, 64, 64, device=device)
    labels = torch.eye(1000, device=device)[:batch]

    def ours() -> Tensor:
        return net(x, 1.0, labels)

    def plain() -> Tensor:
        with spelled_out():
            return net(x, 1.0, labels)

    apart = (ours() - plain()).abs().max() / plain().abs().max()
    print(f"EDM2-XS, batch {batch}, float32; {machine()}")
    print(f"  largest difference between the two: {apart:.1e} of the largest value")
    report_ratio(
        ("normalizing and explicit attention", "constant weights, fused attention"),
        in_turn(plain, ours, rounds),
    )


if __name__ == "__main__":
    main()
