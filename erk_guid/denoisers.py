"""Denoisers, which a sampler calls, and model guidance, which combines two of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """D(x; sigma): the expected clean x given a noisy one.

    Called with x [N, ...] and sigma, a tensor without dimensions on the device of x; returns a
    tensor shaped like x, of any floating dtype. Any callable of that kind will do: a network
    under EDM's preconditioning, a lambda that adds class labels, k-diffusion's wrappers.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class ModelGuidance:
    """Classifier-free guidance or autoguidance: D_guide + strength (D_main - D_guide).

    This is what the field calls "guidance" with a number, and what EDM2 calls ``guidance`` and
    ``gnet``. It combines two denoisers; `erk_guid.ERKGuidance` corrects the solver's step. The two
    go together: ERK guidance then acts on the drift of the combined denoiser.

    Args:
        main: the denoiser that is guided.
        guide: the one led away from: unconditional (CFG) or weaker (autoguidance).
        strength: 1 is `main` alone (then `guide` is not called), more pushes away from `guide`.
    """

    main: Denoiser
    guide: Denoiser
    strength: float

    def __post_init__(self) -> None:
        if not isinstance(self.strength, Real) or not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength!r}")

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        main = self.main(x, sigma)
        if self.strength == 1:
            return main.to(x.dtype)
        # A copy: both may be one network that returns the same tensor each time.
        main = main.to(x.dtype, copy=True)
        return self.guide(x, sigma).to(x.dtype).lerp(main, self.strength)


class LevelDenoiser(ABC):
    """A denoiser that is told the noise level as a number, for wrappers that look it up.

    The package's own solvers call `at`; anyone else may call it as a `Denoiser`.
    """

    @abstractmethod
    def at(self, x: Tensor, sigma: float) -> Tensor:
        """Return D(x; sigma), like x."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        return self.at(x, float(sigma))


class ConditionalDenoiser(Protocol):
    """A denoiser with labels behind x and sigma, as networks are called."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor: ...


def guided_denoiser(
    net: ConditionalDenoiser, gnet: ConditionalDenoiser | None, strength: float
) -> ConditionalDenoiser:
    """Return the denoiser of a network and its guiding network.

    Args:
        net, gnet: called as ``net(x, sigma, labels)``.
        strength: of model guidance; with 1 `gnet` is not run, and may be None.

    Raises:
        ValueError: a strength other than 1 without `gnet`.
    """
    if strength == 1:
        return net
    if gnet is None:
        raise ValueError(f"model guidance of {strength} needs a guiding network (gnet)")
    return _GuidedNetwork(net, gnet, strength)


@dataclass(frozen=True)
class _GuidedNetwork:
    net: ConditionalDenoiser
    gnet: ConditionalDenoiser
    strength: float

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        main, guide = (partial(_with_labels, network, labels) for network in (self.net, self.gnet))
        return ModelGuidance(main, guide, self.strength)(x, sigma)


def _with_labels(
    net: ConditionalDenoiser, labels: Tensor | None, x: Tensor, sigma: Tensor, /
) -> Tensor:
    return net(x, sigma, labels)


def in_batches(denoiser: Callable[..., Tensor], labels: Tensor | None, size: int) -> Denoiser:
    """Return a denoiser that calls another one with `size` rows at a time.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, or with the rows of `labels` behind them.
        labels: as many rows as x will have, or None.
        size: rows at a time.
    """

    @torch.no_grad()
    def denoise(x: Tensor, sigma: Tensor, /) -> Tensor:
        parts = []
        for i in range(0, len(x), size):
            part = slice(i, i + size)
            given = () if labels is None else (labels[part],)
            parts.append(denoiser(x[part], sigma, *given).to(x.dtype))
        return torch.cat(parts)

    return denoise
