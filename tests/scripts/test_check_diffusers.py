"""scripts/check_diffusers.py, on a checkout of two tests that are written here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "check_diffusers.py"
TESTS = """
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel


class Halved(DDIMScheduler):
    # Not the scheduler that its config describes.
    def step(self, *args, **options):
        found = super().step(*args, **options)
        return type(found)(prev_sample=found.prev_sample / 2)


class DDPMTests:
    pipeline_class = DDPMPipeline
    scheduler = DDIMScheduler

    def get_dummy_components(self):
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )
        return {"unet": unet, "scheduler": self.scheduler()}

    def get_dummy_inputs(self, device):
        return {"output_type": "np"}


class DDIMTests(DDPMTests):
    class pipeline_class(DDIMPipeline):
        def __init__(self, unet, scheduler):
            super().__init__(unet, DDIMScheduler())
            self.scheduler = scheduler

    scheduler = Halved


class NothingTests:
    pipeline_class = DDPMPipeline
"""


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_what_agrees_and_what_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "pipelines"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "test_two.py").write_text(TESTS)
    (folder / "test_broken.py").write_text("import a_module_that_nobody_has")
    done = run(tmp_path, "DDPMPipeline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as its own" in done.stdout
    assert "test_broken: not read (ModuleNotFoundError" in done.stderr
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "modal ends elsewhere; Heun ends elsewhere" in done.stdout
    assert "2 of 2 pipelines were run; in 1 of them something is wrong" in done.stdout
    done = run(tmp_path, "Nothing")
    assert done.returncode == 1
    assert "has no test of Nothing" in done.stderr
