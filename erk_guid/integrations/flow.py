"""The process in which adapters integrate flow-matching models."""

from __future__ import annotations

from erk_guid.guidance import Guidance, ParameterFreeGuidance
from erk_guid.processes import VE, Process, RectifiedFlow
from erk_guid.solvers import Heun, Modal, Solver


def flow_process(solver: Solver, guidance: Guidance | None) -> Process:
    """Return the process in which an adapter integrates a flow-matching model.

    diffusers and ComfyUI integrate in t itself, where the drift (x - D) / t has the same form as
    in sigma. The adapters do so too for Euler, Heun and DPM-Solver-2, plain or with the published
    guidance, as `VE` with t for sigma. Without guidance the results are those programs' own:
    Euler's and Heun's bit for bit, DPM-Solver-2's up to the rounding of its midpoint.
    Methods that assume Gaussian modes go through `RectifiedFlow`: the modal solver, and the
    parameter-free form of Heun. That form of DPM-Solver-2 stays in t. Its midpoint is the geometric
    mean of the step's ends, which is poor where sigma begins at infinity: in sigma the form was
    measured to be up to three times worse than in t (benchmarks/flow.py).
    """
    supposes_modes = isinstance(solver, Modal) or (
        isinstance(solver, Heun) and isinstance(guidance, ParameterFreeGuidance)
    )
    return RectifiedFlow() if supposes_modes else VE()
