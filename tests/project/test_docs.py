"""The pages agree with each other and with the program; test_wheel.py runs their examples."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import erk_guid

DOCS = ROOT / "docs"


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    for page in (*DOCS.glob("*.md"), root / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def named(path: str) -> object:
    """The object that a dotted path names."""
    parts = path.split(".")
    for k in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def test_the_reference_has_every_public_name() -> None:
    # Catches: a name without an entry or docstring, and an entry of what is gone.
    paths = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    objects = [named(path) for path in paths]
    assert all(found.__doc__ for found in objects)
    for name in set(erk_guid.__all__) - {"__version__", "solvers"}:
        assert any(getattr(erk_guid, name) is found for found in objects), name


@pytest.mark.slow
def test_the_site_builds_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    assert "Find the noise levels at which a model needs the fewest evaluations" in page
    assert (tmp_path / "toy.html").exists()
