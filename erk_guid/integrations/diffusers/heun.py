"""Heun with ERK guidance as schedulers for diffusers, at Heun's cost.

`ERKGuidHeunScheduler` is diffusers' `HeunDiscreteScheduler`, `FlowMatchERKGuidHeunScheduler` its
`FlowMatchHeunDiscreteScheduler` (SD3, FLUX), each with guidance. With ``w_stiff=0`` every call
gives what theirs gives, bit for bit.

A pipeline calls a two-stage scheduler twice per step. The second call of a step keeps the Euler
solution and its drift. The first call of the next step brings the Heun solution and its drift at
the same noise level: the embedded pair. It is dropped when timesteps are set, when a run begins
in mid-schedule, and whenever the incoming sample is not the one returned last (in-painting and
callbacks edit it). The published form is then plain Heun, and "auto" does without the measurement.
Everything is kept in float32, whatever the pipeline's precision.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    # diffusers looks this name up here when it loads a saved pipeline with one of our schedulers.
    SchedulerMixin,  # noqa: F401
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from erk_guid.guidance import ERKGuidance, Gate, Guidance, make_guidance
from erk_guid.integrations.diffusers.variance import Samples, UnitVariance, in_float32
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import VE, Process, evaluation_in_sigma
from erk_guid.solvers import Heun, Pair, StepResult, check_levels

__all__ = ["ERKGuidHeunScheduler", "FlowMatchERKGuidHeunScheduler"]

SETTINGS = ("w_stiff", "w_con", "bound", "gate")


@dataclass
class _Step:
    """What the first call of a step keeps for the second, in float32."""

    x: Tensor
    f: Tensor
    companion: _Left | None
    """What the previous step kept, if its sample came back unchanged."""
    x_low: Tensor
    """Euler's solution, before it is rounded to the pipeline's precision."""
    returned: Tensor
    """The sample given back, in the pipeline's precision."""


@dataclass
class _Left:
    """What the second call keeps for the next step."""

    x_low: Tensor
    f_low: Tensor
    returned: Tensor


