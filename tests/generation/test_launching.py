"""What launchers put into the environment: wrong values are one line, at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.peers import launched

SOUND = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE is 'abc', not a whole number from 1"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', not a whole number from 1"),
        ("WORLD_SIZE", "\x1b[2J", r"WORLD_SIZE is '\?\[2J'"),
        ("RANK", "x", "RANK is 'x', not a whole number from 0 to 1"),
        ("RANK", "7", "RANK is '7', not a whole number from 0 to 1"),
        ("RANK", "-1", "RANK is '-1', not a whole number from 0 to 1"),
        ("MASTER_PORT", "70000", "MASTER_PORT is '70000', not a whole number from 1 to 65535"),
    ],
)
def test_wrong_values_are_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: a traceback for what is no number, and rank 7 of 2 waited for good.
    for variable, sound in {**SOUND, name: value}.items():
        monkeypatch.setenv(variable, sound)
    with pytest.raises(ErkGuidError, match=message):
        launched()


def test_sound_values_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, sound in SOUND.items():
        monkeypatch.setenv(variable, sound)
    assert launched() == (1, 2)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(ROOT / "generate_images.py"), "--preset=digits",
             f"--outdir={tmp_path / 'o'}", "--steps=1", "--device=cpu"],
            env={**os.environ, **SOUND, "RANK": "0", "MASTER_PORT": str(port)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"rank 0 cannot open the port {port}" in done.stderr
    assert "Traceback" not in done.stderr
