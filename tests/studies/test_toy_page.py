"""The page of the 2-D tree: its numbers against the sampler, its file, and what a browser shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from support.browser import opened

import erk_guid
from erk_guid.cli.toy import toy_command
from erk_guid.mixtures import tree_mixture
from erk_guid.studies import toy_page
from erk_guid.studies.toy import SIGMA_MAX, compute_toy

LARGEST = 1_500_000
"""Bytes that a page may have."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few settings, and an exact solution in few steps."""
    monkeypatch.setattr(toy_page, "STEPS", (5, 6))
    monkeypatch.setattr(toy_page, "STRENGTHS", (0.0, 0.5, 1.0))
    monkeypatch.setattr(toy_page, "SAMPLES", 12)
    monkeypatch.setattr(toy_page, "EXACT_LEVELS", 9)
    monkeypatch.setattr(toy_page, "DOTS", 40)


def points(flat: list[int], levels: int) -> torch.Tensor:
    return torch.tensor(flat, dtype=torch.float64).reshape(-1, levels, 2) / toy_page.SCALE


@pytest.mark.usefixtures("small")
def test_the_numbers_are_the_samplers() -> None:
    # Catches trajectories of another solver, strength or start than the controls name, and x and y
    # in another order: each is sampled again, by the public function.
    found = toy_page.numbers(w_con=0.5, paths=4, samples=12, seed=0)
    tree = tree_mixture()
    heun, _, deis = found["samplers"]
    assert heun["evaluations"] == [8, 10]
    assert deis["evaluations"] == [4, 5]
    assert deis["auto"] is None
    sigmas = erk_guid.karras_sigmas(6, sigma_max=SIGMA_MAX)[:-1]
    exact = points(found["exact"]["path"], 9)
    for run, solver, guidance in (
        (heun["published"][1][0], "heun", None),
        (heun["published"][1][1], "heun", erk_guid.ERKGuidance(0.5, 0.5)),
        (heun["auto"][1], "heun", erk_guid.ParameterFreeGuidance()),
        (deis["published"][1][2], "deis", erk_guid.ERKGuidance(1.0, 0.5)),
    ):
        path = points(run["path"], 6)
        assert path.shape == (4, 6, 2)
        assert torch.equal(path[:, 0], exact[:, 0])
        end = erk_guid.sample(tree, path[:, 0], sigmas, solver=solver, guidance=guidance)
        # Starts are rounded to 1/400; where paths part, that may be much in the end.
        near = (end - path[:, -1]).norm(dim=1) < 0.02
        assert near.sum() >= 3


def test_distances_are_those_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    # The picture's command computes them on its own, with an exact solution of its own.
    monkeypatch.setattr(toy_page, "STEPS", (6,))
    monkeypatch.setattr(toy_page, "STRENGTHS", (0.0, 0.5))
    page = toy_page.numbers(w_con=0.5, paths=2, samples=16, seed=0)
    toy = compute_toy(6, 0.5, 0.5, paths=2, samples=16, grid=8)
    heun = page["samplers"][0]
    shown = [*(run["distance"] for run in heun["published"][0]), heun["auto"][0]["distance"]]
    for k, distance in enumerate(shown):
        assert distance == pytest.approx(float(toy.arrays[f"error_{k}"][-1]), rel=0.02)


@pytest.mark.usefixtures("small")
def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "toy.html"
    done = CliRunner().invoke(toy_command, [f"--html={path}", "--paths=3"])
    assert done.exit_code == 0, done.output
    text = path.read_text(encoding="utf-8")
    assert toy_page.PLACE not in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert "http:" not in text
    assert "https:" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(data)["steps"] == [5, 6]
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.html"]


def test_the_page_in_the_docs_is_small_and_of_this_template() -> None:
    text = (ROOT / "docs" / "toy.html").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    template = (ROOT / "erk_guid" / "studies" / toy_page.TEMPLATE).read_text(encoding="utf-8")
    before, after = template.split(toy_page.PLACE)
    assert text.startswith(before)
    assert text.endswith(after), "run 'erk-guid toy --html=docs/toy.html'"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps=9"], "--steps has no part in --html"),
        (["--sigma=1"], "--sigma has no part in --html"),
        (["--paths=300"], "--paths 300: the page has at most 128"),
        (["--w_con=nan"], "w_con must be a finite number"),
    ],
)
def test_options_without_a_part_are_refused(args: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(toy_command, [f"--html={tmp_path / 'x.html'}", *args])
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.md", "thesis.txt", "page.htm", "page"])
def test_a_page_has_the_name_of_a_page(name: str, tmp_path: Path) -> None:
    # Catches: --html=notes.md, which replaced somebody's notes by a page.
    (tmp_path / name).write_text("mine")
    done = CliRunner().invoke(toy_command, [f"--html={tmp_path / name}"])
    assert done.exit_code == 2
    assert "end its name in .html" in done.output
    assert (tmp_path / name).read_text() == "mine"


def drawing(page: Any) -> list[str]:
    """What the picture shows: the trajectories of the plain and of the guided solver."""
    return [page.get_attribute(f"#{name}", "d") for name in ("plain", "guided")]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(800, False), (375, True)])
def test_a_browser_shows_it(width: int, dark: bool) -> None:
    # Catches a slider that changes nothing, a page wider than a phone, and an error in its program.
    with opened(width, 900, dark) as page:
        page.goto((ROOT / "docs" / "toy.html").as_uri())
        first = drawing(page)
        assert all(d.startswith("M") for d in first)
        page.focus("#steps")
        page.keyboard.press("ArrowRight")  # by the keyboard alone
        more = drawing(page)
        assert more[0] != first[0]
        assert more[1] != first[1]
        assert page.inner_text("#evaluations") == "14"  # Heun over 8 levels
        page.focus("#strength")
        page.keyboard.press("ArrowRight")
        stronger = drawing(page)
        assert stronger[0] == more[0]  # the plain solver has no strength
        assert stronger[1] != more[1]
        page.keyboard.press("Home")  # strength 0
        assert drawing(page)[1] == more[0]
        assert "changes nothing" in page.inner_text("#said")
        page.select_option("#form", "auto")
        assert page.is_disabled("#strength")
        assert "nearer" in page.inner_text("#said")
        page.select_option("#sampler", label="DEIS")  # has no parameter-free form
        assert page.input_value("#form") == "published"
        assert page.inner_text("#evaluations") == "7"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.requests == [(ROOT / "docs" / "toy.html").as_uri()]
        assert page.complaints == []