class _Guided(Samples, ABC):
    """The part that both schedulers share, on top of one of diffusers' Heun schedulers.

    (The type checker sees the stand-ins that diffusers has for missing packages; their metaclass
    is not that of the real classes.)
    """

    timesteps: Tensor
    _step: _Step | None = None
    _left: _Left | None = None

    @property
    def guidance(self) -> Guidance:
        """The guidance that the config asks for."""
        return make_guidance(**{name: getattr(self.config, name) for name in SETTINGS})

    def _forget(self) -> None:
        self._step = self._left = None

    def _lay_out(self, levels: Tensor, times: Tensor) -> None:
        """Begin a run over N + 1 noise levels; `times`: the timesteps of the first N."""
        self.num_inference_steps = len(times)
        # On the host, as in diffusers: the loop reads them and should not wait.
        self.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]]).cpu()
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        self.prev_derivative = self.dt = None
        self._step_index = self._begin_index = None
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set where in the schedule a run begins, as in diffusers."""
        super().set_begin_index(begin_index)  # type: ignore[misc]
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Return the next sample, as in diffusers; at the end of each step it is guided.

        Raises:
            ValueError: s_churn is not 0; the settings in the config are out of range.
        """
        guidance = self.guidance
        plain: Any = super().step  # type: ignore[misc]
        if isinstance(self, HeunDiscreteScheduler):
            options.pop("generator", None)  # some pipelines pass one; nothing here is random
        if not guidance.active and not self.unit_variance:
            return plain(model_output, timestep, sample, return_dict=return_dict, **options)
        if guidance.active and options.get("s_churn", 0):
            raise ValueError(
                "s_churn must be 0: ERK guidance compares two solutions at one noise level, and "
                "churn moves one of them to another"
            )
        begins = self.state_in_first_order  # type: ignore[attr-defined]
        if begins and self.step_index is None:  # type: ignore[attr-defined]
            self._forget()
        wide, output = self._unscaled(sample, timestep), in_float32(model_output)
        found = plain(output, timestep, wide, return_dict=True, **options)
        # The index has moved on by one: to the end of this call's interval.
        index = self.step_index - (1 if begins else 2)  # type: ignore[attr-defined]
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        result: Tensor = found.prev_sample
        if guidance.active and begins:
            result = self._begin(found, wide, sample, sigma, sigma_next)
        elif guidance.active:
            result = self._end(found, output, wide, sample, sigma, sigma_next, guidance)
        found.prev_sample = self._scaled(result).to(self._dtype(sample, model_output))
        self._note(found.prev_sample, begins)
        return found if return_dict else tuple(found.values())

    def _begin(
        self, found: Any, x: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor
    ) -> Tensor:
        f: Tensor | None = self.prev_derivative
        result: Tensor = found.prev_sample
        left, self._left, self._step = self._left, None, None
        if f is None or not 0 < sigma_next < sigma:
            return result  # the last step is Euler's: there is no second call
        unchanged = left is not None and torch.equal(sample, left.returned)
        self._step = _Step(x, f, left if unchanged else None, result, result)
        return result

    def _end(
        self,
        found: Any,
        output: Tensor,
        x_low: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        guidance: Guidance,
    ) -> Tensor:
        result: Tensor = found.prev_sample
        step, self._step = self._step, None
        if step is None or not torch.equal(sample, step.returned):
            return result
        f_low = self._drift(found, output, x_low, sigma_next)
        self._left = _Left(x_low, f_low, result)
        return self._guided(guidance, step, x_low, f_low, result, float(sigma), float(sigma_next))

    def _guided(
        self,
        guidance: Guidance,
        step: _Step,
        x_low: Tensor,
        f_low: Tensor,
        x_high: Tensor,
        s: float,
        t: float,
    ) -> Tensor:
        """Return the guided result of the whole step from noise level s to t."""
        process = self._process(guidance)
        begin, end = process.level(s), process.level(t)
        first = evaluation_in_sigma(step.x, step.x - s * step.f, begin)
        # The solution is built on step.x_low itself. The pipeline has rounded it to x_low; the
        # denoised x is the same.
        second = evaluation_in_sigma(step.x_low, x_low - t * f_low, end)
        pair = None
        if step.companion is not None:
            x, f = step.companion.x_low, step.companion.f_low
            low = evaluation_in_sigma(x, x - s * f, begin)
            pair = Pair(first.x, low.x, first.drift, low.drift, begin.sigma - end.sigma)
        x_next = x_high / end.alpha
        result = StepResult(
            x_next, begin.sigma, end.sigma, (first, second), 2, (0.5, 0.5), pair,
            lambda: x_next - second.x,
        )  # fmt: skip
        return guidance(result).x * end.alpha

    def _process(self, guidance: Guidance) -> Process:
        """Return the process in which guidance sees the step."""
        return VE()

    def _note(self, returned: Tensor, begins: bool) -> None:
        """Remember the returned sample, to tell whether the pipeline gives it back unchanged."""
        holder = self._step if begins else self._left
        if holder is not None:
            holder.returned = returned.clone()

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        """Return the dtype of the returned sample, as in diffusers."""
        return output.dtype

    @abstractmethod
    def _drift(self, found: Any, output: Tensor, x_low: Tensor, sigma_next: Tensor) -> Tensor:
        """Return dx/dsigma at (x_low, sigma_next)."""


