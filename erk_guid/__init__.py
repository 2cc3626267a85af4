"""ERK-Guid: better diffusion samples for no extra network evaluation.

>>> import torch, erk_guid
>>> sigmas = erk_guid.karras_sigmas(8)
>>> denoiser = lambda x, sigma: x / (1 + sigma**2)  # exact for standard normal data
>>> x = sigmas[0] * torch.randn(4, 3, 16, 16)
>>> erk_guid.sample(denoiser, x, sigmas, guidance=erk_guid.ERKGuidance(w_stiff=0.5)).shape
torch.Size([4, 3, 16, 16])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erk_guid import solvers
from erk_guid._version import __version__
from erk_guid.churn import Churn
from erk_guid.denoisers import Denoiser, ModelGuidance
from erk_guid.edm2 import edm_sampler
from erk_guid.guidance import (
    ERKGuidance,
    Guidance,
    Guided,
    ParameterFreeGuidance,
    dominant_eigenvector,
    stiffness,
)
from erk_guid.processes import VE, VP, Process, RectifiedFlow, UnitVariance
from erk_guid.sampling import StepInfo, sample
from erk_guid.schedules import karras_sigmas
from erk_guid.solvers import Pair, Solver, Step, StepResult

if TYPE_CHECKING:
    from erk_guid.generation.images import Batch, generate
    from erk_guid.models.checkpoints import Checkpoint, load
    from erk_guid.studies.fitting import Calibration, Fitted, calibrate, fit

__all__ = [
    "VE",
    "VP",
    "Batch",
    "Calibration",
    "Checkpoint",
    "Churn",
    "Denoiser",
    "ERKGuidance",
    "Fitted",
    "Guidance",
    "Guided",
    "ModelGuidance",
    "Pair",
    "ParameterFreeGuidance",
    "Process",
    "RectifiedFlow",
    "Solver",
    "Step",
    "StepInfo",
    "StepResult",
    "UnitVariance",
    "__version__",
    "calibrate",
    "dominant_eigenvector",
    "edm_sampler",
    "fit",
    "generate",
    "karras_sigmas",
    "load",
    "sample",
    "solvers",
    "stiffness",
]

# These need more than torch, so they are imported when first asked for.
_LAZY = {
    "Batch": "erk_guid.generation.images",
    "Calibration": "erk_guid.studies.fitting",
    "Checkpoint": "erk_guid.models.checkpoints",
    "Fitted": "erk_guid.studies.fitting",
    "calibrate": "erk_guid.studies.fitting",
    "fit": "erk_guid.studies.fitting",
    "generate": "erk_guid.generation.images",
    "load": "erk_guid.models.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'erk_guid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
