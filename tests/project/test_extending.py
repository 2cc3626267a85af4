"""docs/extending.md: every example runs, and does what the page says of it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

import erk_guid
from erk_guid.metrics.detectors import base as detectors
from erk_guid.metrics.scores import Observed
from erk_guid.metrics.scores import base as scores
from erk_guid.metrics.statistics import Statistics

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.S | re.M))


def run(title: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(EXAMPLES[title], title, "exec", dont_inherit=True), scope)
    return scope


def test_there_is_an_example_for_each() -> None:
    assert list(EXAMPLES) == [
        "A solver", "A form of guidance", "A network", "A detector", "A score", "An adapter",
    ]  # fmt: skip


def test_a_solver() -> None:
    scope = run("A solver")
    # It converges with order 2, and the guided run is exact on one Gaussian.
    x, errors = scope["x"], []
    for n in (40, 80):
        levels = torch.linspace(2.0, 0.5, n + 1, dtype=torch.float64)
        found = erk_guid.sample(scope["gaussian"], x, levels, solver=scope["TwoStage"]())
        exact = x * math.sqrt((0.25 + 0.25) / (0.25 + 4.0))
        errors.append(float((found - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    exact = x * math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2)) * 0.25 / (0.25 + 0.002**2)
    torch.testing.assert_close(scope["guided"], exact, rtol=1e-6, atol=0)
    assert (scope["plain"] - exact).abs().max() > 10 * (scope["guided"] - exact).abs().max()


@pytest.mark.slow
def test_a_solver_in_the_list_is_an_option_of_the_command_line(tmp_path: Path) -> None:
    # As if its two files were in the package: the list is filled before the command is made.
    code = (
        "import sys\n"
        + EXAMPLES["A solver"]
        + "\nfrom erk_guid.solvers import SOLVERS\nSOLVERS['two_stage'] = TwoStage\n"
        + "from erk_guid.cli.generate import generate_command\ngenerate_command()\n"
    )
    (tmp_path / "script.py").write_text(code)

    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "script.py", *args], cwd=tmp_path, capture_output=True, text=True
        )

    shown = " ".join(command("--help").stdout.split())
    assert "--node FLOAT two_stage: Place of the second evaluation" in shown
    done = command("--preset=digits", "--outdir=o", "--seeds=0", "--steps=4", "--device=cpu",
                   "--solver=two_stage", "--node=0.5", "--w_stiff=auto")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = (tmp_path / "o" / "run.json").read_text()
    assert '"solver": "two_stage"' in record
    assert '"node": 0.5' in record
    with Image.open(tmp_path / "o" / "000000.png") as image:
        assert "solver two_stage node=0.5" in image.info["parameters"]


def test_a_form_of_guidance() -> None:
    scope = run("A form of guidance")
    # Heun's step and Euler's: a tenth of their difference more.
    x = scope["x"]
    levels = torch.tensor([3.0, 2.0], dtype=torch.float64)
    heun, euler, guided = (
        erk_guid.sample(scope["gaussian"], x, levels, solver=s, guidance=g)
        for s, g in (("heun", None), ("euler", None), ("heun", scope["Extrapolation"]()))
    )
    torch.testing.assert_close(guided, heun + 0.1 * (heun - euler))
    with pytest.raises(ValueError, match="Euler has no embedded solution"):
        erk_guid.sample(scope["gaussian"], x, levels, solver="euler",
                        guidance=scope["Extrapolation"]())  # fmt: skip


def test_a_network() -> None:
    images = run("A network")["images"]
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 8, 8)


def test_a_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "_FACTORIES", dict(detectors._FACTORIES))
    scope = run("A detector")
    expected = scope["pixels"].reshape(5, -1).mean(1)
    np.testing.assert_allclose(scope["features"][:, 0].numpy(), expected)


def test_a_detector_and_a_score_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erk_guid.cli.metrics import metrics_command

    monkeypatch.setattr(detectors, "_FACTORIES", dict(detectors._FACTORIES))
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    rng = np.random.default_rng(0)
    sets = {"made": rng.integers(0, 200, (20, 8, 8)), "real": rng.integers(50, 256, (20, 8, 8))}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for k, image in enumerate(images.astype(np.uint8)):
            Image.fromarray(image).save(tmp_path / name / f"{k}.png")
    plugin, ref = tmp_path / "plugin.py", tmp_path / "ref.npz"
    plugin.write_text(EXAMPLES["A detector"] + EXAMPLES["A score"])

    def metrics(*args: object) -> str:
        done = CliRunner().invoke(metrics_command, [*map(str, args), "--device=cpu"])
        assert done.exit_code == 0, done.output
        return done.output

    metrics("ref", "--data", tmp_path / "real", "--dest", ref, "--metrics", "brightness",
            "--plugin", plugin)  # fmt: skip
    monkeypatch.setattr(detectors, "_FACTORIES", {})
    monkeypatch.setattr(scores, "_SCORES", {"frechet": erk_guid.metrics.FrechetDistance()})
    said = metrics("calc", "--images", tmp_path / "made", "--ref", ref, "--num", 20,
                   "--metrics", "brightness,mean:brightness", "--plugin", plugin)  # fmt: skip
    means = [[v.reshape(20, -1).mean(1), v.reshape(20, -1).std(1, ddof=1)] for v in sets.values()]
    apart = np.linalg.norm(np.mean(means[0], axis=1) - np.mean(means[1], axis=1))
    assert f"mean:brightness {apart:.6g}" in " ".join(said.split())


def test_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    score = run("A score")["MeanDistance"]()
    one, two = (Observed(Statistics(np.full(4, v), np.eye(4))) for v in (0.0, 3.0))
    assert score(one, two, torch.device("cpu")) == {"distance": 6.0}


def test_an_adapter() -> None:
    scope = run("An adapter")
    torch.testing.assert_close(scope["images"], 0.5 * scope["noise"], rtol=0.02, atol=0.02)


def test_every_list_that_the_page_names_is_there() -> None:
    from erk_guid.guidance import FORMS
    from erk_guid.models.checkpoints.build import NETWORKS, SETTINGS
    from erk_guid.solvers import SOLVERS

    assert SOLVERS
    assert FORMS
    assert set(NETWORKS) == set(SETTINGS)
    for path in re.findall(r"`(erk_guid/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
