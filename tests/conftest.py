"""What many tests share."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erk_guid.networks.edm2 import Precond

DATA = Path(__file__).parent / "data"


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
