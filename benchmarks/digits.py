#!/usr/bin/env python3
"""Measure how often the shipped classifier finds the class that an image was made for.

The classifier is right on 98.95 % of held-out digits, which bounds what can be reached.

    python benchmarks/digits.py
"""

from __future__ import annotations

from typing import Any

import click
import torch
from common import machine

import erk_guid
from erk_guid.models.networks.digits import load_digit_classifier

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("digits", {"num_steps": 5}),
    ("digits", {"num_steps": 5, "w_stiff": 0.5, "w_con": 0.1}),
    ("digits", {"num_steps": 5, "w_stiff": 1.0, "w_con": 0.5}),
    ("digits", {"num_steps": 8}),
    ("digits", {"num_steps": 8, "w_stiff": 0.5, "w_con": 0.1}),
    ("digits", {"num_steps": 16}),
    ("digits-guid", {"num_steps": 8}),
    ("digits-autog", {"num_steps": 8}),
    ("shipped:digits-weak.safetensors", {"num_steps": 8}),
]


@click.command(help=__doc__)
@click.option("--num", default=500, show_default=True, help="Images a row, seeds from 20000.")
def main(num: int) -> None:
    classifier = load_digit_classifier()
    print(f"{num} images a row; {machine()}")
    for source, options in ROWS:
        loaded = erk_guid.load(source)
        gnet = None
        if loaded.preset is not None and loaded.preset.gnet is not None:
            gnet = erk_guid.load(loaded.preset.gnet).net
            options = {**options, "guidance": loaded.preset.guidance}
        right = 0
        for batch in erk_guid.generate(
            loaded.net, range(20_000, 20_000 + num), gnet=gnet, batch_size=100, **options
        ):
            assert batch.labels is not None
            right += int((classifier(batch.images).argmax(1) == batch.labels.argmax(1)).sum())
        share = right / num
        error = (share * (1 - share) / num) ** 0.5
        text = ", ".join(f"{k} {v:g}" for k, v in options.items())
        print(f"  {source:<34} {text:<40} {share:.1%} (standard error {error:.1%})", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
