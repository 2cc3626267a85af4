"""ERK-Guid: better diffusion samples for no extra network evaluation.

>>> import torch, erk_guid
>>> sigmas = erk_guid.karras_sigmas(8)
>>> denoiser = lambda x, sigma: x / (1 + sigma**2)  # exact for standard normal data
>>> x = sigmas[0] * torch.randn(4, 3, 16, 16)
>>> erk_guid.sample(denoiser, x, sigmas, guidance=erk_guid.ERKGuidance(w_stiff=0.5)).shape
torch.Size([4, 3, 16, 16])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from erk_guid import _parent  # noqa: F401 - before torch
from erk_guid._version import __version__

if TYPE_CHECKING:
    from erk_guid import solvers
    from erk_guid.churn import Churn
    from erk_guid.denoisers import Denoiser, ModelGuidance
    from erk_guid.edm2 import edm_sampler
    from erk_guid.generation.images import Batch, generate
    from erk_guid.guidance import (
        ERKGuidance,
        Guidance,
        Guided,
        ParameterFreeGuidance,
        dominant_eigenvector,
        stiffness,
    )
    from erk_guid.models.checkpoints import Checkpoint, load
    from erk_guid.processes import VE, VP, Process, RectifiedFlow, UnitVariance
    from erk_guid.sampling import NonFiniteError, StepInfo, sample
    from erk_guid.schedules import karras_sigmas
    from erk_guid.solvers import Pair, Solver, Step, StepResult
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
    "NonFiniteError",
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

# Imported when first asked for: the command line shows its help without torch, and networks,
# images and fits need more than torch.
_HOMES = {
    "erk_guid.churn": ("Churn",),
    "erk_guid.denoisers": ("Denoiser", "ModelGuidance"),
    "erk_guid.edm2": ("edm_sampler",),
    "erk_guid.generation.images": ("Batch", "generate"),
    "erk_guid.guidance": (
        "ERKGuidance", "Guidance", "Guided", "ParameterFreeGuidance", "dominant_eigenvector",
        "stiffness",
    ),
    "erk_guid.models.checkpoints": ("Checkpoint", "load"),
    "erk_guid.processes": ("VE", "VP", "Process", "RectifiedFlow", "UnitVariance"),
    "erk_guid.sampling": ("NonFiniteError", "StepInfo", "sample"),
    "erk_guid.schedules": ("karras_sigmas",),
    "erk_guid.solvers": ("Pair", "Solver", "Step", "StepResult"),
    "erk_guid.studies.fitting": ("Calibration", "Fitted", "calibrate", "fit"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


# The core's modules, which need torch alone; `erk_guid.solvers.Heun` needs no import of its own.
_MODULES = (
    "churn", "denoisers", "edm2", "guidance", "norms", "processes", "quadrature", "sampling",
    "schedules", "solvers",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"erk_guid.{name}")
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    raise AttributeError(f"module 'erk_guid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
