"""The file that settings are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erk_guid import (
    ERKGuidance,
    Guidance,
    ParameterFreeGuidance,
)
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.settings import Settings, read_settings

MADE_FOR = {"solver": "heun", "num_steps": 5, "schedule": "polynomial"}


@pytest.mark.parametrize(
    "guidance",
    [
        ERKGuidance(),
        ERKGuidance(0.87, 0.35),
        ERKGuidance(0.5, 0.6, bound=0.2, gate="step"),
        ParameterFreeGuidance(),
    ],
)
def test_settings_come_back(guidance: Guidance, tmp_path: Path) -> None:
    settings = Settings(guidance, MADE_FOR, {"net": "digits"})
    settings.write(tmp_path / "s.json")
    assert read_settings(tmp_path / "s.json") == settings


GOOD = {"erk_guid_settings": 1, "w_stiff": 0.5, "w_con": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\x00\xff", "not JSON"),
        ("[1]", "no file of settings"),
        ('{"w_stiff": 1}', "no file of settings"),
        (json.dumps({**GOOD, "erk_guid_settings": 2}), "another version"),
        (json.dumps({**GOOD, "w_stif": 1}), "unknown entry 'w_stif'"),
        (json.dumps({"erk_guid_settings": 1, "w_con": 0.5}), "does not say w_stiff"),
        (json.dumps({**GOOD, "w_stiff": "strong"}), "a number or 'auto'"),
        (json.dumps({**GOOD, "w_stiff": True}), "w_stiff cannot be True"),
        (json.dumps({**GOOD, "w_stiff": [1]}), r"w_stiff cannot be \[1\]"),
        (json.dumps({**GOOD, "w_con": float("nan")}), "w_con must be a finite number"),
        (json.dumps({**GOOD, "w_con": -1}), "must not be negative"),
        (json.dumps({**GOOD, "gate": "wide"}), "gate must be"),
        (json.dumps({**GOOD, "made_for": 3}), "hold names and values"),
        (json.dumps({**GOOD, "made_for": {"net": "x"}}), "unknown entry 'net'"),
        (json.dumps({**GOOD, "made_for": {"num_steps": 2.5}}), "num_steps cannot be 2.5"),
        (json.dumps({**GOOD, "made_for": {"schedule": [1, "x"]}}), "must be numbers"),
        (json.dumps({**GOOD, "made_for": {"schedule": []}}), "must be numbers"),
        (json.dumps({**GOOD, "w_stiff": 10**400}), "w_stiff cannot be 1"),
        (json.dumps({**GOOD, "measured": "x" * 2_000_000}), "too large"),
    ],
)  # fmt: skip
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text, encoding="latin-1")
    with pytest.raises(ErkGuidError, match=message) as caught:
        read_settings(tmp_path / "s.json")
    assert "s.json" in str(caught.value)


def test_a_count_that_contradicts_the_levels(tmp_path: Path) -> None:
    # Catches: "steps 7" said, and 3 used.
    path = tmp_path / "s.json"
    made_for = {"solver": "modal", "num_steps": 7, "schedule": [5, 1, 0.1]}
    Settings(ERKGuidance(), made_for).write(path)
    with pytest.raises(ErkGuidError, match="says num_steps 7 and lists 3 noise levels"):
        read_settings(path)
