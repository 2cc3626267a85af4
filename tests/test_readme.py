"""The README's Python runs as it stands, and its commands name options that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from erk_guid.checkpoints import PRESETS
from erk_guid.cli.generate import generate_command

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run_in_order() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, scope)
        assert scope["images"].shape == (4, 1, 32, 32)
    # The loop by hand is the first block's sampler.
    again = scope["erk_guid"].sample(
        scope["net"], scope["x"], scope["sigmas"], guidance=scope["guidance"]
    )
    torch.testing.assert_close(scope["y"], again, rtol=0, atol=1e-3)


def test_the_options_and_presets_named_exist() -> None:
    known = {name for parameter in generate_command.params for name in parameter.opts}
    commands = re.findall(r"generate_images\.py (.*?)\n(?! {8})", README, re.S)
    assert len(commands) >= 4
    for command in commands:
        for option in re.findall(r"(--\w[\w-]*)", command):
            assert option in known, option
        for preset in re.findall(r"--preset=(\S+)", command):
            assert preset in PRESETS


def test_nothing_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
