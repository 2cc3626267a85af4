"""Labelled sets: what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erk_guid.common.datasets import DatasetError, load_image_set, open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(3):
        Image.fromarray(np.full((4, 4), 40 * k, dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "dataset.json is damaged"),
        ("[]", "dataset.json is damaged"),
        ('{"labels": [1, 2, 3]}', r"must hold \{"),
        ('{"labels": [["0.png", "cat"]]}', r"must hold \{"),
        ('{"labels": [["0.png", 1]]}', "has no label for 1.png"),
    ],
)
def test_a_damaged_dataset_json_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_image_set(folder)


def test_labels_are_those_of_the_file(folder: Path) -> None:
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [["2.png", 5], ["0.png", 7], ["1.png", 6]]})
    )
    found = load_image_set(folder)
    assert found.labels.tolist() == [7, 6, 5]
    assert found.labels.dtype == np.int64


def test_labels_of_an_npz(tmp_path: Path) -> None:
    images = np.zeros((3, 1, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "SET.npz", images=images, labels=np.array([1, 2, 3], dtype=np.uint8))
    (tmp_path / "SET.npz").rename(tmp_path / "SET.NPZ")
    assert len(open_images(tmp_path / "SET.NPZ")) == 3
    assert load_image_set(tmp_path / "SET.NPZ").labels.dtype == np.int64
    for labels in (np.array([1, 2]), np.zeros((3, 2), dtype=int)):
        np.savez(tmp_path / "bad.npz", images=images, labels=labels)
        with pytest.raises(DatasetError, match="labels must be one whole number"):
            load_image_set(tmp_path / "bad.npz")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    # Catches: the classes of a data set that are links passed over without a word; a loop of links
    # without an end; a folder with two names counted twice.
    for folder, count in (("data/real", 2), ("elsewhere", 3)):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (4, 4)).save(tmp_path / folder / f"{k}.png")
    data = tmp_path / "data"
    (data / "extra").symlink_to(tmp_path / "elsewhere")
    (data / "twice").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    assert open_images(data).names == ["extra/0.png", "extra/1.png", "extra/2.png",
                                       "real/0.png", "real/1.png"]  # fmt: skip
