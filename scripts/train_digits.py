#!/usr/bin/env python3
"""Train the small EDM2 network that ships with the package, or one like it on other images.

Training follows Karras et al. 2024 (arXiv 2312.02696): log-normal noise levels, the loss
weighted by the learned uncertainty u(sigma) (eq. 21), forced weight normalization, an
inverse-square-root learning rate and power-function averages of the weights.

    python scripts/train_digits.py train --data digits32.npz --outdir training-runs/main
    python scripts/train_digits.py export training-runs/main digits.safetensors --ema 0.1

A run continues where it stopped when the same command is given again.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from erk_guid.common.datasets import load_image_set
from erk_guid.models.networks.edm2 import Precond

STATE = "state.pt"
LOG = "loss.csv"


def loss_of(
    net: Precond,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    p_mean: float,
    p_std: float,
    bf16: bool,
) -> Tensor:
    """Compute the mean of the uncertainty-weighted denoising loss (eq. 21) over one batch."""
    sd = net.sigma_data
    sigma = (torch.randn([len(images), 1, 1, 1], generator=generator) * p_std + p_mean).exp()
    noise = torch.randn(images.shape, generator=generator)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        denoised, logvar = net(images + sigma * noise, sigma, labels, return_logvar=True)
    return (weight / logvar.exp() * (denoised - images) ** 2 + logvar).mean()


def ema_exponent(std: float) -> float:
    """Return exponent gamma of the power-function average with relative width `std` (eq. 127)."""
    # sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved for g by bisection (it falls with g).
    low, high = 0.0, 1e6
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if (mid + 1) / ((mid + 2) ** 2 * (mid + 3)) > std**2 else (low, mid)
    return low


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--data", required=True, help="Folder, zip or .npz of labelled images.")
@click.option("--outdir", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--held-out", default=2000, show_default=True, help="Images kept out of training.")
@click.option("--steps", default=10000, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--lr", default=4e-3, show_default=True, help="Learning rate before the decay.")
@click.option("--decay-from", default=2000, show_default=True, help="Step at which it sets in.")
@click.option("--warmup", default=100, show_default=True, help="Steps of linear warm-up.")
@click.option("--model-channels", default=32, show_default=True)
@click.option("--channel-mult", default="1,2,2", show_default=True)
@click.option("--num-blocks", default=1, show_default=True)
@click.option("--attn-resolutions", default="8", show_default=True)
@click.option("--channels-per-head", default=32, show_default=True)
@click.option("--label-dropout", default=0.1, show_default=True)
@click.option("--p-mean", default=-0.8, show_default=True, help="Mean of log sigma.")
@click.option("--p-std", default=1.2, show_default=True, help="Deviation of log sigma.")
@click.option("--ema", default="0.05,0.1", show_default=True, help="Widths of the averages.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=250, show_default=True)
@click.option("--bf16/--no-bf16", default=True, show_default=True, help="bfloat16 autocast.")
def train(outdir: Path, **options: Any) -> None:
    """Train, or continue to train, in OUTDIR."""
    images_set, _ = load_image_set(options["data"]).split(options["held_out"])
    images = torch.from_numpy(images_set.images).float() / 127.5 - 1
    label_dim = int(images_set.labels.max()) + 1
    one_hot = torch.eye(label_dim)[torch.from_numpy(images_set.labels)]
    widths = [float(v) for v in options["ema"].split(",")]
    exponents = {std: ema_exponent(std) for std in widths}

    torch.manual_seed(options["seed"])
    net = Precond(
        img_resolution=images.shape[-1],
        img_channels=images.shape[1],
        label_dim=label_dim,
        use_fp16=False,
        logvar_channels=32,
        model_channels=options["model_channels"],
        channel_mult=[int(v) for v in options["channel_mult"].split(",")],
        num_blocks=options["num_blocks"],
        attn_resolutions=[int(v) for v in options["attn_resolutions"].split(",")],
        channels_per_head=options["channels_per_head"],
    )
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=options["lr"], betas=(0.9, 0.99))
    averages = {std: {k: v.clone() for k, v in net.state_dict().items()} for std in widths}
    rows: list[list[float]] = []
    step = 0

    outdir.mkdir(parents=True, exist_ok=True)
    fixed = {k: v for k, v in options.items() if k not in ("steps", "save_every", "data")}
    if (outdir / STATE).exists():
        state = torch.load(outdir / STATE, weights_only=True)
        if state["options"] != fixed:
            changed = sorted(k for k in fixed if state["options"].get(k) != fixed[k])
            raise click.ClickException(f"{outdir} was trained with another {', '.join(changed)}")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        averages, step, rows = state["averages"], state["step"], state["log"]
        click.echo(f"continuing {outdir} at step {step}")

    seconds = rows[-1][3] if rows else 0.0
    begun, running = time.monotonic(), []
    with tqdm(total=options["steps"], initial=step, unit="step") as bar:
        while step < options["steps"]:
            # A new generator for every step: nothing to store, and the same sequence whether or
            # not the run was interrupted.
            generator = torch.Generator().manual_seed(options["seed"] * 1_000_003 + step)
            pick = torch.randint(len(images), [options["batch"]], generator=generator)
            keep = torch.rand([options["batch"], 1], generator=generator)
            labels = one_hot[pick] * (keep >= options["label_dropout"])
            rate = min((step + 1) / options["warmup"], 1.0)
            rate /= math.sqrt(max(step / options["decay_from"], 1.0))
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * rate

            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(
                net, images[pick], labels, generator, options["p_mean"], options["p_std"],
                options["bf16"],
            )  # fmt: skip
            loss.backward()
            if not math.isfinite(loss.item()):
                raise click.ClickException(f"loss {loss.item()} at step {step}: lower --lr")
            optimizer.step()
            step += 1
            with torch.no_grad():
                now = net.state_dict()
                for std, average in averages.items():
                    beta = (1 - 1 / step) ** (exponents[std] + 1)
                    for name, value in average.items():
                        value.lerp_(now[name], 1 - beta)
            running.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{np.mean(running[-100:]):.3f}")
            if step % 50 == 0:
                elapsed = seconds + time.monotonic() - begun
                rows.append([step, float(np.mean(running[-50:])), options["lr"] * rate, elapsed])
            if step % options["save_every"] == 0 or step == options["steps"]:
                state = {
                    "options": fixed, "config": net.config, "step": step, "log": rows,
                    "net": net.state_dict(), "optimizer": optimizer.state_dict(),
                    "averages": averages,
                }  # fmt: skip
                save(outdir / STATE, state)
                with open(outdir / LOG, "w", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerow(["step", "loss", "lr", "seconds"])
                    writer.writerows([[int(r[0]), *(f"{v:.6g}" for v in r[1:])] for r in rows])


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dest", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--ema", default=0.1, show_default=True, help="Which average to take.")
def export(run: Path, dest: Path, ema: float) -> None:
    """Write an average of RUN as safetensors with float16 weights."""
    from erk_guid.models.checkpoints import save_network

    state = torch.load(run / STATE, weights_only=True)
    if ema not in state["averages"]:
        have = ", ".join(str(v) for v in state["averages"])
        raise click.BadParameter(f"{ema}: the run kept {have}", param_hint="--ema")
    net = Precond(**state["config"])
    net.load_state_dict(state["averages"][ema])
    about = {**state["options"], "steps": state["step"], "ema": ema, "torch": torch.__version__}
    save_network(dest, net.eval().half(), metadata={"training": json.dumps(about)})
    click.echo(f"{dest}: {dest.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
