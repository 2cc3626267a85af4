"""The pages' complete examples run as they stand."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import erk_guid

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["diffusers.md", "k-diffusion.md"])
def test_the_example_of_the_page_runs(page: str, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    if page == "k-diffusion.md":
        code += "\nassert guided.shape == also.shape == (4, 1, 32, 32)\n"
        code += "assert (guided - also).abs().mean() < 0.2  # two ways to the same digits\n"
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if page == "diffusers.md":
        pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
        assert set(pictures) == {"w_stiff-0.png", "w_stiff-0.5.png", "w_stiff-auto.png"}
        # On a random network the published form may change less than a grey level.
        assert pictures["w_stiff-0.png"] != pictures["w_stiff-auto.png"]


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    for page in (*DOCS.glob("*.md"), root / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_reference_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location(
        "api_reference", DOCS.parent / "scripts" / "api_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.reference()
    assert page == (DOCS / "api.md").read_text(), "run python scripts/api_reference.py docs/api.md"
    # Every public name has its entry: one that is missing has no docstring.
    for name in set(erk_guid.__all__) - {"__version__"}:
        assert f"### {name}\n" in page
