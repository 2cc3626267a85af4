"""The modal solver as schedulers for diffusers: one network call per step, no guidance.

A pipeline calls the network at the predicted point of a step. The scheduler corrects the step with
that evaluation and predicts the next one, as `erk_guid.solvers.Modal` does: that is one call of
`step`. What it remembers is dropped when timesteps are set and when a run begins in mid-schedule.
Where a pipeline edits the sample (in-painting, callbacks), x is moved as the pipeline has moved it,
and what the solver remembers stays. Everything is kept in float32, whatever the pipeline's
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    # diffusers looks this name up here when it loads a saved pipeline with one of our schedulers.
    SchedulerMixin,  # noqa: F401
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from erk_guid.integrations.diffusers.edits import Given, unless
from erk_guid.integrations.diffusers.families import (
    EDM,
    Discrete,
    Family,
    Flow,
    Generators,
    check_prediction,
)
from erk_guid.integrations.diffusers.levels import (
    check_falling,
    check_fitted,
    check_times,
    chosen_levels,
)
from erk_guid.processes import Level, levels_of
from erk_guid.solvers import Memory, Modal
from erk_guid.solvers.multistep import PredictorCorrectorStep, trust_in_past

__all__ = ["EDMModalScheduler", "FlowMatchModalScheduler", "ModalScheduler"]


@dataclass
class _Run:
    """State of the solver, in float32 and in sigma."""

    begin: int
    """Index of the noise level it began at."""
    steps: list[PredictorCorrectorStep]
    memory: Memory
    """At the start of the step that led to the sample returned last."""
    given: Given | None = None
    """That sample, as the pipeline got it."""
    predicted: Tensor | None = None
    """The same without noise, in sigma, before it is rounded to the pipeline's precision."""
    added: Tensor | None = None
    """Noise in that sample."""


class _Modal(Family):
    """The part that the schedulers share."""

    _run: _Run | None = None

    def _forget(self) -> None:
        super()._forget()
        self._run = None

    def _remembered(self) -> _Run | None:
        return None if self._run is None else replace(self._run)

    def _recall(self, remembered: _Run | None) -> None:
        self._run = remembered

    def _move(
        self, x: Tensor, denoised: Tensor, index: int, sample: Tensor, generator: Generators
    ) -> Tensor:
        sigma_next = self.time(index + 1)
        run = self._reached(x / self._level(index).alpha, denoised, index, sample)
        k = index - run.begin
        run.predicted = run.added = None
        if k >= len(run.steps):
            # A step to 0 gives the denoised x; some schedules end with one of length 0.
            return x if sigma_next > 0 else denoised
        point = run.predicted = run.steps[k].predict(run.memory)
        if run.steps[k].spread > 0:
            run.added = run.steps[k].spread * _noise_like(point, generator)
            point = point + run.added
        return point * self._level(index + 1).alpha

    def _reached(self, x: Tensor, denoised: Tensor, index: int, sample: Tensor) -> _Run:
        """Return the run at the end of the step before, corrected by this call."""
        run = self._run
        if run is None or index <= run.begin or run.given is None or not run.given.fits(sample):
            self._run = run = _Run(index, self._plan(index), Memory(x, (denoised,)))
            return run
        last = run.steps[index - run.begin - 1]
        if last.corrector is None or run.predicted is None:
            return run
        edited = run.given.edited(sample)
        found = last.correct(run.memory, run.predicted, denoised)
        if edited is not None and found.trust is not None:
            trust = _trust_where_left(edited, last, run.memory, run.predicted, found.x)
            found = found._replace(trust=trust)
        added = 0.0 if run.added is None else run.added
        # An edit moves x, and leaves the correction of the step before as it is.
        moved = x + (found.x - run.predicted)
        run.memory = found._replace(x=unless(edited, found.x + added, moved))
        return run

    def _note(self, returned: Tensor) -> None:
        if self._run is not None:
            self._run.given = Given.of(returned)

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
        times = [self.time(k) for k in range(first, min(first + 2, len(self.sigmas)))]
        return levels_of(self.process, times)[index - first]


def _trust_where_left(
    edited: Tensor, step: PredictorCorrectorStep, memory: Memory, predicted: Tensor,
    corrected: Tensor,
) -> Tensor:  # fmt: skip
    """Return the trust of a corrected step, measured where the sample was not edited, if anywhere.

    Args:
        edited: where it was.
        step, memory: what was predicted with.
        predicted, corrected: the end of the step.
    """
    low = step.predict(memory._replace(trust=predicted.new_zeros(len(predicted))))
    whole = edited.flatten(1).all(1).reshape(-1, *[1] * (edited.ndim - 1))
    edited = edited & ~whole
    return trust_in_past(low, unless(edited, predicted, low), unless(edited, corrected, low))


