"""The README's Python runs as it stands, and its commands name options that exist."""

from __future__ import annotations

import re
from typing import Any

import torch
from conftest import ROOT

from erk_guid.cli.generate import generate_command
from erk_guid.cli.metrics import metrics_command
from erk_guid.cli.precision_recall import precision_recall_command
from erk_guid.cli.reproduce import reproduce_command
from erk_guid.models.checkpoints import PRESETS

README = (ROOT / "README.md").read_text()
PAGES = [
    (ROOT / name).read_text()
    for name in ("docs/edm2.md", "docs/scoring.md", "docs/reproducing.md", "dataset-refs/README.md")
]
LONGEST = 900
"""Words of the README."""


def test_it_can_be_read_in_a_minute() -> None:
    assert len(README.split()) <= LONGEST


def test_the_python_blocks_run_in_order() -> None:
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, scope)
        assert scope["images"].shape == (4, 1, 32, 32)
    # The loop by hand is the first block's sampler.
    again = scope["erk_guid"].sample(
        scope["net"], scope["x"], scope["sigmas"], guidance=scope["guidance"]
    )
    torch.testing.assert_close(scope["y"], again, rtol=0, atol=1e-3)


def test_the_options_and_presets_named_exist() -> None:
    groups = {
        r"generate_images\.py": [generate_command],
        r"calculate_metrics\.py": list(metrics_command.commands.values()),
        r"calculate_precision_recall_is\.py": [precision_recall_command],
        r"reproduce\.sh": [reproduce_command],
    }
    for script, commands in groups.items():
        known = {o for c in commands for parameter in c.params for o in parameter.opts}
        texts = [README, *PAGES]
        used = [u for text in texts for u in re.findall(script + r" (.*?)\n(?! {8})", text, re.S)]
        assert len(used) >= 2
        for command in used:
            shell = command.split("#")[0].split("`")[0]
            for option in re.findall(r"(--\w[\w-]*)", shell):
                assert option in known | {"--help"}, option
            for preset in re.findall(r"--preset=(\S+)", shell):
                assert preset in PRESETS


def test_torchrun_does_not_take_num_for_its_own() -> None:
    # It would say: ambiguous option: --num could match --numa-binding.
    for line in re.findall(r"^ {4}torchrun .*?\n(?! {8})", "".join(PAGES), re.S | re.M):
        assert "--num=" not in line or " -- " in line


def test_nothing_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_pictures_and_links_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
