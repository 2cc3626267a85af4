"""Published files, our own format, presets, and the way around the safe reader."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, golden, relative
from safetensors import safe_open
from safetensors.torch import save_file

import erk_guid
from erk_guid.common.errors import CheckpointError, ErkGuidError
from erk_guid.models.checkpoints import PRESETS, convert, save_network
from erk_guid.models.encoders import StabilityVAEEncoder, StandardRGBEncoder
from erk_guid.models.networks.edm2 import Precond


def fixed_output(net: Any) -> torch.Tensor:
    x = golden("edm2_cond_pkl_denoised")["x"]
    return net(x, torch.tensor([0.05, 0.7, 4.0, 60.0]), torch.eye(5)[[0, 2, 4, 1]])


def test_a_published_snapshot_computes_what_it_should() -> None:
    expected = golden("edm2_cond_pkl_denoised")["denoised"]
    for freeze in (True, False):
        loaded = erk_guid.load(DATA / "edm2_cond.pkl", freeze=freeze)
        assert relative(fixed_output(loaded.net), expected) < 1e-5
        assert loaded.format == "pkl"
        assert isinstance(loaded.encoder, StandardRGBEncoder)
        # Stored dtypes are kept: the published arithmetic depends on them.
        kept = torch.float32 if freeze else torch.float16
        assert {p.dtype for p in loaded.net.parameters()} == {kept}
        assert not loaded.net.training  # type: ignore[attr-defined]
        assert not any(p.requires_grad for p in loaded.net.parameters())


def test_float16_gains_are_rounded_as_published() -> None:
    # Casting the weights to float32 first loses that rounding: this is the 8e-5 that keeping
    # the stored dtypes is about.
    net = erk_guid.load(DATA / "edm2_cond.pkl", freeze=False).net.float()  # type: ignore[attr-defined]
    error = relative(fixed_output(net), golden("edm2_cond_pkl_denoised")["denoised"])
    assert 1e-5 < error < 1e-3


@pytest.mark.parametrize("name", ["edm2_cond", "edm2_guide"])
def test_converted_files_compute_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    dest = tmp_path / "net.safetensors"
    before = convert(DATA / f"{name}.pkl", dest)
    after = erk_guid.load(dest)
    assert after.format == "safetensors"
    again = erk_guid.load(DATA / f"{name}.pkl")
    assert torch.equal(fixed_output(after.net), fixed_output(again.net))
    assert relative(fixed_output(before.net), fixed_output(again.net)) < 1e-6
    with safe_open(dest, "pt") as file:
        # The name, not the folder it happened to lie in.
        assert file.metadata()["source"] == f"{name}.pkl"


def test_the_encoder_travels_with_the_network(cond: Precond, tmp_path: Path) -> None:
    save_network(tmp_path / "a.safetensors", cond, StabilityVAEEncoder(batch_size=3))
    encoder = erk_guid.load(tmp_path / "a.safetensors").encoder
    assert isinstance(encoder, StabilityVAEEncoder)
    assert encoder.batch_size == 3
    assert encoder.vae_name == "stabilityai/sd-vae-ft-mse"


def test_foreign_and_damaged_safetensors_say_so(tmp_path: Path, cond: Precond) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="not one of ours"):
        erk_guid.load(foreign)
    good = tmp_path / "good.safetensors"
    save_network(good, cond)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        erk_guid.load(cut)
    header = {"format": "erk_guid/1", "network": "[]", "encoder": "{}"}
    save_file({"w": torch.zeros(2)}, tmp_path / "odd.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="does not describe the network"):
        erk_guid.load(tmp_path / "odd.safetensors")


def test_saving_leaves_nothing_half_written(
    tmp_path: Path, cond: Precond, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(state: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("erk_guid.models.checkpoints.native.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_network(tmp_path / "a.safetensors", cond)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_nothing() -> None:
    with pytest.raises(ErkGuidError, match="did you mean edm2-img512-xs-fid"):
        erk_guid.load("edm2-img512-xs-fit")
    with pytest.raises(ErkGuidError, match="no file, no URL and no preset"):
        erk_guid.load("/nonexistent/file.pkl")
    with pytest.raises(ErkGuidError, match="is a folder"):
        erk_guid.load(DATA)


def test_presets_are_the_published_ones() -> None:
    # The table of EDM2's own presets, and the names of EDM's published files.
    published = json.loads((DATA / "edm2_presets.json").read_text())
    base = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/{}.pkl"
    assert [name for name in PRESETS if name.startswith("edm2-")] == list(published)
    assert len(published) == 36
    for name, row in published.items():
        preset = PRESETS[name]
        assert preset.net == base.format(row["net"])
        assert preset.gnet == (base.format(row["gnet"]) if row["gnet"] else None)
        assert preset.guidance == (row["guidance"] or 1)
        assert preset.published.replace("FD-DINOv2", "FD") == row["published"]
    edm = {name: p.net.rpartition("/")[2] for name, p in PRESETS.items() if name[:4] == "edm-"}
    assert edm == {
        name: f"{name}.pkl"
        for name in (
            "edm-cifar10-32x32-uncond-vp", "edm-cifar10-32x32-cond-vp",
            "edm-ffhq-64x64-uncond-vp", "edm-afhqv2-64x64-uncond-vp",
            "edm-imagenet-64x64-cond-adm",
        )
    }  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "digits-guid", "digits-autog"])
def test_shipped_presets_load_offline(name: str) -> None:
    loaded = erk_guid.load(name)
    assert loaded.preset is PRESETS[name]
    assert (loaded.net.img_resolution, loaded.net.img_channels, loaded.net.label_dim) == (32, 1, 10)
    assert "steps" in loaded.metadata["training"]
    if PRESETS[name].gnet:
        gnet = erk_guid.load(PRESETS[name].gnet or "")
        assert gnet.net.img_resolution == 32


@pytest.mark.parametrize("name", ["edm2_cond", "edm_ddpmpp", "edm_ncsnpp"])
def test_precision(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # float32 is the published programs' own (the golden numbers); bfloat16 has 8 bits.
    source = DATA / f"{name}.pkl"
    nets = {p: erk_guid.load(source, precision=p).net for p in (None, "float32", "bfloat16")}
    net = nets[None]
    assert net is not None
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    seen: list[torch.dtype] = []
    for layer in nets["bfloat16"].modules():  # type: ignore[attr-defined]
        layer.register_forward_hook(
            lambda m, args, out: seen.append(out.dtype) if isinstance(out, torch.Tensor) else None
        )
    found = {p: each(2 * x, torch.tensor(2.0), labels) for p, each in nets.items()}
    assert torch.equal(found[None], found["float32"])
    assert all(out.dtype == torch.float32 for out in found.values())
    assert torch.bfloat16 in seen
    assert all(out.is_contiguous() for out in found.values())
    skip = 2 * x * 0.5**2 / (2.0**2 + 0.5**2)  # what goes past the network
    error = relative(found["bfloat16"] - skip, found[None] - skip)
    assert 1e-5 < error < 0.1, error
    # The caller's force_fp32 is stronger, as in EDM2; weights of 8 bits cannot do what it asks.
    thawed = erk_guid.load(source, precision="bfloat16", freeze=False).net
    forced = thawed(2 * x, torch.tensor(2.0), labels, force_fp32=True)  # type: ignore[call-arg]
    assert relative(forced, found[None]) < 2e-6  # 1.2e-6 with torch 2.4
    with pytest.raises(ValueError, match=r"weights were frozen in torch\.bfloat16"):
        nets["bfloat16"](2 * x, torch.tensor(2.0), labels, force_fp32=True)  # type: ignore[call-arg]
    half = erk_guid.load(source, precision="float16").net
    assert "float16 is for CUDA; on cpu" in capsys.readouterr().err
    assert torch.equal(half(2 * x, torch.tensor(2.0), labels), found[None])
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, float16"):
        erk_guid.load(source, precision="int8")


def test_loading_imports_no_compiler() -> None:
    # torch._dynamo and sympy take longer to import than all the rest of loading; some operations on
    # tensors without memory import them.
    sources = [
        "digits",
        *(str(DATA / f"{n}.pkl") for n in ("edm2_cond", "edm_ncsnpp", "edm_ddpmpp")),
    ]
    code = (
        "import sys, erk_guid\n"
        f"for source in {sources!r}:\n"
        "    net = erk_guid.load(source).net\n"
        "    assert all(t.device.type == 'cpu' for t in net.state_dict().values()), source\n"
        "print('sympy' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_unconditional_sources() -> None:
    plain, uncond = erk_guid.load("digits"), erk_guid.load("uncond:digits")
    assert uncond.net.label_dim == 0
    assert uncond.path == plain.path
    assert uncond.fingerprint != plain.fingerprint


def test_load_puts_the_network_on_the_device() -> None:
    loaded = erk_guid.load("digits", device="meta")
    assert {p.device.type for p in loaded.net.parameters()} == {"meta"}


# What published sources import, by its description; no file with a published source is here.
SOURCE = """
import numpy as np
import torch
import dnnlib
from torch_utils import misc, persistence

