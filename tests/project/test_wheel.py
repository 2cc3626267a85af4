"""What is installed is the wheel, not this checkout: it has to be whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of the source distribution, which has to be whole for that."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    # From a copy: two processes of pytest that build at once would write into each other's files.
    left_out = shutil.ignore_patterns(
        ".*", "output", "training-runs", "*.egg-info", "build", "dist", "__pycache__", "tests"
    )
    shutil.copytree(ROOT, source, ignore=left_out, dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python in an empty folder, with the wheel in place of the checkout."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True)

    def runs(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True
        )

    done = runs("-c", "import erk_guid; print(erk_guid.__file__)", cwd=site)
    assert done.stdout.startswith(str(site)), done.stdout + done.stderr
    return runs


EXAMPLES = {
    "diffusers.md": "",
    "k-diffusion.md": """
assert guided.shape == also.shape == (4, 1, 32, 32)
assert (guided - also).abs().mean() < 0.2  # two ways to the same digits
""",
    "comfyui.md": """
assert digits["auto"].shape == (4, 1, 32, 32)
assert 0 < (digits["auto"] - digits["published"]).abs().mean() < 0.2
""",
    "fitting.md": """
assert len(fitted.sigmas) == 5
assert calibration.chosen.ratio < 0.9
assert images.shape == (16, 1, 32, 32)
""",
    "getting-started.md": """
assert images.shape == (4, 1, 32, 32)
""",
}
"""Pages with a complete example, and what it must have come to."""


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_example_of_the_page_runs(page: str, run: Run, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    code = "\n".join(blocks)
    (tmp_path / "example.py").write_text(code + EXAMPLES[page])
    done = run("example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if page == "diffusers.md":
        pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
        assert set(pictures) == {
            "w_stiff-0.png", "w_stiff-0.5.png", "w_stiff-auto.png", "modal.png",
        }  # fmt: skip
        # On a random network the published form may change less than a grey level.
        assert pictures["w_stiff-0.png"] != pictures["w_stiff-auto.png"]


def test_importing_brings_nothing_heavy(run: Run, tmp_path: Path) -> None:
    code = "import sys, erk_guid; print(*{m.split('.')[0] for m in sys.modules})"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heavy = {"diffusers", "torch_fidelity", "torchvision", "matplotlib", "transformers"}
    assert "erk_guid" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_the_commands_and_the_shipped_model(run: Run, tmp_path: Path) -> None:
    done = run("-m", "erk_guid", "generate", "--preset=digits", "--outdir=out", "--seeds=0-1",
               "--steps=4", "--w_stiff=auto", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_it_runs_out_of_a_zip(wheel: Path, tmp_path: Path) -> None:
    # Before: the shipped network and reference were unpacked, and deleted before they were read.
    environment = {**os.environ, "PYTHONPATH": str(wheel), "TMPDIR": str(tmp_path)}
    where = [sys.executable, "-c", "import erk_guid; print(erk_guid.__file__)"]
    found = subprocess.check_output(where, env=environment, cwd=tmp_path, text=True)
    assert found.startswith(str(wheel))
    for command in (
        ["generate", "--preset=digits", "--outdir=out", "--seeds=0-1", "--schedule=fitted",
         "--steps=6", "--device=cpu"],
        ["metrics", "gen", "--preset=digits", "--ref=digits", "--metrics=fd_digits", "--num=2",
         "--steps=2", "--device=cpu"],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "erk_guid", *command], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # nothing unpacked is left


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"erk_guid"}
    assert "erk_guid/py.typed" in names
    assert "erk_guid/data/digits.safetensors" in names
    assert "erk_guid/data/fits/digits-8.json" in names
    assert "Provides-Extra: diffusers" in text
    # What an extra brings is asked for under that extra only.
    for package in ("diffusers", "torch-fidelity", "torchvision", "matplotlib"):
        (line,) = re.findall(rf"Requires-Dist: {package}\b.*", text)
        assert "extra ==" in line
