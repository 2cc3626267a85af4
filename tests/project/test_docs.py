"""The pages agree with each other and with the program; test_wheel.py runs their examples."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import ROOT

import erk_guid
from erk_guid.cli import command_named

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


PROGRAMS = {
    "erk-guid": [],
    "erk_guid": [],  # python -m erk_guid, torchrun -m erk_guid
    "generate_images.py": ["generate"],
    "calculate_metrics.py": ["metrics"],
    "calculate_precision_recall_is.py": ["precision-recall"],
    "scripts/reproduce.sh": ["reproduce"],
}


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each of our commands in the page's blocks of code."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    inline = [code for code in re.findall(r"`([^`\n]+)`", text) if " --" in code]
    for line in (*re.findall(r"^(?:    |\$ )\s*(.+)$", text, re.M), *inline):
        try:
            words = shlex.split(line.lstrip("$ "), comments=True)
        except ValueError:  # prose or Python with an apostrophe
            continue
        if words and words[0] not in (*PROGRAMS, "python", "bash", "torchrun", "srun"):
            continue
        for k, word in enumerate(words):
            if word in PROGRAMS:
                end = next((i for i, w in enumerate(words) if i > k and w in "|>&;"), None)
                yield [*PROGRAMS[word], *words[k + 1 : end]]
                break


def parsed(command: click.Command, name: str, arguments: list[str]) -> None:
    """Parse a command line, and what a group leaves for its command; run nothing."""
    with command.make_context(name, arguments) as context:
        if isinstance(command, click.Group):
            left = [*getattr(context, "_protected_args", ()), *context.args]
            found = command.get_command(context, left[0])
            assert found is not None, left
            parsed(found, left[0], left[1:])


PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "dataset-refs" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_command_lines_of_a_page_can_be_typed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: an option that a page names and the program does not have, which a stranger copies
    # first. ('erk-guid fit --num=128' was one.)
    monkeypatch.chdir(tmp_path)
    for arguments in command_lines(page):
        if not arguments or arguments[0] in ("--help", "--version") or "error)" in arguments:
            continue
        found = command_named(arguments[0])
        try:
            parsed(found, arguments[0], arguments[1:])
        except click.exceptions.Exit:
            pass  # --help
        except click.UsageError as error:
            said = error.format_message()
            # Files that the reader has, and this test has not.
            missing = ("does not exist", "no list such as", "cannot read", "cannot import")
            assert any(words in said for words in missing), (arguments, said)


def test_some_command_lines_are_found() -> None:
    found = [line for page in PAGES for line in command_lines(page)]
    assert len(found) > 40
    assert ["presets"] in found or ["play"] in found