open(CANARY, "w").close()

@persistence.persistent_class
class Homemade(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 8, 1, 0
        self.scale = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x, sigma, class_labels=None):
        misc.assert_shape(x, [None, 1, 8, 8])
        return x * self.scale * misc.const_like(x, 1.0) * dnnlib.EasyDict(one=1).one
"""


@pytest.fixture
def homemade(tmp_path: Path) -> tuple[Path, Path]:
    """A snapshot of a network whose class is not ours, and the file that running it makes."""
    canary = tmp_path / "canary"
    source = SOURCE.replace("CANARY", repr(str(canary)))

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("only its name is pickled")

    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"

    class Stub:
        def __reduce__(self) -> Any:
            scale = torch.nn.Parameter(torch.tensor(0.25))
            state = {
                **torch.nn.Module().__dict__,
                "_parameters": {"scale": scale},
                "img_resolution": 8,
                "img_channels": 1,
                "label_dim": 0,
            }
            meta = {
                "type": "class",
                "version": 6,
                "module_src": source,
                "class_name": "Homemade",
                "state": state,
            }
            return _reconstruct_persistent_obj, (meta,)

    sys.modules["torch_utils"] = types.ModuleType("torch_utils")
    sys.modules["torch_utils.persistence"] = persistence
    try:
        path = tmp_path / "homemade.pkl"
        path.write_bytes(pickle.dumps({"ema": Stub()}, protocol=4))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return path, canary


def test_a_foreign_class_needs_trust(homemade: tuple[Path, Path]) -> None:
    path, canary = homemade
    with pytest.raises(CheckpointError, match=r"'Homemade'.*--trust-pickle"):
        erk_guid.load(path)
    assert not canary.exists()


def test_trust_runs_the_code_and_says_so(
    homemade: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, canary = homemade
    loaded = erk_guid.load(path, trust=True)
    assert canary.exists()
    assert (
        capsys.readouterr().err == f"Running the code inside {path}, as asked by --trust-pickle\n"
    )
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(loaded.net(x, 1.0), x * 0.25)
    # The stand-ins are gone again.
    assert "torch_utils" not in sys.modules
    assert "dnnlib" not in sys.modules
    end = erk_guid.edm_sampler(loaded.net, torch.randn(2, 1, 8, 8), num_steps=3)
    assert end.shape == (2, 1, 8, 8)


def test_a_trusted_files_known_encoder_becomes_ours() -> None:
    # The constructor's arguments are where published objects keep them; a published file with
    # this encoder is not here.
    from erk_guid.models.checkpoints.trusted import _Sources

    init = {"_init_args": (), "_init_kwargs": {"vae_name": "here", "batch_size": 2}}
    meta = {"class_name": "StabilityVAEEncoder", "module_src": "raise Exception", "state": init}
    encoder = _Sources().reconstruct(meta)
    assert isinstance(encoder, StabilityVAEEncoder)
    assert (encoder.vae_name, encoder.batch_size) == ("here", 2)


def test_trust_reports_code_that_fails(homemade: tuple[Path, Path]) -> None:
    path, _ = homemade
    path.write_bytes(path.read_bytes().replace(b"import dnnlib\n", b"import dmmlib\n"))
    with pytest.raises(CheckpointError, match="No module named 'dmmlib'"):
        erk_guid.load(path, trust=True)