class ERKGuidHeunScheduler(UnitVariance, _Guided, HeunDiscreteScheduler):  # type: ignore[metaclass]
    """diffusers' `HeunDiscreteScheduler` with ERK guidance.

    Takes the config of any scheduler of that family (`from_config`). N steps take 2 N - 1 calls
    of the network, guided or not.

    Args:
        w_stiff, w_con, bound, gate: see `erk_guid.ERKGuidance`; w_stiff may be "auto",
            the parameter-free form. w_con has the unit 1/sigma, where sigma is noise over signal.
        unit_variance: for pipelines that keep samples at unit variance, such as `DDPMPipeline`,
            `DDIMPipeline` and `DiTPipeline`; diffusers' own Heun gives wrong images with these.

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
        w_stiff: float | str = "auto",
        w_con: float = ERKGuidance.w_con,
        bound: float | None = None,
        gate: Gate = ERKGuidance.gate,
        unit_variance: bool = False,
    ) -> None:
        make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)  # raise now, not in mid-run
        # By keyword: diffusers takes what is passed by position for a default.
        HeunDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, beta_start=beta_start,
            beta_end=beta_end, beta_schedule=beta_schedule, trained_betas=trained_betas,
            prediction_type=prediction_type, use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas, use_beta_sigmas=use_beta_sigmas,
            clip_sample=clip_sample, clip_sample_range=clip_sample_range,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset,
        )  # fmt: skip

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
                0. `EulerDiscreteScheduler` takes the same; diffusers' Heun takes none.

        Raises:
            ValueError: none or several are given, or the sigmas do not fall.
        """
        if sigmas is None:
            HeunDiscreteScheduler.set_timesteps(
                self, num_inference_steps, device, num_train_timesteps,
                None if timesteps is None else list(timesteps),
            )  # fmt: skip
            self._forget()
            return
        if num_inference_steps is not None or timesteps is not None:
            raise ValueError("sigmas stand alone: leave num_inference_steps and timesteps out")
        levels = check_levels(torch.tensor(sigmas, dtype=torch.float64))
        kept: Tensor = self.alphas_cumprod.double()  # type: ignore[attr-defined]
        known = ((1 - kept) / kept).sqrt().log().numpy()
        time_at: Any = self._sigma_to_t  # type: ignore[attr-defined]
        times = [float(time_at(np.float64(level), known)) for level in levels[:-1]]
        self._lay_out(
            torch.tensor(levels, dtype=torch.float32),
            torch.tensor(times, dtype=torch.float32, device=device),
        )

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.promote_types(sample.dtype, output.dtype)

    def _drift(self, found: Any, output: Tensor, x_low: Tensor, sigma_next: Tensor) -> Tensor:
        return (x_low - found.pred_original_sample) / sigma_next


class FlowMatchERKGuidHeunScheduler(_Guided, FlowMatchHeunDiscreteScheduler):  # type: ignore[metaclass]
    """diffusers' `FlowMatchHeunDiscreteScheduler` with ERK guidance, for models like SD3 and FLUX.

    Unlike diffusers' it also takes lists of sigmas and resolution-dependent shifting, as
    `FlowMatchEulerDiscreteScheduler` does (those pipelines ask for them); the noise levels are
    then that scheduler's.

    Args:
        w_stiff, w_con, bound, gate: see `erk_guid.ERKGuidance`; w_stiff may be "auto",
            the parameter-free form. In the published form stiffness has the unit 1/t; t is the
            share of noise, from 1 down to 0.

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
        w_stiff: float | str = "auto",
        w_con: float = ERKGuidance.w_con,
        bound: float | None = None,
        gate: Gate = ERKGuidance.gate,
    ) -> None:
        if invert_sigmas:
            raise ValueError("invert_sigmas: a schedule that rises cannot be sampled by Heun")
        make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)
        FlowMatchHeunDiscreteScheduler.__init__(
            self, num_train_timesteps=num_train_timesteps, shift=shift
        )

    _SHIFTS = (
        "use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
        "use_beta_sigmas",
    )  # fmt: skip

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the noise levels of a run.

        Args:
            num_inference_steps: steps; the network is called 2 N - 1 times.
            device: for the timesteps.
            sigmas: N noise levels above 0 to be shifted, in place of evenly spaced ones; a 0 at
                the end is implied.
            mu: the shift, where the config asks for dynamic shifting.
            timesteps: N of them, in place of sigmas.

        Raises:
            ValueError: the sigmas do not fall.
        """
        asks = any(getattr(self.config, name) for name in self._SHIFTS)
        if sigmas is None and timesteps is None and mu is None and not asks:
            FlowMatchHeunDiscreteScheduler.set_timesteps(self, num_inference_steps, device)
            self._forget()
            return
        if sigmas is not None:
            ended = sigmas if sigmas[-1] == 0 else [*sigmas, 0.0]
            sigmas = check_levels(torch.tensor(list(map(float, ended)), dtype=torch.float64))[:-1]
        # Without our own settings, which it would warn about at every run.
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        given = {name: value for name, value in self.config.items() if name in known}
        euler: Any = FlowMatchEulerDiscreteScheduler(**given)
        euler.set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._lay_out(euler.sigmas, euler.timesteps)

    def _drift(self, found: Any, output: Tensor, x_low: Tensor, sigma_next: Tensor) -> Tensor:
        return output  # the network gives the drift itself

    def _process(self, guidance: Guidance) -> Process:
        return flow_process(Heun(), guidance)