def _modal(order: int, response: Sequence[float] | None, eta: float) -> Modal:
    return Modal(order, None if response is None else tuple(response), eta)


def _noise_like(x: Tensor, generator: Generators) -> Tensor:
    # As diffusers draws: a list holds one generator for each sample, and may be of the CPU.
    noise: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return noise


class ModalScheduler(Discrete, _Modal, EulerDiscreteScheduler):  # type: ignore[metaclass]
    """The modal solver over the noise levels of diffusers' `EulerDiscreteScheduler`.

    Takes the config of any scheduler of that family (`from_config`). One call per step.

    Args:
        modal_order: evaluations combined, 1 to 4.
        eta: noise in each step, from 0 (none) to 1; the pipeline's `generator` draws it.
        modal_response: one number for each corrected step, as `fit` finds them.
        unit_variance: for pipelines that keep samples at unit variance, such as `DDPMPipeline`,
            `DDIMPipeline` and `DiTPipeline`; diffusers' own Euler gives wrong images with these.
        levels: noise levels in place of the spacing, the end included, as `fit` finds them.
        clip_sample, clip_sample_range: as in `HeunDiscreteScheduler`.

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
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        modal_order: int = Modal.order,
        unit_variance: bool = False,
        eta: float = Modal.eta,
        modal_response: list[float] | None = None,
        levels: list[float] | None = None,
    ) -> None:
        _modal(modal_order, modal_response, eta)  # raise now, not in mid-run
        check_prediction(prediction_type)
        check_fitted(levels)
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
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set the noise levels of a run, as in diffusers."""
        fitted = chosen_levels(self.config.levels, num_inference_steps, sigmas, timesteps)
        if fitted is not None:
            num_inference_steps, sigmas = None, fitted
        if sigmas is not None:
            check_falling(sigmas)
        discrete = self.config.timestep_type == "discrete"
        check_times(timesteps, self.config.num_train_timesteps if discrete else None)
        EulerDiscreteScheduler.set_timesteps(self, num_inference_steps, device, timesteps, sigmas)
        self._forget()


class EDMModalScheduler(EDM, _Modal, EDMEulerScheduler):  # type: ignore[metaclass]
    """The modal solver over the noise levels of diffusers' `EDMEulerScheduler`.

    For Cosmos 1, Playground 2.5 and similar models. One call per step.

    Args:
        modal_order, modal_response, eta, levels: see `ModalScheduler`.

    The other arguments are those of `EDMEulerScheduler`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        modal_order: int = Modal.order,
        eta: float = Modal.eta,
        modal_response: list[float] | None = None,
        levels: list[float] | None = None,
    ) -> None:
        _modal(modal_order, modal_response, eta)
        check_fitted(levels)
        EDMEulerScheduler.__init__(
            self, sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data,
            sigma_schedule=sigma_schedule, num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type, rho=rho, final_sigmas_type=final_sigmas_type,
        )  # fmt: skip

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Set the noise levels of a run; see `EDMERKGuidHeunScheduler.set_timesteps`."""
        self._levels(num_inference_steps, device, sigmas)
        self._forget()


class FlowMatchModalScheduler(Flow, _Modal, FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """The modal solver over the times of diffusers' `FlowMatchEulerDiscreteScheduler`.

    For SD3, FLUX, Wan and similar models. One call per step.

    Args:
        modal_order, modal_response, levels: see `ModalScheduler`.
        eta: noise in each step, from 0 (none) to 1. FLUX's and SD3's pipelines pass no `generator`
            to the scheduler: seed torch for the same images again.
        spaced_by, sigma_min, sigma_max, final_sigmas_type, own_lists: see
            `FlowMatchERKGuidHeunScheduler`.

    The other arguments are those of `FlowMatchEulerDiscreteScheduler`.
    """

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
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        final_sigmas_type: str = "zero",
        spaced_by: str | None = None,
        modal_order: int = Modal.order,
        eta: float = Modal.eta,
        modal_response: list[float] | None = None,
        levels: list[float] | None = None,
        own_lists: bool = False,
    ) -> None:
        _modal(modal_order, modal_response, eta)
        check_fitted(levels)
        FlowMatchEulerDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, shift=shift,
            use_dynamic_shifting=use_dynamic_shifting, base_shift=base_shift,
            max_shift=max_shift, base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len, invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )  # fmt: skip

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the times of a run, as in diffusers.

        Raises:
            ValueError: the times do not fall, or the config has fitted ones for another number of
                steps.
        """
        self._levels(num_inference_steps, device, sigmas, mu, timesteps)
        self._forget()
