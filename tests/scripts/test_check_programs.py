"""scripts/check_programs.py, as far as it can be run without other programs' checkouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "check_programs.py"


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_this_checkout_agrees_with_itself(tmp_path: Path) -> None:
    # Not evidence about EDM2 or ERK-Guid: that the script's parts for them work, when somebody
    # has those checkouts.
    rows = tmp_path / "rows.json"
    done = run("--edm2", ROOT, "--erk-guid", ROOT, "--json", rows)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "edm2: 10 of 10 agree; 0 that it does not complete itself" in done.stdout
    assert "erk-guid: 9 of 9 agree" in done.stdout
    assert {row["program"] for row in json.loads(rows.read_text())} == {"edm2", "erk-guid"}


@pytest.mark.slow
def test_a_program_that_differs_is_told(tmp_path: Path) -> None:
    # A checkout whose sampler is another one: the table says where, and the exit code is 1.
    for name in ("generate_images.py", "calculate_metrics.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    text = (ROOT / "generate_images.py").read_text()
    other = "generate_images as _generate\n\n\ndef generate_images(**options):\n"
    other += "    return _generate(**options, w_stiff=0.5)\n"
    changed = text.replace("    generate_images,\n", "", 1)
    changed = changed.replace(
        "__all__ =", f"from erk_guid.integrations.edm2 import {other}\n\n__all__ =", 1
    )
    (tmp_path / "generate_images.py").write_text(changed)
    done = run("--edm2", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS  edm2  generate_images(num_steps=6): noise and labels equal" in done.stdout
    assert "edm2: " in done.stdout


@pytest.mark.slow
def test_what_it_cannot_use_is_named(tmp_path: Path) -> None:
    assert "name at least one checkout" in run().stderr
    for option, missing in (
        ("--diff-sampler", "sample.py"), ("--edm2", "generate_images.py"),
        ("--comfyui", "comfy/k_diffusion"),
    ):  # fmt: skip
        done = run(option, tmp_path)
        assert done.returncode == 1
        assert f"has no {missing}" in done.stderr
        assert "Traceback" not in done.stderr
    assert "there is no folder" in run("--edm2", ROOT, "--json", tmp_path / "no" / "x.json").stderr
