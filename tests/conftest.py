"""What many tests share."""

from __future__ import annotations

import ast
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erk_guid.mixtures import tree_mixture
from erk_guid.models.networks.edm2 import Precond

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts programs in its background so, and what they start inherits it: the programs
    # that tests end with Ctrl-C would rightly go on.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every test, so that a draw without a generator of its own is the same each time."""
    torch.manual_seed(0)


def golden(name: str) -> dict[str, Any]:
    """Arrays of a golden file as tensors; text is parsed as Python literals where it is one."""
    found: dict[str, Any] = {}
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            value = arrays[key]
            if value.dtype.kind == "U":
                text = str(value)
                found[key] = ast.literal_eval(text) if text[:1] in "[{" else text
            else:
                found[key] = torch.from_numpy(value)
    return found


def gauss_problem() -> tuple[Any, torch.Tensor, torch.Tensor]:
    stds = torch.tensor([1, 0.5, 0.2, 0.05, 0.01], dtype=torch.float64)
    noise = torch.randn(150, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = noise * (stds**2 + 80**2).sqrt()
    end = noise * (stds**2 + 0.002**2).sqrt()
    return (lambda x, s: x * stds**2 / (stds**2 + s**2)), start, end


def oracle(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An exact problem: its denoiser, start points, and where the ODE takes them at 0.002."""
    if name == "gauss":
        return gauss_problem()
    data = golden("tree")
    return tree_mixture(), data[f"{name}_start"], data[f"{name}_end"]


def network_of(name: str) -> Precond:
    """The network whose settings and weights a golden file holds."""
    data = golden(name)
    net = Precond(**data["config"])
    prefix = "state/"
    net.load_state_dict({k[len(prefix) :]: v for k, v in data.items() if k.startswith(prefix)})
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def cond() -> Precond:
    return network_of("edm2_net_cond")


@pytest.fixture(scope="session")
def guide() -> Precond:
    return network_of("edm2_net_guide")


@pytest.fixture(scope="session")
def golden_solvers() -> dict[str, Any]:
    """What the diff-sampler toolbox's own programs gave."""
    return golden("diff_sampler_solvers")


class Counting:
    """A denoiser that counts its calls and remembers the noise levels."""

    def __init__(self, denoiser: Callable[..., torch.Tensor]) -> None:
        self.denoiser = denoiser
        self.sigmas: list[float] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *more: Any) -> torch.Tensor:
        self.sigmas.append(float(sigma))
        return self.denoiser(x, sigma, *more)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of the reference b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
