"""Images that are written beside sampling are those of the seeds, with their own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import erk_guid
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation import writing
from erk_guid.generation.jobs import GenerationJob, run_job


def test_files_have_the_pixels_and_the_class_of_their_seed(tmp_path: Path) -> None:
    job = GenerationJob(net="digits", outdir=tmp_path, seeds=range(7), batch=3, num_steps=2)
    assert run_job(job) == 7
    net = erk_guid.load("digits").net
    for batch in erk_guid.generate(net, range(7), batch_size=3, num_steps=2):
        assert batch.labels is not None
        for seed, pixels, label in zip(batch.seeds, batch.images, batch.labels, strict=True):
            with Image.open(tmp_path / f"{seed:06d}.png") as image:
                assert np.array_equal(np.asarray(image), pixels[0].numpy())
                about = image.info["parameters"]
            assert about.startswith(f"seed {seed}, class {int(label.argmax())}, model digits")


def test_a_file_that_cannot_be_written_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_png", failing)
    job = GenerationJob(net="digits", outdir=tmp_path, seeds=range(4), batch=1, num_steps=2)
    with pytest.raises(ErkGuidError, match=r"cannot write an image to .*No space left"):
        run_job(job)
