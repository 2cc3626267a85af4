"""EDM2 networks in diffusers' layout: folders, files, names on the hub.

The published conversion (BiliSakura/EDM2-diffusers) could not be had; its layout, its tensor names
and the names in its config.json are as it was described, and have no other source here.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, golden
from safetensors.torch import save_file

import erk_guid
from erk_guid.common.errors import ErkGuidError
from erk_guid.models.checkpoints.folder import shapes
from erk_guid.models.encoders import StabilityVAEEncoder, StandardRGBEncoder
from erk_guid.models.networks.edm2 import Precond


def model_folder(folder: Path, net: Precond, vae: bool = False, **changes: Any) -> Path:
    """A model as diffusers keeps it."""
    unet = folder / "unet"
    unet.mkdir(parents=True)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, unet / WEIGHTS)
    config = {
        "_class_name": "EDM2UNet2DModel", "_diffusers_version": "0.36.0",
        "sample_size": net.img_resolution, "in_channels": net.img_channels,
        "out_channels": net.img_channels, "num_class_embeds": net.label_dim, **changes,
    }  # fmt: skip
    (unet / "config.json").write_text(json.dumps(config))
    if vae:
        shutil.copytree(DATA / "tiny_vae", folder / "vae")
    return folder


WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("name", ["cond", "guide"])
def test_a_folder_computes_what_the_network_does(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    net: Precond = request.getfixturevalue(name)
    config = golden(f"edm2_net_{name}")["config"]
    told = {
        k: v for k, v in config.items()
        if k in ("channels_per_head", "clip_act", "resample_filter", "sigma_data", "res_balance")
    }  # fmt: skip
    folder = model_folder(tmp_path / "m", net, **told)
    data = golden(f"edm2_net_{name}")
    x, sigma, labels = data["x"], data["sigma"], data.get("labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (folder, folder / "unet", folder / "unet" / WEIGHTS):
            loaded = erk_guid.load(source)
            assert loaded.format == "diffusers"
            assert isinstance(loaded.encoder, StandardRGBEncoder)
            assert torch.equal(loaded.net(x, sigma, labels), net(x, sigma, labels))


def test_shapes_decide_what_they_can() -> None:
    for options in (
        {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [8],
         "channel_mult_noise": 3, "channel_mult_emb": 5, "logvar_channels": 12},
        {"model_channels": 16, "channel_mult": [1, 3, 2], "num_blocks": 1, "attn_resolutions": []},
    ):  # fmt: skip
        net = Precond(16, 4, 7, channels_per_head=8, **options)
        found = shapes(net.state_dict())
        again = Precond(channels_per_head=8, **found)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in net.state_dict().items()
        }
        assert found["attn_resolutions"] == options["attn_resolutions"]


def test_the_vae_beside_it_is_used(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = Precond(16, 4, 3, model_channels=8, channel_mult=[1], channels_per_head=8)
    folder = model_folder(tmp_path / "m", net, vae=True, channels_per_head=8)
    encoder = erk_guid.load(folder).encoder
    assert isinstance(encoder, StabilityVAEEncoder)
    data = golden("edm2_vae")
    with torch.no_grad():
        pixels = encoder.decode(data["latents"])
    assert (pixels.int() - data["pixels"].int()).abs().max() <= 1
    shutil.rmtree(folder / "vae")
    assert erk_guid.load(folder).encoder.config["vae_name"] == "stabilityai/sd-vae-ft-mse"


def test_contradictions_and_missing_parts_are_named(tmp_path: Path, cond: Precond) -> None:
    folder = model_folder(tmp_path / "a", cond, num_class_embeds=9)
    with pytest.raises(ErkGuidError, match="says num_class_embeds 9, its tensors 5"):
        erk_guid.load(folder)
    with pytest.raises(ErkGuidError, match=r"is a folder without unet/.*it has models in a"):
        erk_guid.load(tmp_path)
    pair = model_folder(tmp_path / "c", cond, sample_size=[16, 16], channels_per_head=16)
    assert erk_guid.load(pair).net.img_resolution == 16
    folder = model_folder(tmp_path / "d", cond)
    with pytest.raises(ErkGuidError, match="does not say channels_per_head"):
        erk_guid.load(folder)
    shutil.rmtree(tmp_path / "c")
    shutil.rmtree(tmp_path / "d")
    folder = model_folder(tmp_path / "b", cond, colour="red", sigma_data=-1)
    with (
        pytest.warns(UserWarning, match="not known here: colour"),
        pytest.raises(ErkGuidError, match="its setting sigma_data is -1"),
    ):
        erk_guid.load(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(ErkGuidError, match=r"config\.json is no dict"):
        erk_guid.load(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ErkGuidError, match=r"nor does a config\.json beside it"):
        erk_guid.load(folder)
    save_file({"a.weight": torch.zeros(2)}, folder / "unet" / WEIGHTS)
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(ErkGuidError, match="it is no EDM2 network"):
        erk_guid.load(folder)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cond: Precond) -> None:
    # From the hub's own cache, by its own client, which is told that there is no network.
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--someone--EDM2" / "snapshots" / COMMIT
    model_folder(snapshot / "edm2-xs", cond, channels_per_head=16)
    refs = tmp_path / "models--someone--EDM2" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = erk_guid.load("someone/EDM2/edm2-xs")
    assert loaded.path == snapshot / "edm2-xs" / "unet" / WEIGHTS
    assert loaded.net.label_dim == cond.label_dim
    assert erk_guid.load(f"someone/EDM2/edm2-xs@{COMMIT}").path == loaded.path
    with pytest.raises(ErkGuidError, match=r"cannot be fetched from the Hugging Face hub"):
        erk_guid.load("nobody/nothing")
    with pytest.raises(ErkGuidError, match=r"it has models in edm2-xs"):
        erk_guid.load("someone/EDM2")
    for local in ("someone/EDM2.pkl", "./someone/EDM2", "../a/b", "tests/net-000"):
        with pytest.raises(ErkGuidError, match="is no file, no URL and no preset"):
            erk_guid.load(local)
