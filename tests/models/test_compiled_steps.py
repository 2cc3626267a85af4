"""A whole solver step with guidance is one graph for torch.compile, and samples the same.

The parameter-free form is not: it solves for weights on the host, where the graph breaks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DATA, relative
from torch import Tensor

import erk_guid
from erk_guid.solvers import make_solver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "guidance"),
    [
        ("heun", erk_guid.ERKGuidance(w_stiff=0.5, w_con=0.1)),
        ("dpm2", erk_guid.ERKGuidance(w_stiff=0.5)),
        ("modal", None),
        ("deis", None),
        ("unipc", None),
    ],
)
def test_steps_have_no_graph_breaks(solver: str, guidance: Any) -> None:
    # fullgraph=True raises at the first break; the "eager" backend runs what was captured.
    torch.compiler.reset()
    net = erk_guid.load(DATA / "edm2_cond.pkl").net
    labels = torch.eye(5)[:2]
    denoiser = erk_guid.ModelGuidance(
        lambda x, sigma: net(x, sigma, labels), lambda x, sigma: net(x, sigma), 1.5
    )
    x = 40 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    steps = make_solver(solver).plan([40.0, 10.0, 2.0, 0.5])

    def run(step: Any, x: Tensor, memory: Any) -> tuple[Tensor, Any]:
        result, memory = step(denoiser, x, memory)
        return (result.x if guidance is None else guidance(result).x), memory

    whole = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        a, b, left, right = x, x, None, None
        for step in steps:
            a, left = run(step, a, left)
            b, right = whole(step, b, right)
    assert relative(b, a) < 1e-5
