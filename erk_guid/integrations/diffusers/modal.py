"""The modal solver as schedulers for diffusers: one call per step, no guidance.

A pipeline asks for the next sample after each call, and gets the predicted point. The next call
brings the evaluation there. It corrects the step that led to the point, before the next point is
predicted (`erk_guid.solvers.Modal`). With `eta`, noise is added to what it is given. If the
incoming sample is not the one returned last (in-painting and callbacks edit it), the solver starts
again from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    # diffusers looks this name up here when it loads a saved pipeline with one of our schedulers.
    SchedulerMixin,  # noqa: F401
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from erk_guid.integrations.diffusers.variance import Samples, UnitVariance, in_float32
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, Level, Process, levels_of
from erk_guid.solvers import Memory, Modal
from erk_guid.solvers.multistep import PredictorCorrectorStep

__all__ = ["FlowMatchModalScheduler", "ModalScheduler"]


@dataclass
class _Run:
    """State of the solver, in float32 and in sigma."""

    begin: int
    """Index of the noise level it began at."""
    steps: list[PredictorCorrectorStep]
    memory: Memory
    """At the start of the step that led to the sample returned last."""
    returned: Tensor
    """That sample, in the pipeline's precision."""
    added: Tensor | None = None
    """Noise in that sample."""


class _Modal(Samples, ABC):
    """The part that both schedulers share, on top of one of diffusers' Euler schedulers."""

    process: Process = VE()
    """The process of the pipeline's samples; the solver runs in sigma."""
    _run: _Run | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set where in the schedule a run begins, as in diffusers."""
        super().set_begin_index(begin_index)  # type: ignore[misc]
        self._run = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the sample to call the network with next.

        Args:
            model_output, timestep, sample, return_dict: as diffusers' own.
            generator: draws the noise of `eta`; None is torch's own. Without `eta` nothing is
                drawn.
        """
        wide, output = self._unscaled(sample, timestep), in_float32(model_output)
        found = super().step(output, timestep, wide, return_dict=True)  # type: ignore[misc]
        index: int = self.step_index - 1  # type: ignore[attr-defined]
        denoised = self._denoised(found, output, wide, self.sigmas[index])
        x = wide / self._level(index).alpha
        run = self._run
        if run is None or index == run.begin or not torch.equal(sample, run.returned):
            run = _Run(index, self._plan(index), Memory(x, (denoised,)), sample)
        else:
            last = run.steps[index - run.begin - 1]
            if last.corrector is not None:
                predicted = x if run.added is None else x - run.added
                run.memory = last.correct(run.memory, predicted, denoised)
                if run.added is not None:
                    run.memory = run.memory._replace(x=run.memory.x + run.added)
        k = index - run.begin
        run.added = None
        if k < len(run.steps):
            point = run.steps[k].predict(run.memory)
            if run.steps[k].spread > 0:
                run.added = run.steps[k].spread * _noise_like(point, generator)
                point = point + run.added
            result = point * self._level(index + 1).alpha
        else:  # a step to 0 gives the denoised x; some schedules end with one of length 0
            result = wide if self.sigmas[index + 1] > 0 else denoised
        found.prev_sample = self._scaled(result).to(model_output.dtype)
        run.returned = found.prev_sample.clone()
        self._run = run
        return found if return_dict else tuple(found.values())

    def _plan(self, index: int) -> list[PredictorCorrectorStep]:
        sigmas = [self._level(k).sigma for k in range(len(self.sigmas))]
        levels = list(dict.fromkeys(sigma for sigma in sigmas[index:] if sigma > 0))
        response = self.config.modal_response
        if response is not None:
            whole = len({sigma for sigma in sigmas if sigma > 0})
            if len(response) != max(whole - 2, 0):
                raise ValueError(
                    f"modal_response has {len(response)} numbers, but this schedule has {whole} "
                    f"noise levels above 0 with {max(whole - 2, 0)} corrected steps between them"
                )
            response = response[whole - len(levels) :]  # a run may begin in mid-schedule
        return _modal(self.config.modal_order, response, self.config.eta).steps(levels)

    def _level(self, index: int) -> Level:
        """Return the level at an index of the schedule, as the solver sees it."""
        # The first one's depends on the second, see `levels_of`.
        first = max(index - 1, 0)
        times: list[float] = self.sigmas[first : first + 2].tolist()
        return levels_of(self.process, times)[index - first]

    @abstractmethod
    def _denoised(self, found: Any, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoised x of this call."""


def _modal(order: int, response: list[float] | None, eta: float) -> Modal:
    return Modal(order, None if response is None else tuple(response), eta)


def _noise_like(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    # As diffusers draws: a list holds one generator for each sample, and may be of the CPU.
    noise: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return noise


class ModalScheduler(UnitVariance, _Modal, EulerDiscreteScheduler):  # type: ignore[metaclass]
    """The modal solver over the noise levels of diffusers' `EulerDiscreteScheduler`.

    Takes the config of any scheduler of that family (`from_config`). One call per step.

    Args:
        modal_order: evaluations combined, 1 to 4.
        eta: noise in each step, from 0 (none) to 1; the pipeline's `generator` draws it.
        modal_response: one number for each corrected step, as `erk_guid.fit` finds them.
        unit_variance: for pipelines that keep samples at unit variance, such as `DDPMPipeline`,
            `DDIMPipeline` and `DiTPipeline`; diffusers' own Euler gives wrong images with these.

    The other arguments are those of `EulerDiscreteScheduler`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        modal_order: int = Modal.order,
        unit_variance: bool = False,
        eta: float = Modal.eta,
        modal_response: list[float] | None = None,
    ) -> None:
        _modal(modal_order, modal_response, eta)  # raise now, not in mid-run
        # By keyword: diffusers takes what is passed by position for a default.
        EulerDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, beta_start=beta_start,
            beta_end=beta_end, beta_schedule=beta_schedule, trained_betas=trained_betas,
            prediction_type=prediction_type, interpolation_type=interpolation_type,
            use_karras_sigmas=use_karras_sigmas, use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas, sigma_min=sigma_min, sigma_max=sigma_max,
            timestep_spacing=timestep_spacing, timestep_type=timestep_type,
            steps_offset=steps_offset, rescale_betas_zero_snr=rescale_betas_zero_snr,
            final_sigmas_type=final_sigmas_type,
        )  # fmt: skip

    # Pipelines inspect this signature to see what they may pass.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Set the noise levels of a run, as in diffusers."""
        EulerDiscreteScheduler.set_timesteps(self, num_inference_steps, device, timesteps, sigmas)
        self._run = None

    def _denoised(self, found: Any, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        denoised: Tensor = found.pred_original_sample
        return denoised


class FlowMatchModalScheduler(_Modal, FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """The modal solver over the times of diffusers' `FlowMatchEulerDiscreteScheduler`.

    For SD3, FLUX and similar models. One call per step.

    Args:
        modal_order: evaluations combined, 1 to 4.
        modal_response: one number for each corrected step, as `erk_guid.fit` finds them.
        eta: noise in each step, from 0 (none) to 1. FLUX's and SD3's pipelines pass no `generator`
            to the scheduler: seed torch for the same images again.

    The other arguments are those of `FlowMatchEulerDiscreteScheduler`.
    """

    process = flow_process(Modal(), None)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        modal_order: int = Modal.order,
        eta: float = Modal.eta,
        modal_response: list[float] | None = None,
    ) -> None:
        if invert_sigmas:
            raise ValueError("invert_sigmas: a schedule that rises cannot be sampled by this")
        _modal(modal_order, modal_response, eta)
        FlowMatchEulerDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, shift=shift,
            use_dynamic_shifting=use_dynamic_shifting, base_shift=base_shift,
            max_shift=max_shift, base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len, shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas, use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas, time_shift_type=time_shift_type,
        )  # fmt: skip

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the noise levels of a run, as in diffusers."""
        FlowMatchEulerDiscreteScheduler.set_timesteps(
            self, num_inference_steps, device, sigmas, mu, timesteps
        )
        self._run = None

    def _denoised(self, found: Any, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * output
