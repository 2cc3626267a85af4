"""Heun with ERK guidance as schedulers for diffusers, at Heun's cost.

With ``w_stiff=0`` they give what diffusers' `HeunDiscreteScheduler` and
`FlowMatchHeunDiscreteScheduler` give, in float32 bit for bit.

A pipeline calls a two-stage scheduler twice per step. The second call of a step keeps the Euler
solution and its drift. The first call of the next step brings the Heun solution and its drift at
the same noise level: the embedded pair. It is dropped when timesteps are set and when a run begins
in mid-schedule. Where a pipeline edits the sample (in-painting, callbacks), the edited values have
no part in the pair. Everything is kept in float32, whatever the pipeline's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    # diffusers looks this name up here when it loads a saved pipeline with one of our schedulers.
    SchedulerMixin,  # noqa: F401
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr
from torch import Tensor

from erk_guid.guidance import ERKGuidance, Gate, Guidance, make_guidance
from erk_guid.integrations.diffusers.edits import Given, either, unless
from erk_guid.integrations.diffusers.families import (
    EDM,
    Discrete,
    Family,
    Flow,
    Generators,
    check_prediction,
)
from erk_guid.integrations.diffusers.levels import (
    as_tensor,
    check_fitted,
    check_times,
    chosen_levels,
)
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, Process, RectifiedFlow, evaluation_in_sigma
from erk_guid.solvers import Heun, Pair, StepResult, check_levels

__all__ = ["EDMERKGuidHeunScheduler", "ERKGuidHeunScheduler", "FlowMatchERKGuidHeunScheduler"]

SETTINGS = ("w_stiff", "w_con", "bound", "gate")
ORDER = 2
"""Calls per step, as pipelines count them."""


class _Step(NamedTuple):
    """What the first call of a step keeps for the second, in float32.

    Attributes:
        x, f: where the step begins, and dx/dt there.
        companion: the embedded solution there and its dx/dt, if the previous step left one.
        low: Euler's solution, before it is rounded to the pipeline's precision.
        given: what the pipeline got, once it has.
    """

    x: Tensor
    f: Tensor
    companion: tuple[Tensor, Tensor] | None
    low: Tensor
    given: Given | None = None


class _Left(NamedTuple):
    """What the second call keeps for the next step.

    Attributes:
        x, f: the embedded solution, and dx/dt there.
        void: values that have no part in a pair, for the pipeline edited them; None is none.
        given: what the pipeline got, once it has.
    """

    x: Tensor
    f: Tensor
    void: Tensor | None
    given: Given | None = None


class _Heun(Family):
    """The part that the schedulers share."""

    order = ORDER
    _step: _Step | None = None
    _left: _Left | None = None
    _unlike: tuple[torch.Size, torch.Size] | None = None
    """Shapes at the two calls of the last step, where they differ."""

    @property
    def guidance(self) -> Guidance:
        """The guidance that the config asks for."""
        return make_guidance(**{name: getattr(self.config, name) for name in SETTINGS})

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call begins a step."""
        return self._step is None

    def _forget(self) -> None:
        super()._forget()
        self._step = self._left = self._unlike = None

    def _remembered(self) -> tuple[_Step | None, _Left | None]:
        return self._step, self._left

    def _recall(self, remembered: tuple[_Step | None, _Left | None]) -> None:
        self._step, self._left = remembered
        self._unlike = None

    def _lay_out(self, levels: Tensor, times: Tensor, listed: bool) -> None:
        """Begin a run over N + 1 noise levels.

        Args:
            levels: of the steps.
            times: timesteps of the first N.
            listed: whether the pipeline named each of them. It then takes the number of calls for
                the number of steps, and counts calls where an image to start from comes in.
        """
        self.num_inference_steps = len(times)
        # On the host, as in diffusers: the loop reads them and should not wait.
        self.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]]).cpu()
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        self.order = 1 if listed else ORDER
        self._step_index = self._begin_index = None
        self._forget()

    def _move(
        self, x: Tensor, denoised: Tensor, index: int, sample: Tensor, generator: Generators
    ) -> Tensor:
        if self._unlike is not None:
            first, second = self._unlike
            raise ValueError(
                f"a step began with samples of shape {list(first)} and went on with "
                f"{list(second)}: both calls of a step of Heun need the same; or take modal"
            )
        if index % 2 == 0:
            return self._begin(x, denoised, index, sample)
        if self._step is None:  # a run that begins between the calls of a step: wait for the next
            return x
        if self._step.x.shape != x.shape:
            # Cosmos 1 asks for the clean data of both prompts first, and undoes that call. Were it
            # not undone, the next call would say so.
            self._unlike, self._step = (self._step.x.shape, x.shape), None
            return x
        return self._end(x, denoised, index, sample)

    def _falling(self, index: int) -> Tensor:
        """Return the time at an index, in float32 as diffusers computes with it."""
        sigma = self.sigmas[index]
        return 1 - sigma if self.inverted else sigma

    def _begin(self, x: Tensor, denoised: Tensor, index: int, sample: Tensor) -> Tensor:
        t, t_next = self._falling(index), self._falling(index + 1)
        f = (x - denoised) / t
        low = x + f * (t_next - t)
        left, self._left = self._left, None
        if not 0 < t_next < t:
            return low  # the last step is Euler's: there is no second call
        companion = None
        if left is not None and left.given is not None and left.given.fits(sample):
            void = either(left.void, left.given.edited(sample))
            companion = (unless(void, left.x, x), unless(void, left.f, f))
        self._step = _Step(x, f, companion, low)
        return low

    def _end(self, x: Tensor, denoised: Tensor, index: int, sample: Tensor) -> Tensor:
        step, self._step = self._step, None
        assert step is not None
        t, t_next = self._falling(index - 1), self._falling(index)
        f_low = (x - denoised) / t_next
        high = step.x + (step.f + f_low) / 2 * (t_next - t)
        guidance = self.guidance
        if not guidance.active or step.given is None or not step.given.fits(sample):
            return high
        edited = step.given.edited(sample)
        self._left = _Left(x, f_low, edited)
        # What was edited is taken to have no curvature: it moves no measurement.
        denoised = unless(edited, denoised, step.low - t_next * step.f)
        guided = self._guided(guidance, step, denoised, high, float(t), float(t_next))
        return unless(edited, guided, high)

    def _guided(
        self, guidance: Guidance, step: _Step, denoised: Tensor, high: Tensor, t: float,
        t_next: float,
    ) -> Tensor:  # fmt: skip
        """Return the guided result of the whole step from t to t_next."""
        process = self._process(guidance)
        begin, end = process.level(t), process.level(t_next)
        first = evaluation_in_sigma(step.x, step.x - t * step.f, begin)
        # The solution is built on step.low itself. The pipeline has rounded it before the network
        # saw it; the denoised x is the same.
        second = evaluation_in_sigma(step.low, denoised, end)
        pair = None
        if step.companion is not None:
            x, f = step.companion
            other = evaluation_in_sigma(x, x - t * f, begin)
            pair = Pair(first.x, other.x, first.drift, other.drift, begin.sigma - end.sigma)
        x_next = high / end.alpha
        result = StepResult(
            x_next, begin.sigma, end.sigma, (first, second), 2, (0.5, 0.5), pair,
            lambda: x_next - second.x,
        )  # fmt: skip
        return guidance(result).x * end.alpha

    def _process(self, guidance: Guidance) -> Process:
        """Return the process in which guidance sees the step."""
        own = self.process
        return flow_process(Heun(), guidance) if isinstance(own, RectifiedFlow) else VE()

    def _note(self, returned: Tensor) -> None:
        if self._step is not None:
            self._step = self._step._replace(given=Given.of(returned))
        elif self._left is not None:
            self._left = self._left._replace(given=Given.of(returned))


