"""Standard streams that fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FULL = Path("/dev/full")


needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="this system has no device that is always full"
)


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize(
    "command",
    [["-m", "erk_guid", "--help"], ["-m", "erk_guid", "presets"], ["generate_images.py", "--help"]],
    ids=str,
)
def test_a_full_disk_behind_standard_output_is_one_line(command: list[str]) -> None:
    # Before: a traceback; and with little output, Python's own "Exception ignored".
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False, timeout=120,
        )  # fmt: skip
    assert done.stderr == "Error: cannot write to standard output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.slow
@needs_full
def test_a_full_disk_behind_the_last_line_of_a_run(tmp_path: Path) -> None:
    # Before: "No space left on device; mend that", which did not say of what.
    command = ["--preset=digits", "--device=cpu", "--steps=2", "--seeds=0", f"--outdir={tmp_path}"]
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "generate_images.py", *command], cwd=ROOT, stdout=full,
            stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.stderr.endswith("Error: cannot write to standard output: No space left on device\n")
    assert done.returncode == 1
    assert (tmp_path / "000000.png").exists()


def test_a_reader_that_leaves_needs_no_word() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m erk_guid presets | head -n 1", shell=True, cwd=ROOT,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("preset")
    assert done.stderr == ""
