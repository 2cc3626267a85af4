"""The command lines, in process: options, files, and messages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import DATA, ROOT, golden
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from erk_guid.cli import main
from erk_guid.cli.common import reporting_errors
from erk_guid.cli.generate import generate_command
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.fits import shipped_fit
from erk_guid.generation.trace import read_trace
from erk_guid.models.checkpoints import save_network
from erk_guid.models.encoders import StabilityVAEEncoder
from erk_guid.models.networks.edm2 import Precond

COND, GUIDE = str(DATA / "edm2_cond.pkl"), str(DATA / "edm2_guide.pkl")


def generate(*args: Any) -> Result:
    return CliRunner().invoke(generate_command, [str(a) for a in args])


def test_every_option_and_its_default() -> None:
    # The command line is a promise to those who have scripts. EDM2's options first.
    found: dict[str, Any] = {}
    for option in generate_command.params:
        assert isinstance(option, click.Option)
        # click marks "no default" with an object of its own.
        plain = isinstance(option.default, (str, int, float))
        for name in option.opts:
            found[name] = option.default is True if option.is_flag else None
            if plain and not option.is_flag:
                found[name] = option.default
    assert found == {
        "--preset": None, "--net": None, "--gnet": None, "--outdir": None, "--subdirs": False,
        "--seeds": "16-19", "--class": None, "--batch": 32, "--steps": 32, "--sigma_min": 0.002,
        "--sigma_max": 80, "--rho": 7, "--guidance": None, "--S_churn": 0, "--s_churn": 0,
        "--S_min": 0, "--s_min": 0, "--S_max": float("inf"), "--s_max": float("inf"),
        "--S_noise": 1, "--s_noise": 1, "--w_stiff": 0.0, "--w_con": None, "--bound": None,
        "--gate": "stiffness", "--settings": None,
        "--solver": "heun", "--order": None, "--response": None, "--r": None, "--deis_mode": None,
        "--predict_x0": None, "--variant": None, "--lower_order_final": None, "--threshold": None,
        "--eta": None,
        "--schedule": "polynomial", "--afs": False, "--denoise-to-zero": True,
        "--device": None, "--dtype": "float32", "--precision": None, "--compile": False,
        "--resume": False, "--overwrite": False, "--on-nonfinite": "stop", "--refresh": False,
            "--rank-timeout": 600.0,
        "--guidance-interval": None, "--encoder-batch": None, "--vae": None,
        "--trace": None, "--grid": None,
        "--trust-pickle": False,
    }  # fmt: skip
    help_text = generate("--help").output
    assert all(name in help_text for name in found)


def test_golden_images_through_the_command_line(tmp_path: Path) -> None:
    data = golden("edm2_generate")
    seeds = data["seeds"].tolist()
    result = generate(
        "--net", COND, "--gnet", GUIDE, "--outdir", tmp_path, "--steps", 6, "--guidance", 1.4,
        "--w_stiff", 0.75, "--w_con", 0.3, "--seeds", ",".join(map(str, seeds)), "--device", "cpu",
        "--batch", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for seed, expected in zip(seeds, data["images_guided"].numpy(), strict=True):
        with Image.open(tmp_path / f"{seed:06d}.png") as image:
            pixels = np.asarray(image).transpose(2, 0, 1)
            text = image.info["parameters"]
        assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1
        assert f"seed {seed}, class " in text
        assert "solver heun, steps 6, w_stiff 0.75, w_con 0.3, guidance 1.4" in text


def test_run_json_grid_trace_and_subdirs(tmp_path: Path) -> None:
    result = generate(
        "--preset", "digits", "--outdir", tmp_path / "out", "--subdirs", "--seeds", "998-1001",
        "--steps", 4, "--w_stiff", "paper", "--grid", tmp_path / "grid.png",
        "--trace", tmp_path / "trace.csv", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the paper's settings for 8 steps, w_stiff 0.5, w_con 0.1" in result.output
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("0*.png"))
    assert names == [
        "000000/000998.png",
        "000000/000999.png",
        "001000/001000.png",
        "001000/001001.png",
    ]
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert (image.mode, image.size) == ("L", (32, 32))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["net"] == "digits"
    assert run["seeds"] == [998, 999, 1000, 1001]
    assert (run["settings"]["num_steps"], run["settings"]["w_con"]) == (4, 0.1)
    assert len(run["settings"]["net_sha256"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 96 + 2, 2 * 96 + 2)
    with open(tmp_path / "trace.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["seed"]), int(r["step"])) for r in rows] == [
        (s, i) for s in (998, 999, 1000, 1001) for i in range(4)
    ]
    assert rows[0]["stiffness"] == ""
    assert float(rows[1]["stiffness"]) > 0


def test_trace_as_npz(tmp_path: Path) -> None:
    result = generate(
        "--preset", "digits", "--outdir", tmp_path, "--steps", 3, "--trace", tmp_path / "t.npz"
    )
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "t.npz") as trace:
        assert trace["seed"].tolist() == [s for s in (16, 17, 18, 19) for _ in range(3)]
        assert np.isnan(trace["stiffness"].reshape(4, 3)).all(0).tolist() == [True, False, True]


@pytest.mark.parametrize("preset", ["digits-guid", "digits-autog"])
def test_shipped_presets_bring_their_guidance(preset: str, tmp_path: Path) -> None:
    result = generate("--preset", preset, "--outdir", tmp_path, "--steps", 2, "--seeds", 1)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["guidance"] > 1
    assert settings["gnet_sha256"]
    # The command line beats the preset; without model guidance no guiding network is opened.
    again = generate(
        "--preset", preset, "--outdir", tmp_path, "--steps", 2, "--seeds", 1, "--guidance", 1,
        "--overwrite",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert (settings["guidance"], settings["gnet_sha256"]) == (1, None)


def test_noise_belongs_to_the_seed(tmp_path: Path) -> None:
    # Alone, in another batch, and after a resume an image has the noise of its own seed.
    args = ["--preset", "digits", "--steps", 5, "--solver", "modal", "--eta", 0.6, "--device",
            "cpu"]  # fmt: skip

    def pixels(folder: str, seed: int) -> Any:
        with Image.open(tmp_path / folder / f"{seed:06d}.png") as image:
            assert "solver modal eta=0.6, steps 5" in image.info["parameters"]
            return np.asarray(image).astype(int)

    for folder, seeds, batch in (("a", "3-5", 3), ("b", "5", 1), ("c", "3-4", 2)):
        made = generate(*args, "--seeds", seeds, "--batch", batch, "--outdir", tmp_path / folder)
        assert made.exit_code == 0, made.output
    more = generate(*args, "--seeds", "5", "--outdir", tmp_path / "c", "--resume")
    assert more.exit_code == 0, more.output
    assert "network evaluations each: 5" in more.output
    for folder in ("b", "c"):
        assert np.abs(pixels("a", 5) - pixels(folder, 5)).max() <= 1
    assert json.loads((tmp_path / "c" / "run.json").read_text())["settings"]["eta"] == 0.6
    plain = generate(
        "--preset", "digits", "--steps", 5, "--solver", "modal", "--seeds", 5, "--outdir",
        tmp_path / "d",
    )  # fmt: skip
    assert plain.exit_code == 0, plain.output
    with Image.open(tmp_path / "d" / "000005.png") as image:
        assert np.abs(pixels("a", 5) - np.asarray(image).astype(int)).max() > 20


def test_precision_is_recorded_as_it_was_used(tmp_path: Path) -> None:
    args = ["--preset", "digits-guid", "--steps", 3, "--seeds", 1, "--device", "cpu"]
    for precision, used in (("bfloat16", "bfloat16"), ("float16", "float32")):
        made = generate(*args, "--precision", precision, "--outdir", tmp_path / precision)
        assert made.exit_code == 0, made.output
        assert ("float16 is for CUDA" in made.output) == (precision == "float16")
        record = json.loads((tmp_path / precision / "run.json").read_text())["settings"]
        assert record["precision"] == used
        with Image.open(tmp_path / precision / "000001.png") as image:
            assert f"network in {used}" in image.info["parameters"]


def test_noise_in_a_file_of_settings(tmp_path: Path) -> None:
    settings = {
        "erk_guid_settings": 1, "w_stiff": 0.0, "w_con": 0.5,
        "made_for": {"solver": "modal", "eta": 0.6, "num_steps": 5},
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(settings))
    args = ["--preset", "digits", "--seeds", 5]
    made = generate(*args, "--settings", tmp_path / "s.json", "--outdir", tmp_path / "a")
    assert made.exit_code == 0, made.output
    typed = generate(*args, "--steps", 5, "--solver", "modal", "--eta", 0.6, "--outdir",
                     tmp_path / "b")  # fmt: skip
    assert typed.exit_code == 0, typed.output
    assert (tmp_path / "a" / "000005.png").read_bytes() == (
        tmp_path / "b" / "000005.png"
    ).read_bytes()
    other = generate(*args, "--settings", tmp_path / "s.json", "--eta", 0.2, "--outdir",
                     tmp_path / "c")  # fmt: skip
    assert other.exit_code == 2
    assert "--eta 0.2: " in other.output


@pytest.mark.parametrize(("typed", "said"), [
    (["--sigma_max=40"], "--sigma_max has nothing to act on beside a list of noise levels"),
    (["--sigma_min=0.1"], "--sigma_min has nothing to act on"),
    (["--rho=5"], "--rho has nothing to act on"),
    (["--order=1"], "was made for --order 4"),
    (["--order=4"], None), (["--eta=0.5"], None),
])  # fmt: skip
@pytest.mark.parametrize("shipped", [True, False])
def test_options_that_fitted_levels_leave_no_room_for(
    typed: list[str], said: str | None, shipped: bool, tmp_path: Path
) -> None:
    # Before: dropped without a word, or (another order) levels of another solver; `fit` writes no
    # option that is at its default.
    with as_file(shipped_fit("digits", 6)) as file:
        levels = ["--schedule=fitted", "--steps=6"] if shipped else [f"--settings={file}"]
        done = generate("--preset=digits", "--seeds=0", *levels, *typed, "--outdir", tmp_path / "o")
    assert done.exit_code == (0 if said is None else 2), done.output
    assert said is None or said in done.output
    assert (tmp_path / "o").exists() == (said is None)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_odd_channels_are_refused(channels: int, tmp_path: Path) -> None:
    # Before: the first one or three were written, and the others dropped without a word.
    net = Precond(16, channels, 0, model_channels=8, channel_mult=[1], channels_per_head=8)
    save_network(tmp_path / "net.safetensors", net)
    gen = ["metrics", "gen", "--ref=digits", "--metrics=fd_digits", "--num=2"]
    for command in (["generate", "--outdir", str(tmp_path / "o"), "--seeds=0"], gen):
        done = CliRunner().invoke(main, [*command, f"--net={tmp_path / 'net.safetensors'}"])
        assert done.exit_code == 1
        assert f"makes {channels} channels" in done.output
    assert not list(tmp_path.glob("o/*.png"))


def test_the_settings_beside_weights_are_part_of_the_network(tmp_path: Path) -> None:
    # diffusers' layout. Before: the weights alone were known, so images of two networks mixed.
    net = Precond(16, 3, 0, model_channels=8, channel_mult=[1], channels_per_head=8)
    save_network(tmp_path / "n.safetensors", net)
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(tmp_path / "n.safetensors"), weights)
    config = {"_class_name": "EDM2UNet2DModel", "channels_per_head": 8, "sigma_data": 0.5}
    (weights.parent / "config.json").write_text(json.dumps(config))
    args = ["--net", tmp_path, "--outdir", tmp_path / "o", "--steps=1", "--device=cpu"]
    assert generate(*args, "--seeds=0").exit_code == 0
    (weights.parent / "config.json").write_text(json.dumps({"_written_by": "x", **config}))
    assert generate(*args, "--seeds=0-1", "--resume").exit_code == 0
    (weights.parent / "config.json").write_text(json.dumps({**config, "sigma_data": 1.5}))
    done = generate(*args, "--seeds=0-2", "--resume")
    assert done.exit_code == 1
    assert "net_sha256 was" in done.output


def test_another_vae_of_the_same_name_is_refused(tmp_path: Path) -> None:
    # Before: run.json knew the VAE by its name alone, so that a folder held images of two.
    pytest.importorskip("diffusers")
    net = Precond(16, 4, 0, model_channels=8, channel_mult=[1], channels_per_head=8)
    save_network(tmp_path / "net.safetensors", net, StabilityVAEEncoder())
    vae = tmp_path / "vae"
    shutil.copytree(DATA / "tiny_vae", vae)
    args = ["--net", tmp_path / "net.safetensors", "--vae", vae, "--outdir", tmp_path / "o",
            "--steps", 1, "--device", "cpu"]  # fmt: skip
    assert generate(*args, "--seeds=0").exit_code == 0
    assert generate(*args, "--seeds=0-1", "--resume").exit_code == 0
    weights = vae / "diffusion_pytorch_model.safetensors"
    other = load_file(weights)
    other["decoder.conv_out.bias"] = other["decoder.conv_out.bias"] + 0.1
    save_file(other, weights, {"format": "pt"})
    for more in (["--resume"], []):
        done = generate(*args, "--seeds=0-2", *more)
        assert done.exit_code == 1, done.output
        assert ("vae_sha256" if more else "holds 2 images of other settings") in done.output
    assert not (tmp_path / "o" / "000002.png").exists()


def test_resume_makes_what_is_missing_or_truncated(tmp_path: Path) -> None:
    # One at a time: in other batches some versions of torch round otherwise.
    args = [
        "--preset",
        "digits",
        "--outdir",
        tmp_path,
        "--steps",
        2,
        "--seeds",
        "0-5",
        "--batch",
        1,
    ]
    assert generate(*args).exit_code == 0
    images = {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    (tmp_path / "000002.png").unlink()
    (tmp_path / "000004.png").write_bytes(images["000004.png"][:-20])
    (tmp_path / ".000005.png.7.partial.png").write_bytes(b"stale")
    kept = (tmp_path / "000001.png").stat().st_mtime_ns
    result = generate(*args, "--resume")
    assert result.exit_code == 0, result.output
    assert "2 images made" in result.output
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.png")} == images
    assert (tmp_path / "000001.png").stat().st_mtime_ns == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == [*sorted(images), "run.json"]


def test_resume_with_more_seeds_extends_the_run(tmp_path: Path) -> None:
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2, "--resume"]
    assert generate(*args, "--seeds", "0-2").exit_code == 0
    result = generate(*args, "--seeds", "2-4")
    assert "2 images made" in result.output
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == [0, 1, 2, 3, 4]


def test_resume_keeps_what_another_machine_made_of_the_same_run(tmp_path: Path) -> None:
    # Two halves put into one folder. Before: those that run.json does not list were made again
    # and replaced, though they say that they are of this run.
    args = ["--preset", "digits", "--steps", 2]
    for name, seeds in (("one", "0-1"), ("two", "2-3")):
        assert generate(*args, "--seeds", seeds, "--outdir", tmp_path / name).exit_code == 0
    for path in (tmp_path / "two").glob("*.png"):
        shutil.copy2(path, tmp_path / "one")
    there = {p: p.stat().st_ino for p in (tmp_path / "one").glob("*.png")}
    done = generate(*args, "--seeds", "0-4", "--outdir", tmp_path / "one", "--resume")
    assert "1 image made" in done.output
    assert {path: path.stat().st_ino for path in there} == there
    assert json.loads((tmp_path / "one" / "run.json").read_text())["seeds"] == [0, 1, 2, 3, 4]


def test_resume_does_not_take_what_does_not_say_which_run_it_is(tmp_path: Path) -> None:
    # As earlier versions' images: of which settings nothing says, unless run.json lists them.
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2]
    assert generate(*args, "--seeds", "0").exit_code == 0
    for seed in (0, 1):
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", f"seed {seed}, of another version")
        Image.new("L", (16, 16)).save(tmp_path / f"{seed:06d}.png", pnginfo=info)
    done = generate(*args, "--seeds", "0-1", "--resume")
    assert "1 image made" in done.output
    assert np.asarray(Image.open(tmp_path / "000000.png")).max() == 0
    assert np.asarray(Image.open(tmp_path / "000001.png")).max() > 0


@pytest.mark.parametrize(("typed", "said"), [
    (["--net=digits", "--gnet=digits"], "--gnet=uncond:digits is classifier-free guidance"),
    (["--net=digits", "--gnet=digits-guid"], "--gnet digits-guid is the network itself;"),
    (["--net=uncond:digits", "--gnet=uncond:digits"], "is the network itself"),
])  # fmt: skip
def test_model_guidance_of_a_network_by_itself_is_refused(
    typed: list[str], said: str, tmp_path: Path
) -> None:
    # Before: images without guidance at twice the cost, recorded as guided.
    done = generate(*typed, "--guidance=3", "--steps=2", "--seeds=0", "--outdir", tmp_path / "o")
    assert done.exit_code == 1
    assert "--guidance 3 has nothing to act on" in done.output
    assert said in done.output
    assert not list((tmp_path / "o").glob("*.png"))


def test_classifier_free_guidance_without_classes_is_refused(tmp_path: Path) -> None:
    net = Precond(16, 1, 0, model_channels=8, channel_mult=[1], channels_per_head=8)
    save_network(tmp_path / "net.safetensors", net)
    both = ["--net", tmp_path / "net.safetensors", "--gnet", f"uncond:{tmp_path}/net.safetensors"]
    done = generate(*both, "--guidance=2", "--seeds=0", "--outdir", tmp_path / "o")
    assert done.exit_code == 1
    assert "is the network itself, which has no classes; leave both out" in done.output


@pytest.mark.parametrize(("typed", "works"), [
    (["--guidance-interval=100,200"], False), (["--guidance-interval=0,0.001"], False),
    (["--guidance-interval=3,4", "--schedule=80,5,1"], False),
    (["--guidance-interval=3,4", "--schedule=80,5,1", "--solver=dpm2"], False),
    (["--guidance-interval=2,3", "--schedule=80,5,1", "--solver=dpm2"], True),
    (["--guidance-interval=79,80", "--solver=euler"], True),
    (["--guidance-interval=100,200", "--S_churn=2", "--steps=4"], True),
])  # fmt: skip
def test_an_interval_of_guidance_in_which_nothing_is_called(
    typed: list[str], works: bool, tmp_path: Path
) -> None:
    # Before: images without guidance, recorded as guided.
    more = [] if any("schedule" in one for one in typed) else ["--steps=4"]
    done = generate("--preset=digits-guid", "--seeds=0", *typed, *more, "--outdir", tmp_path / "o")
    assert done.exit_code == (0 if works else 2), done.output
    assert ("has nothing to act on: the run calls its network from" in done.output) != works


@pytest.mark.parametrize("command", ["calibrate", "fit", "accuracy"])
def test_studies_refuse_such_an_interval_too(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [
        command, "--preset=digits-guid", "--guidance-interval=100,200", f"--outdir={tmp_path}/o",
    ])  # fmt: skip
    assert done.exit_code == 2, done.output
    assert "from 0.002 to 80, and at no noise level in it" in done.output


def test_levels_that_windows_wrote_are_read(tmp_path: Path) -> None:
    # Before: "could not convert string to float" of an invisible mark.
    (tmp_path / "levels.txt").write_bytes("80\r\n5\r\n0.1\r\n".encode("utf-8-sig"))
    done = generate("--preset=digits", f"--schedule={tmp_path / 'levels.txt'}", "--seeds=0",
                    "--outdir", tmp_path / "o")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "o" / "run.json").read_text())["settings"]["schedule"] == [
        80.0, 5.0, 0.1,
    ]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), [
    (["--gnet=uncond:digits"], "with the guiding network shipped:digits-weak.safetensors, this is "
     "uncond:digits"),
    (["--guidance-interval=1,3"], "with the interval of model guidance None, this is (1.0, 3.0)"),
    (["--guidance=1"], "with the strength of model guidance 1.5, this is 1"),
    ([], None),
])  # fmt: skip
def test_a_remark_where_levels_were_fitted_to_other_model_guidance(
    typed: list[str], said: str | None, tmp_path: Path
) -> None:
    # Before: nothing was said of another guiding network, nor of an interval in four of the fits.
    done = generate("--preset=digits-autog", "--schedule=fitted", "--steps=8", "--seeds=0", *typed,
                    "--outdir", tmp_path / "o")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.count("was measured with") == (said is not None)
    assert said is None or said in done.output


@pytest.mark.parametrize(("typed", "said"), [
    (["--net", COND], "measured for digits (not with the --net that is given)"),
    (["--gnet=uncond:digits", "--guidance=3"], "(not with the --gnet, --guidance that is given)"),
    ([], "measured for digits, w_stiff"),
])  # fmt: skip
def test_a_remark_where_strengths_were_measured_for_another_model(
    typed: list[Any], said: str, tmp_path: Path
) -> None:
    # Before: "the settings measured for digits", whatever the network.
    done = generate("--preset=digits", "--w_stiff=preset", "--seeds=0", "--steps=3", *typed,
                    "--outdir", tmp_path / "o")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert said in done.output


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--steps", 3], "num_steps was 2, now 3"),
        (["--w_stiff", 0.5, "--steps", 3], "w_stiff was 0.0, now 0.5"),
        (["--class", 3], "class was None, now 3"),
        (["--net", COND], "net_sha256 was '"),
        (["--subdirs"], "subdirs was False, now True"),
        (["--solver", "euler", "--eta", 0.5], "eta was None, now 0.5"),
        (["--precision", "bfloat16"], "precision was None, now 'bfloat16'"),
        (["--preset", "digits-guid"], "guidance was 1.0, now 1.5"),
    ],
)
def test_resume_refuses_other_settings(change: list[Any], named: str, tmp_path: Path) -> None:
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2, "--seeds", "0-1"]
    assert generate(*args).exit_code == 0
    result = generate(*args, "--resume", *change)
    assert result.exit_code == 1
    assert named in result.output
    assert "choose another --outdir" in result.output


def test_compiled_and_other_images_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was really done is recorded: compiling is refused on --resume, a fallback is not.
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2, "--seeds", "0-1"]
    assert generate(*args).exit_code == 0
    loading = "erk_guid.models.checkpoints.loading.can_compile"
    monkeypatch.setattr(loading, lambda device: True)
    result = generate(*args, "--resume", "--compile")
    assert result.exit_code == 1
    assert "compile was None, now True" in result.output
    monkeypatch.setattr(loading, lambda device: False)
    assert generate(*args, "--resume", "--compile").exit_code == 0


def test_an_overwritten_run_that_was_killed_is_not_mixed(tmp_path: Path) -> None:
    # First a run, then another over it that dies before its first image, then its --resume:
    # the images of the first run must not be taken for the second's.
    args = ["--preset", "digits", "--outdir", tmp_path, "--seeds", "0-2"]
    assert generate(*args, "--steps", 2).exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "erk_guid.generation.jobs._generate",
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert generate(*args, "--steps", 3, "--overwrite").exit_code != 0
    result = generate(*args, "--steps", 3, "--resume")
    assert "3 images made" in result.output
    with Image.open(tmp_path / "000001.png") as image:
        assert "steps 3" in image.info["parameters"]


def test_images_of_an_older_run_are_not_adopted(tmp_path: Path) -> None:
    args = ["--preset", "digits", "--outdir", tmp_path]
    assert generate(*args, "--steps", 2, "--seeds", "5-6").exit_code == 0
    # Before, both kinds lay in one folder, and run.json knew of the new ones only.
    over = generate(*args, "--steps", 3, "--seeds", "0-1")
    assert over.exit_code == 1
    assert "holds 2 images of other settings" in over.output
    (tmp_path / "photo.png").write_bytes(b"somebody's")
    Image.new("L", (3, 2)).save(tmp_path / "000009.png")
    over = generate(*args, "--steps", 3, "--seeds", "0-1", "--overwrite")
    assert "holds 1 other images, which stay" in over.output
    # Before: without a word.
    assert "1 of the 3 pictures deleted in " in over.output
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "000000.png", "000001.png", "photo.png",
    ]  # fmt: skip
    # Neither at once, nor after a resumed run over them that dies before its first image.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "erk_guid.generation.jobs._generate",
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        generate(*args, "--steps", 3, "--seeds", "5-6", "--resume")
    assert "2 images made" in generate(*args, "--steps", 3, "--seeds", "5-6", "--resume").output


def test_files_further_down_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "another-job"
    other.mkdir()
    for name in ("000000.png", ".000001.png.7.partial.png"):
        (other / name).write_bytes(b"theirs")
    args = ["--preset", "digits", "--outdir", tmp_path, "--seeds", "0-1", "--steps", 2, "--resume"]
    assert generate(*args).exit_code == 0
    assert len(list(other.iterdir())) == 2


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
])  # fmt: skip
def test_running_out_of_memory_says_what_to_do(error: Exception, tmp_path: Path) -> None:
    def exhausted(*args: Any, **options: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erk_guid.generation.images.SeededNoise.randn", exhausted)
        result = generate("--preset", "digits", "--outdir", tmp_path, "--batch", 7)
    assert result.exit_code == 1
    assert "ran out of memory with --batch 7; choose a smaller one" in result.output


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_a_resumed_trace_keeps_its_earlier_rows(suffix: str, tmp_path: Path) -> None:
    trace = tmp_path / f"trace{suffix}"
    args = ["--preset", "digits", "--outdir", tmp_path / "o", "--steps", 2, "--trace", trace]
    assert generate(*args, "--seeds", "0-1").exit_code == 0
    before = read_trace(trace)
    assert generate(*args, "--seeds", "0-3", "--resume").exit_code == 0
    after = read_trace(trace)
    assert after["seed"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert after[:4].tobytes() == before.tobytes()
    assert generate(*args, "--seeds", "0-3", "--resume").exit_code == 0
    assert read_trace(trace).tobytes() == after.tobytes()


def test_resume_without_a_run_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_bytes(b"somebody's")
    result = generate("--preset", "digits", "--outdir", tmp_path, "--resume")
    assert result.exit_code == 1
    assert "no run.json" in result.output


BAD: list[tuple[list[Any], int, str]] = [
    (["--preset", "digitz"], 2, "unknown --preset 'digitz'; did you mean digits"),
    ([], 2, "name a network with --net or --preset"),
    (["--net", "/nowhere/x.pkl"], 1, "'/nowhere/x.pkl' is no file, no URL and no preset"),
    (["--preset", "digits", "--steps", 0], 2, "0 is not in the range x>=1"),
    (["--preset", "digits", "--batch", 0], 2, "0 is not in the range x>=1"),
    (["--preset", "digits", "--sigma_min", 90], 2, "sigma_min 90.0 must be below sigma_max 80"),
    (["--preset", "digits", "--sigma_min", 0], 2, "sigma_min must be a positive"),
    (["--preset", "digits", "--rho", "nan"], 2, "rho must be a positive, finite number, got nan"),
    (["--preset", "digits", "--w_stiff", -1], 2, "w_stiff must not be negative, got -1.0"),
    (["--preset", "digits-guid", "--w_stiff", "preset"], 2, "were measured for digits-guid"),
    (["--preset", "digits", "--w_stiff", "much"], 2, "'much' is neither a number nor auto"),
    (["--preset", "digits", "--w_stiff", "inf"], 2, "w_stiff must be a finite number, got inf"),
    (["--preset", "digits", "--w_stiff", 1, "--w_con", -0.5], 2, "w_con must not be negative"),
    (["--preset", "digits", "--w_con", 0.1], 2, "--w_con 0.1 has nothing to act on"),
    (["--preset", "digits", "--w_stiff", "auto", "--w_con", 0.1], 2, "no part in --w_stiff auto"),
    (["--preset", "digits", "--S_churn", 40, "--w_stiff", 1], 2, "S_churn must be 0 with ERK"),
    (["--preset", "digits", "--S_churn", 40, "--solver", "deis"], 2, "dpm2, euler, heun"),
    (["--preset", "digits", "--solver", "modal", "--eta", 1.5], 2, "eta must be a number from 0"),
    (["--preset", "digits", "--solver", "modal", "--steps", 2, "--response", "0.5"], 2,
     "response has 1 numbers, but 2 noise levels"),
    (["--preset", "digits", "--eta", 0.5], 2, "eta is an option of euler, dpmpp, modal"),
    (["--preset", "digits", "--solver", "dpmpp", "--eta", 0.5, "--predict_x0", "false"], 2,
     "eta is 0.5, but predict_x0 is False"),
    (["--preset", "digits", "--S_churn", -1], 2, "S_churn must be a number of 0 or more, got -1.0"),
    (["--preset", "digits", "--rho", 1, "--sigma_min", "1e-6"], 2, "cannot be told apart"),
    (["--preset", "digits", "--steps", 1, "--no-denoise-to-zero"], 2, "needs two noise levels"),
    (["--preset", "digits", "--net", ""], 1, "the name of the network is empty"),
    (["--preset", "digits", "--S_min", 1], 2, "--S_min has nothing to act on: --S_churn is 0"),
    (["--preset", "digits", "--solver", "unipc", "--predict_x0", "false", "--threshold", "true"], 2,
     "it needs predict_x0"),
    (["--preset", "digits", "--guidance", 2], 2, "--guidance 2 needs a guiding network"),
    (["--preset", "digits-guid", "--guidance", "inf"], 2, "--guidance must be a finite number"),
    (["--preset", "digits", "--class", 10], 1, "class 10 is outside 0 to 9"),
    (["--preset", "digits", "--class", -1], 2, "-1 is not in the range x>=0"),
    (["--net", GUIDE, "--class", 0], 1, "class 0 asked of an unconditional network"),
    (["--preset", "digits", "--seeds", "5-2"], 2, "the range '5-2' runs backwards; write 2-5"),
    (["--preset", "digits", "--seeds", "x"], 2, "'x' in 'x' is neither a whole number nor a range"),
    (["--preset", "digits", "--seeds", "1,,2"], 2, "is neither a whole number nor a range"),
    (["--preset", "digits", "--seeds", "0-99999999999"], 2, "more than ten million seeds"),
    (["--preset", "digits", "--device", "tpu"], 1, "'tpu'"),
    (["--net", COND, "--gnet", "digits", "--guidance", 2], 1, "guiding network has img_channels 1"),
    (["--preset", "digits", "--solver", "euler", "--w_stiff", 1], 2, "no embedded pair"),
    (["--preset", "digits", "--solver", "unipc", "--w_stiff", 1], 2, "have one: deis, dpm2, heun"),
    (["--preset", "digits", "--solver", "deis", "--w_stiff", "auto"], 2, "have one: dpm2, heun"),
    (["--preset", "digits", "--solver", "heun", "--order", 3], 2, "'heun' has no option 'order'"),
    (["--preset", "digits", "--solver", "dpmpp", "--order", 4], 2, "combines 1 to 3 evaluations"),
    (["--preset", "digits", "--solver", "dpm2", "--r", 0], 2, "r must be above 0"),
    (["--preset", "digits", "--schedule", "cosine"], 2, "none of polynomial, logsnr, time_uniform"),
    (["--preset", "digits", "--schedule", "3,4"], 2, "noise levels must fall"),
    (["--preset", "digits", "--schedule", "3,x"], 2, "noise levels are numbers"),
    (["--preset", "digits", "--schedule", "80,1", "--sigma_max", 50], 2, "--sigma_max has nothing"),
    (["--preset", "digits", "--schedule", "80,1", "--rho", 7], 2, "--rho has nothing to act on"),
    (["--preset", "digits", "--schedule", "logsnr", "--rho", 3], 2, "with --schedule logsnr"),
    (["--preset", "digits", "--w_stiff", 1, "--steps", 1], 2, "makes no pair to compare"),
    (["--preset", "digits", "--w_stiff", 1, "--steps", 2], 2, "heun with 2 steps makes no pair"),
    (["--preset", "digits", "--w_stiff", 1, "--bound", 0], 2, "--bound 0 switches --w_stiff off"),
    (["--preset", "digits", "--S_churn", 9, "--S_min", 90], 2, "no step begins from --S_min 90"),
    (["--preset", "digits", "--S_churn", 9, "--S_max", 0.001], 2, "--S_churn 9 has nothing to"),
    (["--preset", "digits", "--solver", "rk4"], 2, "'rk4' is not one of 'deis', 'dpm2'"),
    (["--preset", "digits", "--trace", "t.txt"], 1, "end its name in .csv or .npz"),
    (["--preset", "digits", "--rank-timeout", "nan"], 1, "--rank-timeout must be seconds"),
    (["--preset", "digits", "--gnet", "digits"], 2, "--gnet digits has nothing to act on"),
    (["--net", "digits", "--gnet", "digits"], 2, "--gnet digits has nothing to act on"),
    (["--preset", "digits", "--outdir", ""], 2, "it is empty; name a file or a folder"),
    (["--preset", "digits", "--grid", "sheet.xyz"], 1, "end its name in .png or .jpg"),
    (["--preset", "digits", "--grid", "/proc/no/sheet.png"], 1, "cannot write to /proc/no"),
    (["--preset", "digits", "--colour", "red"], 2, "No such option"),
    (["--preset", "digits", "--rho", "0.001"], 2, "cannot be told apart"),
    (["--preset", "digits", "--rho", "1e20"], 2, "cannot be told apart"),
    (["--preset", "digits", "--vae", "/nonexistent"], 1, "--vae /nonexistent: digits has no VAE"),
    (["--preset", "digits", "--encoder-batch", 3], 1, "--encoder-batch 3: digits has no VAE"),
    (["--preset", "digits", "--trace", "/proc/t.csv"], 1, "cannot write to /proc"),
    (["--net", str(DATA / "README.md")], 1, "damaged, or not a pickle"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "code", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(args: list[Any], code: int, message: str, tmp_path: Path) -> None:
    result = generate("--outdir", tmp_path / "out", *args)
    assert message in result.output
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)  # and not an error that has a traceback
    assert not list(tmp_path.rglob("*.png"))


def test_cuda_asked_for_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    result = generate("--preset", "digits", "--outdir", tmp_path, "--device", "cuda")
    assert result.exit_code == 1
    assert "device 'cuda' is not present here; use one of: cpu" in result.output


def test_an_outdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = generate("--preset", "digits", "--outdir", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert re.search(r"cannot write to .*file/out: Not a directory", result.output)
    for more in ([], ["--resume"]):
        result = generate("--preset", "digits", "--outdir", tmp_path / "file", *more)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)


def test_the_outdir_is_required() -> None:
    assert "Missing option '--outdir'" in generate("--preset", "digits").output


def test_erk_guid_has_the_same_subcommands(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "edm2-img512-xxl-autog-dino" in runner.invoke(main, ["presets"]).output
    dest = tmp_path / "net.safetensors"
    result = runner.invoke(main, ["convert", COND, str(dest)])
    assert result.exit_code == 0, result.output
    assert dest.exists()
    bad = runner.invoke(main, ["convert", COND, str(tmp_path / "net.pt")])
    assert bad.exit_code == 2
    assert "must end in .safetensors" in bad.output
    made = runner.invoke(
        main, ["generate", "--net", str(dest), "--outdir", str(tmp_path / "o"), "--steps", "2"]
    )
    assert made.exit_code == 0, made.output


@pytest.mark.parametrize("w_stiff", ["auto", "0", "0.5"])
def test_a_gate_at_its_default_goes_with_every_form(w_stiff: str, tmp_path: Path) -> None:
    done = generate("--preset", "digits", "--outdir", tmp_path, "--seeds", 0, "--steps", 3,
                    "--device", "cpu", "--w_stiff", w_stiff, "--gate", "stiffness")  # fmt: skip
    assert done.exit_code == 0, done.output


def test_a_run_recorded_with_a_default_that_was_typed_is_continued(tmp_path: Path) -> None:
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2, "--device", "cpu",
            "--solver", "deis"]  # fmt: skip
    assert generate(*args, "--seeds", 0).exit_code == 0
    path = tmp_path / "run.json"
    run = json.loads(path.read_text())
    # As an earlier version wrote it for --order=4.
    run["settings"]["order"] = 4
    path.write_text(json.dumps(run))
    done = generate(*args, "--order", 4, "--seeds", "0-1", "--resume")
    assert done.exit_code == 0, done.output
    refused = generate(*args, "--order", 3, "--seeds", "0-2", "--resume")
    assert "order was None, now 3" in refused.output


@pytest.mark.parametrize("rule", ["near_noise", "last_step", "noise"])
def test_runs_by_an_earlier_rule_are_not_added_to(rule: str, tmp_path: Path) -> None:
    args = ["--preset", "digits", "--outdir", tmp_path, "--steps", 2, "--device", "cpu",
            "--solver", "modal", "--eta", 0.5 if rule == "noise" else 0]  # fmt: skip
    assert generate(*args, "--seeds", 0).exit_code == 0
    path = tmp_path / "run.json"
    run = json.loads(path.read_text())
    del run["settings"][rule]
    path.write_text(json.dumps(run))
    done = generate(*args, "--seeds", "0-1", "--resume")
    assert done.exit_code == 1
    assert f"{rule} was None, now 2" in done.output


def test_a_guidance_interval_saves_evaluations_of_the_guiding_network(tmp_path: Path) -> None:
    args = ["--preset", "digits-autog", "--steps", 4, "--device", "cpu", "--seeds", 0]
    done = generate(*args, "--outdir", tmp_path / "all")
    assert "network evaluations each: 7 and 7 of the guiding network" in done.output
    done = generate(*args, "--outdir", tmp_path / "some", "--guidance-interval", "0.2,5")
    # Of the levels 80, 9.7, 0.47, 0.002 of Heun with four steps only 0.47 lies inside: it is
    # visited at the end of one step and at the beginning of the next.
    assert "network evaluations each: 7 and 2 of the guiding network" in done.output, done.output
    run = json.loads((tmp_path / "some" / "run.json").read_text())
    assert run["settings"]["guidance_interval"] == [0.2, 5.0]
    more = ["--outdir", tmp_path / "some", "--resume"]
    assert generate(*args, *more, "--guidance-interval", "0.2,5").exit_code == 0
    refused = generate(*args, *more)
    assert refused.exit_code == 1
    assert "guidance_interval" in refused.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "digits", "--guidance-interval", "0.2,5"], "has nothing to act on"),
        (["--preset", "digits-guid", "--guidance-interval", "5,0.2"], "no LOW,HIGH"),
        (["--preset", "digits-guid", "--guidance-interval", "all"], "no LOW,HIGH"),
    ],
)
def test_a_guidance_interval_that_makes_no_sense_is_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = generate(*options, "--outdir", tmp_path)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.slow
def test_without_docstrings(tmp_path: Path) -> None:
    # Catches: a KeyError under python -OO, where help texts from docstrings are missing.
    command = [sys.executable, "-OO", "-m", "erk_guid", "generate", "--preset=digits",
               f"--outdir={tmp_path}", "--seeds=0", "--steps=1", "--device=cpu"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stop_that_other_code_swallows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: "damaged, or not a safetensors file" where Ctrl-C came while tensors were read: C++
    # code turned the exception into one of its own.
    def read(*args: Any, **options: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ErkGuidError("damaged, or not a safetensors file") from None

    @click.command()
    @reporting_errors
    def another() -> None:
        read()

    monkeypatch.setattr(GenerationConfig, "open", read)
    for done in (
        generate("--preset", "digits", "--outdir", tmp_path / "o"),
        CliRunner().invoke(another, []),
    ):
        assert done.exit_code == 143
        assert "stopped by SIGTERM" in done.output.replace("Stopped", "stopped")
        assert "damaged" not in done.output


def test_a_pipe_with_the_name_of_an_image(tmp_path: Path) -> None:
    # Catches: --resume that waits for a pipe's other end.
    args = ("--preset", "digits", "--outdir", tmp_path, "--seeds", "0-1", "--steps", 1, "--resume")
    assert generate(*args).exit_code == 0
    (tmp_path / "000001.png").unlink()
    os.mkfifo(tmp_path / "000001.png")
    assert generate(*args).exit_code == 0
    assert (tmp_path / "000001.png").is_file()


def test_a_trace_whose_part_files_are_gone_is_kept(tmp_path: Path) -> None:
    # Rows of images that stay, replaced by an empty trace: an attack found it.
    trace = tmp_path / "t.csv"
    args = ["--preset=digits", f"--outdir={tmp_path / 'o'}", "--steps=2", f"--trace={trace}"]
    assert generate(*args, "--seeds=0-1").exit_code == 0
    before = trace.read_bytes()
    (tmp_path / "o" / ".trace.0.part").unlink()
    done = generate(*args, "--seeds=0-2", "--resume")
    assert done.exit_code == 1
    assert "rows of 2 images, such as that of seed 0" in done.output
    done = generate(*args, "--seeds=1-2")  # seed 0 stays, as its settings are the same
    assert done.exit_code == 1
    assert "rows of 1 images, such as that of seed 0" in done.output
    assert trace.read_bytes() == before


def test_a_run_within_the_folder_of_another_is_refused(tmp_path: Path) -> None:
    # Each would take the other's images for its own, and --overwrite would delete them.
    args = ["--preset=digits", "--steps=2", "--seeds=0"]
    inner = [*args, f"--outdir={tmp_path / 'a' / '000000'}"]
    outer = [*args, f"--outdir={tmp_path / 'a'}", "--subdirs"]
    assert generate(*inner).exit_code == 0
    for more in ([], ["--resume"], ["--overwrite"]):
        done = generate(*outer, *more)
        assert done.exit_code == 1
        assert "000000 holds another run" in done.output
    assert (tmp_path / "a" / "000000" / "000000.png").exists()
    (tmp_path / "a" / "000000" / "run.json").rename(tmp_path / "a" / "run.json")
    done = generate(*inner, "--overwrite")
    assert done.exit_code == 1
    assert "is named like a folder of the run in" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--schedule=80,10,1", "--steps=8"], "--steps 8 and 3 noise levels in --schedule"),
        (["--afs", "--steps=1"], "would never ask the network"),
    ],
)
def test_steps_that_nothing_follows(args: list[str], message: str, tmp_path: Path) -> None:
    done = generate("--preset=digits", f"--outdir={tmp_path}", *args)
    assert done.exit_code == 2
    assert message in done.output


def test_seeds_of_one_stream_in_two_runs(tmp_path: Path) -> None:
    args = ["--preset=digits", f"--outdir={tmp_path}", "--steps=2"]
    assert generate(*args, "--seeds=0").exit_code == 0
    done = generate(*args, f"--seeds={2**32}")
    assert done.exit_code == 1
    assert f"seeds 0 and {2**32} give one image" in done.output


def test_arrays_of_others_are_no_trace(tmp_path: Path) -> None:
    # Every .npz begins alike: a reference was replaced by a trace.
    np.savez(tmp_path / "mine.npz", a=1)
    before = (tmp_path / "mine.npz").read_bytes()
    trace = f"--trace={tmp_path / 'mine.npz'}"
    done = generate("--preset=digits", f"--outdir={tmp_path / 'o'}", "--steps=2", trace)
    assert done.exit_code == 1
    assert "is no trace" in done.output
    assert (tmp_path / "mine.npz").read_bytes() == before
