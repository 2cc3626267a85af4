"""The EDM (2022) networks: golden outputs, files, settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, golden, relative

import erk_guid
from erk_guid.models.networks.edm import EDMPrecond
from erk_guid.solvers import DEIS


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_edm_files_open_safely_and_compute_the_published_numbers(name: str) -> None:
    data = golden(f"edm_net_{name}")
    loaded = erk_guid.load(DATA / f"edm_{name}.pkl")
    assert isinstance(loaded.net, EDMPrecond)
    labels = data["labels"] if data["labels"].numel() else None
    assert relative(loaded.net(data["x"], data["sigma"], labels), data["denoised"]) < 1e-5


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
def test_edm_golden_networks_with_seeded_weights(name: str) -> None:
    # Several heads, three levels, other widths: what the small files do not have.
    data = golden(f"edm_seeded_{name}")
    net = EDMPrecond(**data["config"]).eval().requires_grad_(False)
    norms = ("norm0.weight", "norm1.weight", "norm2.weight", "_norm.weight")
    for i, (key, value) in enumerate(sorted(net.state_dict().items())):
        if not key.endswith("resample_filter"):
            generator = torch.Generator().manual_seed(int(data["seed"]) + i)
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.05 * drawn + key.endswith(norms))
    labels = data["labels"] if data["labels"].numel() else None
    x, sigma = data["x"], data["sigma"]
    for got, expected in (
        (net(x, sigma, labels), data["denoised"]),
        (net(x, sigma), data["denoised_no_labels"]),
        (net(x, 0.3, labels), data["denoised_scalar_sigma_0p3"]),
    ):
        assert relative(got, expected) < 1e-5


def test_edm_networks_convert_and_generate(tmp_path: Path) -> None:
    from erk_guid.models.checkpoints import convert

    convert(DATA / "edm_ncsnpp.pkl", tmp_path / "n.safetensors")
    one, two = (erk_guid.load(p).net for p in (DATA / "edm_ncsnpp.pkl", tmp_path / "n.safetensors"))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(one(x, 1.5), two(x, 1.5))
    assert two.config == one.config
    (batch,) = erk_guid.generate(one, [1, 2], num_steps=3, solver=DEIS(2))
    assert batch.images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "UNet"}, "model_type must be one of SongUNet, DhariwalUNet"),
        ({"embedding_type": "none"}, "embedding_type must be one of"),
        ({"encoder_type": "x"}, "encoder_type must be one of"),
        ({"decoder_type": "x"}, "decoder_type must be one of"),
        ({"wings": 2}, "wings"),
    ],
)
def test_edm_settings_that_do_not_exist(change: dict[str, Any], message: str) -> None:
    config = {"img_resolution": 16, "img_channels": 3, "model_type": "SongUNet", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        EDMPrecond(**config)
