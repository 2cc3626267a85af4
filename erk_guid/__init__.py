"""ERK-Guid: better diffusion samples for no extra network evaluation.

>>> import torch, erk_guid
>>> sigmas = erk_guid.karras_sigmas(8)
>>> denoiser = lambda x, sigma: x / (1 + sigma**2)  # exact for standard normal data
>>> x = sigmas[0] * torch.randn(4, 3, 16, 16)
>>> erk_guid.sample(denoiser, x, sigmas, guidance=erk_guid.Guidance(w_stiff=0.5)).shape
torch.Size([4, 3, 16, 16])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from erk_guid._version import __version__
from erk_guid.churn import Churn
from erk_guid.denoisers import Denoiser, ModelGuidance
from erk_guid.guidance import (
    Guidance,
    Pair,
    correction,
    dominant_eigenvector,
    stiffness,
)
from erk_guid.sampling import StepInfo, edm_sampler, sample
from erk_guid.schedules import karras_sigmas
from erk_guid.steps import EulerStep, HeunStep, Step, StepResult
from erk_guid.studies.calibration import Calibration, calibrate

if TYPE_CHECKING:
    from erk_guid.generation.images import Batch, generate
    from erk_guid.models.checkpoints import Loaded, load

__all__ = [
    "Batch",
    "Calibration",
    "Churn",
    "Denoiser",
    "EulerStep",
    "Guidance",
    "HeunStep",
    "Loaded",
    "ModelGuidance",
    "Pair",
    "Step",
    "StepInfo",
    "StepResult",
    "__version__",
    "calibrate",
    "correction",
    "dominant_eigenvector",
    "edm_sampler",
    "generate",
    "karras_sigmas",
    "load",
    "sample",
    "stiffness",
]

# Files and image generation need more than torch, so they are imported when first asked for.
_LAZY = {
    "Batch": "erk_guid.generation.images",
    "Loaded": "erk_guid.models.checkpoints",
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
