#!/usr/bin/env python3
"""Train the digit classifier that judges the shipped model.

python scripts/train_classifier.py --data digits32.npz --dest digits-classifier.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange

from erk_guid.common.datasets import load_image_set
from erk_guid.models.networks.digits import DigitClassifier


@click.command(help=__doc__)
@click.option("--data", required=True, help="Folder, zip or .npz of labelled 32x32 digits.")
@click.option("--dest", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--held-out", default=2000, show_default=True, help="Images kept for the score.")
@click.option("--epochs", default=30, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    data: str, dest: Path, held_out: int, epochs: int, batch: int, lr: float, seed: int
) -> None:
    torch.manual_seed(seed)
    train, test = load_image_set(data).split(held_out)
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
    net = DigitClassifier().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in (bar := trange(epochs, unit="epoch")):
        for pick in torch.randperm(len(images)).split(batch):
            if len(pick) < batch:
                continue
            # Shifts by up to two pixels: the only augmentation that keeps a digit a digit.
            dy, dx = torch.randint(-2, 3, [2]).tolist()
            shifted = images[pick].roll((dy, dx), (2, 3))
            loss = F.cross_entropy(net(shifted), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    net.eval().requires_grad_(False).half().float()  # the score is that of the stored weights
    right = (net(torch.from_numpy(test.images)).argmax(1).numpy() == test.labels).mean()
    about = {
        "epochs": epochs, "batch": batch, "lr": lr, "seed": seed, "held_out": held_out,
        "accuracy": round(float(right), 4), "torch": torch.__version__,
    }  # fmt: skip
    state = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    save_file(state, dest, metadata={"training": json.dumps(about)})
    count = sum(p.numel() for p in net.parameters())
    click.echo(f"{dest}: {count} weights, {right:.2%} right on {held_out} held-out digits")


if __name__ == "__main__":
    main()
