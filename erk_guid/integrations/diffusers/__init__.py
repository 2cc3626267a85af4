"""Schedulers for diffusers' pipelines.

    from erk_guid.integrations.diffusers import for_pipeline

    pipe.scheduler = for_pipeline(pipe)
    pipe.scheduler = for_pipeline(pipe, "heun", w_stiff="auto")

`for_pipeline` reads what the pipeline has and picks the class. The modal solver takes one network
call per step, without guidance; Heun with ERK guidance takes two. There is one class of each for
schedulers with betas (Stable Diffusion, SDXL), for EDM's, and for flow matching (SD3, FLUX, Wan).
`fit` finds the noise levels for a pipeline of your own.
"""

from erk_guid.common.errors import MissingExtraError

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise MissingExtraError("diffusers", "diffusers", "its schedulers") from error

from erk_guid.integrations.diffusers.fitted import PipelineFit
from erk_guid.integrations.diffusers.heun import (
    EDMERKGuidHeunScheduler,
    ERKGuidHeunScheduler,
    FlowMatchERKGuidHeunScheduler,
)
from erk_guid.integrations.diffusers.modal import (
    EDMModalScheduler,
    FlowMatchModalScheduler,
    ModalScheduler,
)
from erk_guid.integrations.diffusers.pipeline_fit import fit
from erk_guid.integrations.diffusers.pipelines import for_pipeline

__all__ = [
    "EDMERKGuidHeunScheduler",
    "EDMModalScheduler",
    "ERKGuidHeunScheduler",
    "FlowMatchERKGuidHeunScheduler",
    "FlowMatchModalScheduler",
    "ModalScheduler",
    "PipelineFit",
    "fit",
    "for_pipeline",
]
