"""The one decision that adapters take about flow-matching models."""

from __future__ import annotations

from erk_guid.guidance import Guidance, ParameterFreeGuidance
from erk_guid.processes import VE, Process, RectifiedFlow
from erk_guid.solvers import Heun, Modal, Solver


def flow_process(solver: Solver, guidance: Guidance | None) -> Process:
    """Return the process in which an adapter integrates a flow-matching model.

    diffusers and ComfyUI integrate in t itself, where the drift (x - D) / t has the form that it
    has in sigma. For Euler, Heun and DPM-Solver-2, plain or with the published guidance, so do the
    adapters: the results are then those programs' own, bit for bit. That is `VE` with t for sigma.
    What supposes Gaussian modes goes through `RectifiedFlow`: the modal solver, and the
    parameter-free form of Heun. DPM-Solver-2's stays in t. Its midpoint, the geometric mean of the
    step's ends, is a poor one where sigma begins at infinity: measured, the form is up to three
    times worse there than in t (benchmarks/flow.py).
    """
    supposes_modes = isinstance(solver, Modal) or (
        isinstance(solver, Heun) and isinstance(guidance, ParameterFreeGuidance)
    )
    return RectifiedFlow() if supposes_modes else VE()
