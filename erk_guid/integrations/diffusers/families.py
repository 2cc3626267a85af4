"""What each family of models keeps as its sample, and what its network predicts.

diffusers' schedulers come in three families. `Discrete` (Stable Diffusion 1 and 2, SDXL): x is
clean plus sigma noise, sigma comes from betas, and the network predicts noise, v or clean data.
`EDM` (Cosmos 1, Playground 2.5): the same x, with EDM's preconditioning in the scheduler. `Flow`
(SD3, FLUX, Wan): x is (1 - t) clean + t noise, and the network predicts noise minus clean data.

A family says which noise levels a run has and what the network's output means. The solver (modules
`heun` and `modal`) moves the sample.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from erk_guid.integrations.diffusers.configs import (
    OWN,
    SOLVERS_OWN,
    SPACINGS,
    UNDERSTOOD,
    carried_over,
)
from erk_guid.integrations.diffusers.levels import as_tensor, chosen_levels
from erk_guid.integrations.diffusers.samples import Samples, UnitVariance, in_float32
from erk_guid.processes import VE, Process, RectifiedFlow
from erk_guid.solvers import check_levels

Generators = torch.Generator | list[torch.Generator] | None
"""What a pipeline passes to draw noise: one generator, or one for each sample."""


class Family(Samples, ABC):
    """A scheduler over noise levels, without a solver.

    Attributes:
        sigmas: noise levels as diffusers keeps them: of each call, and the end.
        timesteps: what the network is told, one for each call.
    """

    name: str
    sigmas: Tensor
    timesteps: Tensor
    _step_index: int | None
    _before: tuple[int, Any] | None = None
    """Index of the last call, and what was remembered before it."""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """Make a scheduler from the config of another one, as in diffusers.

        Args:
            config: of any scheduler of this family. What it leaves out is what the class that it
                names has by default.
            return_unused_kwargs: as in diffusers.
            options: arguments of this class, in place of the config's.

        Raises:
            ValueError: the config belongs to another family, or asks for what this scheduler does
                not do; the message names the class to take instead.
            TypeError: this class has no such option.
        """
        known = cls._get_init_keys(cls)  # type: ignore[attr-defined]
        given = config
        if isinstance(config, Mapping):
            wanted = {key: value for key, value in options.items() if key in known}
            given = {**_defaults_of(str(config.get("_class_name"))), **config, **wanted}
            if given.get("_class_name") == cls.__name__:  # a class derived from ours, saved
                known_as = (base.__name__ for base in cls.__mro__ if base.__name__ in OWN)
                given["_class_name"] = next(known_as, cls.__name__)
            config = carried_over(given, cls.name, cls.__name__, known)
            if cls.name == Discrete.name:
                config |= _ends_of_spacing(given)
            # diffusers would warn of them.
            idle = SOLVERS_OWN - known
            config = {key: value for key, value in config.items() if key not in idle}
        unknown = options.keys() - known - {"dtype"}
        if unknown and not return_unused_kwargs:
            raise TypeError(
                f"{cls.__name__} has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(known - {'self'}))}"
            )
        made = super().from_config(config, return_unused_kwargs, **options)  # type: ignore[misc]
        if isinstance(given, Mapping):
            scheduler: Any = made[0] if return_unused_kwargs else made
            # As diffusers: what the class has no use for stays, for the way back.
            left = {key: value for key, value in given.items() if key[:1] != "_"}
            idle = SOLVERS_OWN | scheduler.config.keys()
            scheduler.register_to_config(**{k: v for k, v in left.items() if k not in idle})
        return made

    @property
    def process(self) -> Process:
        """What x is, at the levels that are set."""
        return VE()

    @property
    def inverted(self) -> bool:
        """Whether `sigmas` holds 1 - t."""
        return False

    def time(self, index: int) -> float:
        """Return the time of `process` at an index of the schedule."""
        sigma = float(self.sigmas[index])
        return 1 - sigma if self.inverted else sigma

    @abstractmethod
    def _denoised(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Return the clean data that an output stands for.

        Args:
            output: of the network, in float32.
            x: what the network was called with, before it was scaled, in float32.
            index: of the call.
        """

    @abstractmethod
    def _move(
        self, x: Tensor, denoised: Tensor, index: int, sample: Tensor, generator: Generators
    ) -> Tensor:
        """Return the next x, in float32; the solver does this.

        Args:
            x: the sample, in float32 and not at unit variance.
            denoised: what the network makes of it.
            index: of the call.
            sample: as the pipeline gave it.
            generator: for noise.
        """

    @abstractmethod
    def _note(self, returned: Tensor) -> None:
        """Remember what the pipeline gets, to tell later whether it was edited."""

    @abstractmethod
    def _remembered(self) -> Any:
        """Return what the solver remembers, as it will not be changed by later calls."""

    @abstractmethod
    def _recall(self, remembered: Any) -> None:
        """Go back to what was remembered."""

    def _forget(self) -> None:
        """Forget the run."""
        self._before = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set where in the schedule a run begins, as in diffusers."""
        super().set_begin_index(begin_index)  # type: ignore[misc]
        self._forget()

    def _advance(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators,
        dtype: torch.dtype,
        denoised: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the next sample, in `dtype`, and the denoised x of this call."""
        if isinstance(timestep, int):
            raise ValueError(f"timestep {timestep} is an index; pass one of scheduler.timesteps")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {list(sample.shape)}, got "
                f"{list(model_output.shape)}; of a network that predicts variance too, pass the "
                "first half of the channels"
            )
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
            self._forget()
        x, output = self._unscaled(sample, timestep), in_float32(model_output)
        index = self._step_index
        assert index is not None
        if index >= len(self.timesteps):
            raise ValueError(
                f"all {len(self.timesteps)} calls of this run were made; call set_timesteps first"
            )
        self._undo(index)
        if denoised is None:
            denoised = self._denoised(output, x, index)
        moved = self._move(x, in_float32(denoised), index, sample, generator)
        self._step_index = index + 1
        result = self._scaled(moved).to(dtype, copy=True)  # pipelines may edit it in place
        self._note(result)
        return result, denoised.to(dtype)

    def _undo(self, index: int) -> None:
        """Undo the last call if the pipeline has put the index back; begin anew if further.

        Cosmos 1 calls `step` to learn the clean data, sets the index back and calls `step` again.
        Loops that add noise to go back (RePaint, restart sampling) go on from another sample.
        """
        if self._before is not None and self._before[0] == index:
            self._recall(self._before[1])
        elif self._before is not None and self._before[0] != index - 1:
            self._forget()
        self._before = (index, self._remembered())


