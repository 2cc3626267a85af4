"""NaN and infinity never become images; seed, step, sigma and setting are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import erk_guid
from erk_guid.cli import command_named
from erk_guid.generation.nonfinite import NonFiniteImagesError
from erk_guid.generation.trace import read_trace
from erk_guid.models.encoders import StabilityVAEEncoder, decode_checked

LEVELS = erk_guid.karras_sigmas(4)


def generate(*args: Any) -> Any:
    common = ["--preset", "digits", "--steps", "4", "--device", "cpu"]
    return CliRunner().invoke(command_named("generate"), [*common, *map(str, args)])


def pngs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


class Broken(torch.nn.Module):
    """The shipped network, with NaN for the image that begins with `noise`, at low noise."""

    def __init__(self, net: Any, noise: torch.Tensor) -> None:
        super().__init__()
        self.net, self.noise = net, noise / noise.norm()
        self.img_channels, self.img_resolution = net.img_channels, net.img_resolution
        self.label_dim = net.label_dim
        self.bad = torch.zeros(0)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> Any:
        level = float(sigma.flatten()[0])
        if level == pytest.approx(80):  # the first call: x is the noise itself
            along = x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
            self.bad = (along - self.noise).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) < 1e-3
        denoised = self.net(x, sigma, labels)
        return torch.where(self.bad, torch.nan, denoised) if level < 1 else denoised


def breaking(monkeypatch: pytest.MonkeyPatch, seed: int) -> Broken:
    """Let the command line open a network that fails for the image of one seed."""
    loaded = erk_guid.load("digits")
    net = loaded.net
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    broken = Broken(net, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    found = replace(loaded, net=broken)
    monkeypatch.setattr("erk_guid.generation.config.load", lambda *args, **options: found)
    return broken


def test_sample_names_the_samples() -> None:
    # Before, NaN came out without a word.
    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        out = x / (1 + sigma**2)
        out[1] = torch.nan
        return out

    x = LEVELS[0] * torch.randn(3, 2)
    with pytest.raises(erk_guid.NonFiniteError, match="1 of 3 samples are not finite") as caught:
        erk_guid.sample(denoiser, x, LEVELS)
    assert caught.value.indices == [1]
    as_is = erk_guid.sample(denoiser, x, LEVELS, check_finite=False)
    assert as_is.isnan().any(1).tolist() == [False, True, False]


def test_generate_carries_the_indices_and_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net = breaking(monkeypatch, 7)
    batches = erk_guid.generate(net, [3, 5, 7], batch_size=2, num_steps=4)
    with pytest.raises(NonFiniteImagesError) as caught:
        list(batches)
    assert (caught.value.seeds, caught.value.indices) == ([7], [2])
    where = caught.value.where
    assert where is not None
    # By the noise levels: the first evaluation below 1 is the second one of the step before.
    levels = erk_guid.karras_sigmas(4).tolist()
    step = next(k for k in range(4) if levels[k + 1] < 1)
    assert (where.step, where.num_steps) == (step, 4)
    assert where.sigma == pytest.approx(levels[step])
    assert f"network returned NaN or infinity at sigma {levels[step + 1]:.4g}" in where.cause


def test_a_run_stops_and_names_seed_step_sigma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: a valid black picture, exit 0, no word.
    breaking(monkeypatch, 2)
    result = generate("--outdir", tmp_path, "--seeds", "0-5", "--batch", 3)
    assert result.exit_code == 1
    assert "seed 2 (step 2 of 4, from sigma" in result.output
    assert "--on-nonfinite=skip" in result.output
    assert "000002.png" not in pngs(tmp_path)
    assert {"000000.png", "000001.png"} <= set(pngs(tmp_path))


def test_skipped_seeds_are_recorded_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "t.csv"
    out = tmp_path / "o"
    args = ["--outdir", out, "--seeds", "0-5", "--batch", 3, "--trace", trace]
    with monkeypatch.context() as patch:
        breaking(patch, 4)
        result = generate(*args, "--on-nonfinite=skip", "--grid", tmp_path / "g.png")
    assert result.exit_code == 0, result.output
    assert "5 images made" in result.output
    assert "1 image came out as NaN" in result.output
    assert pngs(out) == [f"00000{k}.png" for k in (0, 1, 2, 3, 5)]
    assert json.loads((out / "run.json").read_text())["nonfinite"] == [4]
    assert 4 not in read_trace(trace)["seed"]
    again = generate(*args, "--resume")
    assert "1 image made" in again.output
    assert len(pngs(out)) == 6
    assert "nonfinite" not in json.loads((out / "run.json").read_text())
    assert sorted(set(read_trace(trace)["seed"])) == [0, 1, 2, 3, 4, 5]


def test_the_setting_is_named(tmp_path: Path) -> None:
    result = generate("--outdir", tmp_path, "--seeds", "0-1", "--w_stiff", "1e30", "--w_con", 0)
    assert result.exit_code == 1
    assert "the correction of guidance was not finite; choose a smaller w_stiff" in result.output
    assert pngs(tmp_path) == []


def test_scores_refuse_them(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command_named("metrics"),
        ["gen", "--preset=digits", "--ref=digits", "--metrics=fd_digits", "--num=4", "--steps=3",
         "--w_stiff=1e30", "--w_con=0", "--device=cpu"],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "NaN or infinity in the images of seeds 0, 1, 2, 3" in result.output


def test_a_decoder_that_overflows_is_found() -> None:
    # Latents may be finite and the decoder's numbers not, as in half precision.
    class Decoded:
        def __init__(self, sample: torch.Tensor) -> None:
            self.sample = sample

    class VAE:
        def to(self, device: Any) -> VAE:
            return self

        def decode(self, x: torch.Tensor) -> Decoded:
            pixels = torch.zeros(len(x), 3, 8, 8)
            pixels[x[:, 0, 0, 0] > 0] = torch.inf
            return Decoded(pixels)

    encoder = StabilityVAEEncoder(batch_size=2)
    encoder._vae = VAE()
    latents = torch.full((3, 4, 1, 1), -9.0)
    latents[2] = 9.0
    images, finite = decode_checked(encoder, latents)
    assert images.shape == (3, 3, 8, 8)
    assert finite.tolist() == [True, True, False]
