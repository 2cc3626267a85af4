"""The package as a whole: what importing it costs, and files that must agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import erk_guid

# fmt: off
BLOCKED = [
    "numpy", "scipy", "click", "safetensors", "tqdm", "PIL", "filelock", "diffusers",
    "torch_fidelity", "torchvision", "matplotlib", "huggingface_hub", "transformers",
]
# fmt: on

IMPORT_ALONE = """
import importlib.abc, sys
import torch
for name in [m for m in sys.modules if m.split(".")[0] in {blocked!r}]:
    del sys.modules[name]  # torch itself may use numpy; we must not ask for it
before = set(sys.modules)
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"not installed: {{name}}")
sys.meta_path.insert(0, Refuse())
import erk_guid
sigmas = erk_guid.karras_sigmas(4)
x = erk_guid.sample(lambda x, s: x / (1 + s * s), torch.ones(2, 3) * 80, sigmas,
                    guidance=erk_guid.ERKGuidance(0.5, 0.1))
assert torch.isfinite(x).all()
print(sorted({{m.split(".")[0] for m in set(sys.modules) - before}} - {{"erk_guid"}}))
"""


def test_importing_needs_torch_alone() -> None:
    code = IMPORT_ALONE.format(blocked=set(BLOCKED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # What is new besides our own modules is the standard library's.
    assert not set(ast.literal_eval(done.stdout)) & set(BLOCKED)


@pytest.mark.slow
def test_names_and_modules_are_there_without_another_import() -> None:
    # In a process of its own: here other tests have imported the modules.
    modules = ["churn", "denoisers", "edm2", "guidance", "processes", "sampling", "schedules",
               "solvers", "quadrature", "norms"]  # fmt: skip
    names = [f"erk_guid.{name}" for name in (*erk_guid.__all__, *modules)]
    code = "import erk_guid\n" + "\n".join(names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    for name in erk_guid.__all__:
        assert getattr(erk_guid, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        erk_guid.smaple  # noqa: B018
    promised = {
        "stiffness", "dominant_eigenvector", "ERKGuidance", "ParameterFreeGuidance",
        "karras_sigmas", "sample", "RectifiedFlow",
        "edm_sampler", "load", "generate", "ModelGuidance", "calibrate", "solvers",
    }  # fmt: skip
    assert promised <= set(dir(erk_guid))


def requirements(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z][\w-]*>=[\d.]+", text))


def test_environment_yml_matches_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    runtime = project[project.index("dependencies = [") : project.index("fuzz = [")]
    environment = (ROOT / "environment.yml").read_text()
    wanted = requirements(runtime)
    assert len(wanted) >= 11
    assert wanted == requirements(environment) - {"python>=3.10"}


def test_versions_agree() -> None:
    assert f"version: {erk_guid.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{erk_guid.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


def test_the_shipped_model_is_small() -> None:
    data = ROOT / "erk_guid" / "data"
    assert sum(p.stat().st_size for p in data.iterdir()) < 5_000_000


def test_a_missing_extra_is_reported_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from erk_guid.common.errors import MissingExtraError
    from erk_guid.models.encoders import StabilityVAEEncoder

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'erk-guid\[diffusers\]'"):
        StabilityVAEEncoder().decode(torch.zeros(1, 4, 8, 8))