def no_churn(s_churn: float) -> None:
    """Raise ValueError if a step is asked to add noise by churn."""
    if s_churn:
        raise ValueError(
            f"s_churn must be 0, got {s_churn}: the network has seen the sample before that noise "
            "would be added; for noise in each step take eta of a modal scheduler"
        )


class Discrete(UnitVariance, Family):
    """Noise levels from betas, x = clean + sigma noise."""

    name = "discrete"

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> Any:
        """Return the sample to call the network with next.

        Args:
            model_output, timestep, sample, return_dict: as in diffusers.
            s_churn, s_tmin, s_tmax, s_noise: diffusers' noise in each step; s_churn must be 0.
            generator: draws the noise of `eta`; None is torch's own.
            eta: the noise of diffusers' DDIM, which `DDIMPipeline` passes; it must be 0.
            use_clipped_model_output: `DDIMPipeline` passes it. It changes nothing: where clean data
                are clipped, all else is computed from them as they then are.

        Raises:
            ValueError: s_churn or eta is not 0, the timestep is an index, model_output is not
                shaped like the sample, or the run is over.
        """
        no_churn(s_churn)
        if eta:
            raise ValueError(
                f"eta of the call must be 0, got {eta}: noise is a setting of the scheduler; take "
                f"for_pipeline(pipe, eta={eta})"
            )
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        found = self._advance(model_output, timestep, sample, generator, dtype)
        return EulerDiscreteSchedulerOutput(*found) if return_dict else found

    def _denoised(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        sigma, kind = self.sigmas[index], self.config.prediction_type
        if kind == "epsilon":
            denoised = x - sigma * output
        elif kind == "v_prediction":
            denoised = output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
        else:
            denoised = output
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            denoised = denoised.clamp(-limit, limit)
        return denoised


OVER_ALL = frozenset({
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
"""Schedulers whose spaced levels span all that the network knows, whatever timestep_spacing says.

Those of Euler's kind, as ours, space them between the first and the last of the timesteps.
"""
BETA_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
         "rescale_betas_zero_snr")  # fmt: skip
SPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _defaults_of(name: str) -> dict[str, Any]:
    """Return what one of diffusers' schedulers does where its config says nothing.

    The config of a scheduler is complete, but that of a file, which an old version wrote or
    somebody, need not be.
    """
    if name not in UNDERSTOOD:
        return {}
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not p.empty}


def _ends_of_spacing(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the ends that a scheduler's spaced levels have, where its config does not say."""
    name = config.get("_class_name")
    if name not in OVER_ALL or not any(config.get(option) for option in SPACED):
        return {}
    betas = {key: config[key] for key in BETA_SETTINGS if key in config}
    euler: Any = EulerDiscreteScheduler(**betas)
    kept = euler.alphas_cumprod.double()
    levels = ((1 - kept) / kept).sqrt()
    ends = {"sigma_min": float(levels[0]), "sigma_max": float(levels[-1])}
    return {name: end for name, end in ends.items() if config.get(name) is None}


def keep_shift(given: Any, made: Any) -> None:
    """Tell a scheduler what another one was told by `set_shift`, which is not in its config."""
    shift = getattr(given, "shift", None)
    if hasattr(made, "set_shift") and shift not in (None, given.config.get("shift")):
        made.set_shift(shift)


def check_prediction(prediction_type: str) -> None:
    """Raise ValueError unless a discrete scheduler knows what the network predicts."""
    known = ("epsilon", "v_prediction", "sample")
    if prediction_type not in known:
        raise ValueError(
            f"prediction_type must be one of {', '.join(known)}, got {prediction_type!r}"
            + ("; take a FlowMatch scheduler" if prediction_type == "flow_prediction" else "")
        )


class EDM(Family):
    """EDM's preconditioning, x = clean + sigma noise (Karras et al. 2022)."""

    name = "edm"

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """Return the sample to call the network with next.

        Args:
            model_output, timestep, sample, return_dict: as in diffusers.
            s_churn, s_tmin, s_tmax, s_noise: diffusers' noise in each step; s_churn must be 0.
            generator: draws the noise of `eta`; None is torch's own.
            pred_original_sample: clean data, in place of what `model_output` stands for.

        Raises:
            ValueError: s_churn is not 0, the timestep is an index, model_output is not shaped like
                the sample, or the run is over.
        """
        no_churn(s_churn)
        found = self._advance(
            model_output, timestep, sample, generator, model_output.dtype, pred_original_sample
        )
        return EulerDiscreteSchedulerOutput(*found) if return_dict else found

    def _denoised(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        found: Tensor = self.precondition_outputs(  # type: ignore[attr-defined]
            x, output, self.sigmas[index]
        )
        return found

    def _levels(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        sigmas: Sequence[float] | Tensor | None,
    ) -> None:
        """Set sigmas and timesteps of a run with one call a step."""
        fitted = chosen_levels(self.config.levels, num_inference_steps, sigmas)
        given = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
        if given is not None and not len(given):
            raise ValueError("sigmas is empty; give noise levels that fall")
        if fitted is None and (given is None or _are_shares(given)):
            steps = num_inference_steps if given is None else len(given)
            EDMEulerScheduler.set_timesteps(self, steps, device, given)
            return
        if fitted is None:
            assert given is not None
            levels = given.tolist()
            if len(levels) > 1 and levels[-1] == 0:
                levels = levels[:-1]  # the end is implied
                end = 0.0
            else:
                end = 0.0 if self.config.final_sigmas_type == "zero" else levels[-1]
            check_levels(torch.tensor([*levels, 0.0], dtype=torch.float64))
            fitted = [*levels, end]
        self.sigmas = as_tensor(fitted)
        self.timesteps = self.precondition_noise(self.sigmas[:-1]).to(device)  # type: ignore[attr-defined]
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None


def _are_shares(given: Tensor) -> bool:
    """Return whether a list holds shares of the range, which rise within 0 and 1."""
    within = bool(((given >= 0) & (given <= 1)).all())
    return len(given) > 1 and within and bool((given.diff() > 0).all())


class Flow(Family):
    """Flow matching, x = (1 - t) clean + t noise; or, where t exceeds 1, x = clean + t noise.

    Cosmos Predict2 does the second with a flow-matching scheduler (sigma_max 80).
    """

    name = "flow"

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample as it is; pipelines that take either family ask for it."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the sample to call the network with next.

        Args:
            model_output, timestep, sample, return_dict: as in diffusers.
            s_churn, s_tmin, s_tmax, s_noise: without effect in diffusers; s_churn must be 0.
            generator: draws the noise of `eta`; None is torch's own.
            per_token_timesteps: must be None.

        Raises:
            ValueError: s_churn is not 0, the timestep is an index, each token has its own,
                model_output is not shaped like the sample, or the run is over.
        """
        no_churn(s_churn)
        if per_token_timesteps is not None:
            raise ValueError(
                "per_token_timesteps: with a noise level for each token there is no pair to "
                "compare and no common history; keep FlowMatchEulerDiscreteScheduler"
            )
        found = self._advance(model_output, timestep, sample, generator, model_output.dtype)
        returned: Any = found[:1]
        return FlowMatchEulerDiscreteSchedulerOutput(*returned) if return_dict else returned

    @property
    def inverted(self) -> bool:
        return bool(self.config.invert_sigmas)

    @property
    def process(self) -> Process:
        return RectifiedFlow() if float(self.sigmas.max()) <= 1 else VE()

    def _denoised(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        if self.inverted:  # Mochi's network predicts clean data minus noise
            return x + (1 - self.sigmas[index]) * output
        return x - self.sigmas[index] * output

    def _levels(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
        timesteps: Sequence[float] | None,
    ) -> None:
        """Set sigmas and timesteps of a run with one call a step."""
        fitted = chosen_levels(
            self.config.levels, num_inference_steps, sigmas, timesteps, self.config.own_lists
        )
        if fitted is not None:
            if sigmas is not None and timesteps is not None:
                FlowMatchEulerDiscreteScheduler.set_timesteps(
                    self, num_inference_steps, device, sigmas, mu, timesteps
                )
                self.check_told()
            self.sigmas = as_tensor([1 - t for t in fitted] if self.inverted else fitted)
            scale = self.config.num_train_timesteps
            self.timesteps = (self.sigmas[:-1] * scale).to(device)
            self._step_index = self._begin_index = None
        elif self.config.spaced_by is None:
            if sigmas is not None and len(sigmas) > 1 and float(sigmas[-1]) == 0:
                sigmas = sigmas[:-1]  # the end is implied
            FlowMatchEulerDiscreteScheduler.set_timesteps(
                self, num_inference_steps, device, sigmas, mu, timesteps
            )
        else:
            self._spaced(num_inference_steps, device, sigmas, mu, timesteps)
        # On the host, as in diffusers' other schedulers: the loop reads it.
        self.sigmas = self.sigmas.cpu()
        self.num_inference_steps = len(self.timesteps)
        times = [self.time(index) for index in range(len(self.sigmas))]
        given = sigmas is not None or fitted is not None
        if given and times[0] > 1 and not (self.config.sigma_max or 1) > 1:
            raise ValueError(
                f"times of a flow are at most 1, got {times[0]:g}: these are noise levels of "
                "another family of models"
            )
        if sigmas is None and timesteps is None:
            times = list(dict.fromkeys(times))  # diffusers' own spacings may round to one number
        check_levels(torch.tensor(times, dtype=torch.float64))

    def check_told(self) -> None:
        """Refuse timesteps that are not those of the noise levels, where levels shall be changed.

        Raises:
            ValueError: they are others (CogView 4 shifts the levels alone).
        """
        scale = self.config.num_train_timesteps
        own = self.sigmas[: len(self.timesteps)].cpu() * scale
        apart = float((self.timesteps.cpu() - own).abs().max()) / scale
        if apart > TOLD_APART:
            raise ValueError(
                "the pipeline tells its network other times than those of its noise levels "
                f"(up to {apart:.2g} apart), so that nobody knows what to tell it at other "
                "levels: it runs with its own alone, without fit and with levels=None"
            )

    def _spaced(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
        timesteps: Sequence[float] | None,
    ) -> None:
        """Set sigmas and timesteps as the scheduler that `spaced_by` names."""
        spacing = spacing_of(self.config)
        lists = {"sigmas": sigmas, "timesteps": timesteps, "mu": mu}
        given = {name: value for name, value in lists.items() if value is not None}
        unknown = given.keys() - inspect.signature(spacing.set_timesteps).parameters.keys()
        if unknown:
            raise ValueError(f"{self.config.spaced_by} takes no {', '.join(sorted(unknown))}")
        spacing.set_timesteps(num_inference_steps, device=device, **given)
        self.sigmas, self.timesteps = spacing.sigmas, spacing.timesteps.float()
        self._step_index = self._begin_index = None


TOLD_APART = 1.5e-3
"""How far timesteps may be from their levels, as a part of all: schedulers round to whole ones."""


def spacing_of(config: Any) -> Any:
    """Return diffusers' own scheduler that spaces the times of a flow, with the config's values."""
    if config.spaced_by not in SPACINGS:
        raise ValueError(
            f"spaced_by must be one of {', '.join(SPACINGS)}, got {config.spaced_by!r}"
        )
    kind: Any = getattr(diffusers, config.spaced_by)
    known = kind._get_init_keys(kind)
    given = {name: value for name, value in config.items() if name in known}
    return kind(
        **given | {"use_flow_sigmas": True, "flow_shift": config.shift,
                   "prediction_type": "flow_prediction"}
    )  # fmt: skip
