"""The pages agree with each other and with the program; test_wheel.py runs their examples."""

from __future__ import annotations

import importlib.util
import re

from conftest import ROOT

import erk_guid

DOCS = ROOT / "docs"


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
    for name in set(erk_guid.__all__) - {"__version__", "solvers"}:
        assert f"### {name}\n" in page
