"""Pixels and latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import golden

from erk_guid.encoders import StabilityVAEEncoder, StandardRGBEncoder
from erk_guid.errors import ErkGuidError


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


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_vae_from_a_local_folder_in_batches(tiny_vae: Path) -> None:
    latents = torch.randn(5, 4, 8, 8)
    whole = StabilityVAEEncoder(str(tiny_vae), batch_size=8)
    pieces = StabilityVAEEncoder(str(tiny_vae), batch_size=2)
    with torch.no_grad():
        pixels = whole.decode(latents)
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (5, 3, 16, 16)
        assert (pixels.int() - pieces.decode(latents).int()).abs().max() <= 1
        # By hand: undo the whitening, decode, scale to 0..255 and truncate.
        from diffusers import AutoencoderKL

        std = torch.tensor([4.17, 4.62, 3.71, 3.28]).reshape(1, 4, 1, 1)
        mean = torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(1, 4, 1, 1)
        raw = latents * std / 0.5 + mean
        decoded = AutoencoderKL.from_pretrained(tiny_vae).decode(raw).sample
        by_hand = ((decoded + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
        assert (pixels.int() - by_hand.int()).abs().max() <= 1
        assert whole.encode(pixels).shape == latents.shape


def test_a_vae_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = StabilityVAEEncoder(str(tmp_path / "nothing"))
    with pytest.raises(ErkGuidError, match="--vae"):
        encoder.decode(torch.zeros(1, 4, 8, 8))