class ERKGuidHeunScheduler(Discrete, _Heun, HeunDiscreteScheduler):  # type: ignore[metaclass]
    """diffusers' `HeunDiscreteScheduler` with ERK guidance.

    Takes the config of any scheduler of that family (`from_config`). N steps take 2 N - 1 calls
    of the network, guided or not.

    Args:
        w_stiff, w_con, bound, gate: see `erk_guid.ERKGuidance`; w_stiff may be "auto",
            the parameter-free form. w_con has the unit 1/sigma, where sigma is noise over signal.
        unit_variance: for pipelines that keep samples at unit variance, such as `DDPMPipeline`,
            `DDIMPipeline` and `DiTPipeline`; diffusers' own Heun gives wrong images with these.
        levels: noise levels in place of the spacing, the end included, as `fit` finds them.
        sigma_min, sigma_max, rescale_betas_zero_snr: as in `EulerDiscreteScheduler`.

    The other arguments are those of `HeunDiscreteScheduler`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rescale_betas_zero_snr: bool = False,
        w_stiff: float | str = "auto",
        w_con: float = ERKGuidance.w_con,
        bound: float | None = None,
        gate: Gate = ERKGuidance.gate,
        unit_variance: bool = False,
        levels: list[float] | None = None,
    ) -> None:
        make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)  # raise now, not in mid-run
        check_prediction(prediction_type)
        check_fitted(levels)
        # By keyword: diffusers takes what is passed by position for a default.
        HeunDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, beta_start=beta_start,
            beta_end=beta_end, beta_schedule=beta_schedule, trained_betas=trained_betas,
            prediction_type=prediction_type, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            clip_sample=clip_sample, clip_sample_range=clip_sample_range,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset,
        )  # fmt: skip
        if rescale_betas_zero_snr:
            betas: Tensor = self.betas  # type: ignore[has-type]
            self.betas = rescale_zero_terminal_snr(betas)
            self.alphas = 1.0 - self.betas
            self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
            # As in EulerDiscreteScheduler: noise over signal of 4096 stands for infinity.
            self.alphas_cumprod[-1] = 2**-24
            HeunDiscreteScheduler.set_timesteps(self, num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set the noise levels of a run, from one of num_inference_steps, timesteps and sigmas.

        Args:
            num_inference_steps: steps N, spaced as the config says; the network is called
                2 N - 1 times.
            device: for the timesteps.
            num_train_timesteps: in place of the config's.
            timesteps: N of them.
            sigmas: N + 1 noise levels, noise over signal, falling strictly; the last is usually
                0. The last step is Euler's, also to a level above 0. `EulerDiscreteScheduler`
                takes the same; diffusers' Heun takes none.

        Raises:
            ValueError: none or several are given, the sigmas do not fall, or the config has
                fitted levels for another number of steps.
        """
        fitted = None
        if num_train_timesteps is None:  # diffusers' own __init__ passes it
            fitted = chosen_levels(self.config.levels, num_inference_steps, sigmas, timesteps)
        check_times(timesteps, self.config.num_train_timesteps)
        if fitted is None and sigmas is None:
            HeunDiscreteScheduler.set_timesteps(
                self, num_inference_steps, device, num_train_timesteps,
                None if timesteps is None else list(timesteps),
            )  # fmt: skip
            self.order = ORDER if timesteps is None else 1
            self._forget()
            return
        if fitted is None and (num_inference_steps is not None or timesteps is not None):
            raise ValueError("sigmas stand alone: leave num_inference_steps and timesteps out")
        given = sigmas if fitted is None else fitted
        levels = check_levels(torch.as_tensor(given, dtype=torch.float64, device="cpu"))
        kept: Tensor = self.alphas_cumprod.double()
        known = ((1 - kept) / kept).sqrt().log().numpy()
        time_at: Any = self._sigma_to_t  # type: ignore[attr-defined]
        times = [float(time_at(np.float64(level), known)) for level in levels[:-1]]
        self._lay_out(as_tensor(levels), as_tensor(times).to(device), listed=fitted is None)


