"""Samples at unit variance, for pipelines that do not scale them.

Schedulers over sigma (diffusers' Heun and Euler, and ours) keep x = clean + sigma noise. They rely
on the pipeline to multiply the first noise by `init_noise_sigma` and to call `scale_model_input`.
`DDPMPipeline`, `DDIMPipeline` and `DiTPipeline` do not do all of that: they keep
x / sqrt(1 + sigma^2). With such a scheduler their results are no images, and no error says so. With
``unit_variance=True`` a scheduler takes and returns samples in that scale.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from erk_guid.processes import UnitVariance as UnitVarianceProcess

logger = logging.get_logger(__name__)


def in_float32(given: Tensor) -> Tensor:
    """Return a copy in float32.

    The next call may overwrite a network's output, and a pipeline the sample that it passed.
    """
    return given.to(torch.float32, copy=True)


class Samples:
    """Samples as a scheduler and its pipeline exchange them: x itself."""

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    alphas_cumprod: Tensor

    @property
    def unit_variance(self) -> bool:
        """Return whether samples are x / sqrt(1 + sigma^2)."""
        return False

    def _unscaled(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return a copy of the incoming sample as clean + sigma noise, in float32."""
        return in_float32(sample)

    def _scaled(self, x: Tensor) -> Tensor:
        """Return x as the pipeline gets it, once the index has moved on."""
        return x


class UnitVariance(Samples):
    """The same, scaled if the config says so; list it before the scheduler in the bases."""

    @property
    def unit_variance(self) -> bool:
        return bool(getattr(self.config, "unit_variance", False))

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """The factor of the first noise, as in diffusers."""
        found: float | Tensor = super().init_noise_sigma  # type: ignore[misc]
        return 1.0 if self.unit_variance else found

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return the sample as the network takes it, as in diffusers."""
        scaled: Tensor = super().scale_model_input(sample, timestep)  # type: ignore[misc]
        self.is_scale_input_called = True  # Euler's name for it
        return sample if self.unit_variance else scaled

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean samples with noise at the level of a timestep, as in diffusers."""
        known = self.timesteps.to(timesteps.device).float()
        counted = self.config.get("timestep_type", "discrete") == "discrete"
        if counted and not bool(torch.isin(timesteps.float(), known).all()):
            return self._noisy_between(original_samples, noise, timesteps)
        add: Any = super().add_noise  # type: ignore[misc]
        noisy: Tensor = add(original_samples, noise, timesteps)
        if not self.unit_variance:
            return noisy
        sigma: Tensor = add(torch.zeros_like(noise), torch.ones_like(noise), timesteps)
        return noisy / (1 + sigma**2).sqrt()

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a network of v-prediction is trained to answer, as diffusers' DDPM does.

        It is alpha noise - sigma clean, where alpha clean + sigma noise is the noisy sample of unit
        variance (Salimans and Ho 2022, appendix D). In training loops it is the target of the loss.

        Args:
            sample: clean data [N, ...].
            noise: of the same shape, of unit variance.
            timesteps: [N], of the scheduler or whole numbers in between, as `add_noise` takes them.
        """
        # diffusers' Euler takes the timestep's place in the list for the timestep itself.
        one = torch.ones(1, *[1] * (sample.ndim - 1), device=sample.device)
        one = one.expand(timesteps.numel(), *one.shape[1:])
        alpha = self.add_noise(one, 0 * one, timesteps.reshape(-1))
        sigma = self.add_noise(0 * one, one, timesteps.reshape(-1))
        size = (alpha**2 + sigma**2).sqrt()  # 1 where samples are of unit variance
        return ((alpha * noise.float() - sigma * sample.float()) / size).to(sample.dtype)

    def _noisy_between(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean samples with noise at timesteps that are none of a run's (FreeInit)."""
        kept = self.alphas_cumprod.to(clean.device)[timesteps.round().long().to(clean.device)]
        shape = (-1, *[1] * (clean.ndim - 1))
        alpha, sigma = kept.sqrt().reshape(shape), (1 - kept).sqrt().reshape(shape)
        noisy = alpha * clean.float() + sigma * noise.float()
        return (noisy if self.unit_variance else noisy / alpha).to(clean.dtype)

    def _unscaled(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        if not self.unit_variance:
            if not getattr(self, "is_scale_input_called", False):
                self.is_scale_input_called = True  # said once
                logger.warning(
                    "scale_model_input was not called before step. A pipeline that never calls it "
                    "gives its network samples of a wrong size: use a scheduler with "
                    "unit_variance=True there. (A loop of your own may scale them itself.)"
                )
            return in_float32(sample)
        # Such pipelines need not call it. It finds the index; Euler's warns if it was not called.
        self.scale_model_input(sample, timestep)
        return sample.float() / self._alpha()

    def _scaled(self, x: Tensor) -> Tensor:
        if not self.unit_variance:
            return x
        return x * self._alpha()

    def _alpha(self) -> float:
        """Return the share of clean data in the pipeline's sample, at the current index."""
        return UnitVarianceProcess().alpha(float(self.sigmas[self.step_index]))  # type: ignore[attr-defined]
