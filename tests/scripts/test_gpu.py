"""scripts/gpu.py: its checks on a CUDA device, and as far as they go without one."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "scripts" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["gpu"]


def run(gpu: Any, name: str, device: str) -> Any:
    report = gpu.Report(torch.device(device), quick=True)
    with torch.no_grad():
        getattr(gpu, name)(report)
    assert report.checks
    failed = [check for check in report.checks if check[2] == "FAILED"]
    assert not failed, failed
    return report


NAMES = (
    "check_precisions", "check_moving", "check_channels_last", "check_sampling", "check_doubled",
    "check_no_waiting", "check_graphs", "check_compiled", "check_overlap", "check_nccl",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_cuda_device(gpu: Any, name: str) -> None:
    run(gpu, name, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "check_compiled"])
def test_without_a_cuda_device(gpu: Any, name: str) -> None:
    # The script itself is tried; what needs CUDA says that it was not run.
    report = run(gpu, name, "cpu")
    lines = gpu.written(report, 1.0).splitlines()
    assert lines[0] == "# What a GPU showed"
    assert any(line.startswith("| ") and line.endswith(("passed |", "not run |")) for line in lines)


def test_all_checks_are_tried(gpu: Any) -> None:
    assert [check.__name__ for check in gpu.CHECKS] == list(NAMES)


def test_a_failed_check_is_reported(gpu: Any) -> None:
    report = gpu.Report(torch.device("cpu"), quick=True)
    report.bound("one", 2.0, 1.0)
    assert "1 checks, 1 failed" in gpu.written(report, 1.0)