class EDMERKGuidHeunScheduler(EDM, _Heun, EDMEulerScheduler):  # type: ignore[metaclass]
    """Heun with ERK guidance over the noise levels of diffusers' `EDMEulerScheduler`.

    N steps take 2 N - 1 calls of the network, guided or not.

    Args:
        w_stiff, w_con, bound, gate: see `ERKGuidHeunScheduler`.
        levels: noise levels in place of the spacing, the end included, as `fit` finds them.

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
        w_stiff: float | str = "auto",
        w_con: float = ERKGuidance.w_con,
        bound: float | None = None,
        gate: Gate = ERKGuidance.gate,
        levels: list[float] | None = None,
    ) -> None:
        make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)
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
        """Set the noise levels of a run.

        Args:
            num_inference_steps: steps N; the network is called 2 N - 1 times.
            device: for the timesteps.
            sigmas: N noise levels that fall, the end is implied; or, as in diffusers, N shares
                of the range that rise from 0 to 1.

        Raises:
            ValueError: the config has fitted levels for another number of steps.
        """
        self._levels(num_inference_steps, device, sigmas)
        self._lay_out(self.sigmas, self.timesteps, listed=sigmas is not None)


class FlowMatchERKGuidHeunScheduler(Flow, _Heun, FlowMatchEulerDiscreteScheduler):  # type: ignore[metaclass]
    """Heun with ERK guidance over the times of diffusers' `FlowMatchEulerDiscreteScheduler`.

    For SD3, FLUX, Wan and similar models. N steps take 2 N - 1 calls of the network, guided or not.

    Args:
        w_stiff, w_con, bound, gate: see `ERKGuidHeunScheduler`; w_con has the unit 1/t.
        levels: times in place of the spacing, the end included, as `fit` finds them.
        own_lists: whether sigmas that the pipeline passes are never its user's, so that `levels`
            stand before them (Mochi; `for_pipeline` sees to that).
        spaced_by: `UniPCMultistepScheduler` or `DPMSolverMultistepScheduler`, if that one's
            spacing is wanted (its `use_flow_sigmas`; `from_config` sees to that).
        sigma_min, sigma_max, final_sigmas_type: for the spacings that use them.

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
        w_stiff: float | str = "auto",
        w_con: float = ERKGuidance.w_con,
        bound: float | None = None,
        gate: Gate = ERKGuidance.gate,
        levels: list[float] | None = None,
        own_lists: bool = False,
    ) -> None:
        make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)
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
        """Set the times of a run.

        Args:
            num_inference_steps: steps N; the network is called 2 N - 1 times.
            device: for the timesteps.
            sigmas: N times above 0 to be shifted, in place of evenly spaced ones; a 0 at the end
                is implied.
            mu: the shift, where the config asks for dynamic shifting.
            timesteps: N of them, in place of sigmas.

        Raises:
            ValueError: the times do not fall, or the config has fitted ones for another number of
                steps.
        """
        self._levels(num_inference_steps, device, sigmas, mu, timesteps)
        listed = sigmas is not None or timesteps is not None
        self._lay_out(self.sigmas, self.timesteps, listed)
