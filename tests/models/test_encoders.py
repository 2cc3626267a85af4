"""Pixels and latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DATA, golden

from erk_guid.common.errors import ErkGuidError
from erk_guid.models.encoders import StabilityVAEEncoder, StandardRGBEncoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_rgb_decoding_matches_the_published_ramp() -> None:
    data = golden("encoders")
    ours = StandardRGBEncoder().decode(data["rgb_in"][None, None, None]).flatten().int()
    # Where 127.5 x + 128 is a whole number but for the last bit, fused and separate
    # multiply-adds truncate to different sides (two of the 97 values).
    level = data["rgb_in"].double() * 127.5 + 128
    tie = (level - level.round()).abs() < 1e-4
    inside = tie & (level > 0) & (level < 255)
    assert torch.equal(ours[~inside], data["rgb_out"][~inside].int())
    assert (ours - data["rgb_out"]).abs().max() <= 1
    assert 0 < inside.sum() < 12


def test_rgb_round_trip_is_exact_for_every_pixel_value() -> None:
    # Catches: adding 127.5 instead of 128, which loses half of the values.
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    encoder = StandardRGBEncoder()
    assert torch.equal(encoder.decode(encoder.encode(pixels)), pixels)


def test_vae_whitening_matches_the_published_numbers() -> None:
    data = golden("encoders")
    encoder = StabilityVAEEncoder()
    torch.testing.assert_close(encoder.scale, data["vae_scale"], rtol=1e-6, atol=0)
    torch.testing.assert_close(encoder.bias, data["vae_bias"], rtol=1e-6, atol=0)


VAE = str(DATA / "tiny_vae")
"""A random VAE as a diffusers folder; edm2_vae.npz is what EDM2's own encoder class makes of it."""


def test_vae_decoding_matches_the_published_encoder() -> None:
    # Catches: pixels taken to lie in [-1, 1], as in Stable Diffusion's pipelines (98 % of pixels
    # off, by up to 127).
    pytest.importorskip("diffusers")
    data = golden("edm2_vae")
    with torch.no_grad():
        pixels = StabilityVAEEncoder(VAE).decode(data["latents"])
    apart = (pixels.int() - data["pixels"].int()).abs()
    assert pixels.dtype == torch.uint8
    assert apart.max() <= 1
    assert (apart == 0).float().mean() >= 0.995


def test_vae_encoding_matches_the_published_encoder() -> None:
    # Catches: the same, exp(logvar) in place of the deviation, and whitening the wrong way round.
    pytest.importorskip("diffusers")
    data = golden("edm2_vae")
    encoder = StabilityVAEEncoder(VAE)
    with torch.no_grad():
        mean, std = encoder.moments(data["raw_pixels"])
        final = encoder.encode(data["raw_pixels"], torch.zeros_like)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        drawn = encoder.encode(data["raw_pixels"], lambda like: noise)
    torch.testing.assert_close(torch.cat([mean, std], 1), data["posterior_mean_std"], **CLOSE)
    torch.testing.assert_close(final, data["final_mean"], **CLOSE)
    added = (drawn - final) / data["scale"].reshape(1, -1, 1, 1)
    torch.testing.assert_close(added, std * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.scale, data["scale"], rtol=1e-6, atol=0)
    torch.testing.assert_close(encoder.bias, data["bias"], rtol=1e-6, atol=0)


def test_vae_in_batches() -> None:
    pytest.importorskip("diffusers")
    data = golden("edm2_vae")
    one_by_one = StabilityVAEEncoder(VAE, batch_size=1)
    with torch.no_grad():
        apart = one_by_one.decode(data["latents"]).int() - data["pixels"].int()
        latents = one_by_one.encode(data["raw_pixels"], torch.zeros_like)
    assert apart.abs().max() <= 1
    torch.testing.assert_close(latents, data["final_mean"], **CLOSE)


def test_a_vae_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = StabilityVAEEncoder(str(tmp_path / "nothing"))
    with pytest.raises(ErkGuidError, match="--vae"):
        encoder.decode(torch.zeros(1, 4, 8, 8))
