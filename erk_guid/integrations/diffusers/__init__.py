"""Schedulers for diffusers' pipelines.

    from erk_guid.integrations.diffusers import ERKGuidHeunScheduler

    pipe.scheduler = ERKGuidHeunScheduler.from_config(pipe.scheduler.config, w_stiff="auto")

`ERKGuidHeunScheduler` and `FlowMatchERKGuidHeunScheduler` (SD3, FLUX) are diffusers' own Heun with
ERK guidance, two network calls per step. `ModalScheduler` and `FlowMatchModalScheduler` are the
modal solver, one call per step, without guidance.
"""

from erk_guid.common.errors import MissingExtraError

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise MissingExtraError("diffusers", "diffusers", "its schedulers") from error

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

__all__ = [
    "EDMERKGuidHeunScheduler",
    "EDMModalScheduler",
    "ERKGuidHeunScheduler",
    "FlowMatchERKGuidHeunScheduler",
    "FlowMatchModalScheduler",
    "ModalScheduler",
]
