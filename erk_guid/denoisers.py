"""Denoisers, which a sampler calls, and model guidance, which combines two of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Protocol, runtime_checkable

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
        interval: (low, high): guide where low < sigma <= high only (Kynkaanniemi et al. 2024,
            arXiv 2404.07724), and do not call `guide` elsewhere; None is everywhere. In the unit
            that the denoisers are called with. On a GPU each call then waits for sigma.
    """

    main: Denoiser
    guide: Denoiser
    strength: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.strength, Real) or not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength!r}")
        if self.interval is not None:
            check_interval(self.interval)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        main = self.main(x, sigma)
        check_output(main, x)
        if self.strength == 1 or not within(self.interval, sigma):
            return main.to(x.dtype)
        # A copy: both may be one network that returns the same tensor each time.
        main = main.to(x.dtype, copy=True)
        guide = self.guide(x, sigma)
        check_output(guide, x)  # lerp would broadcast it
        return _led_away(main, guide, self.strength)


def _led_away(main: Tensor, guide: Tensor, strength: float) -> Tensor:
    return guide.to(main.dtype).lerp(main, strength)


def check_output(denoised: object, x: Tensor) -> None:
    """Refuse what a denoiser must not return; nothing is broadcast or cast to real numbers.

    Raises:
        TypeError: it is not a tensor of floating-point numbers.
        ValueError: it is not shaped like x.
    """
    if not isinstance(denoised, Tensor):
        found = f"a {type(denoised).__name__}"
        remedy = "it must return the denoised x alone, a tensor like x"
        if denoised is None:
            found, remedy = "None", "is its 'return' missing?"
        elif isinstance(denoised, (tuple, list)):
            found = f"{found} of {len(denoised)}"
        raise TypeError(f"the denoiser returned {found} for an x of {list(x.shape)}; {remedy}")
    if not denoised.is_floating_point():
        raise TypeError(
            f"the denoiser returned {denoised.dtype} {list(denoised.shape)}, but the denoised x "
            "is made of real floating-point numbers; convert it in the denoiser (.float(), .real)"
        )
    if denoised.shape != x.shape:
        raise ValueError(
            f"the denoiser returned {list(denoised.shape)} for an x of {list(x.shape)}; the "
            "denoised x has the shape of x"
        )


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse what is no interval of noise levels.

    Raises:
        ValueError: it is not (low, high) with 0 <= low < high.
    """
    numbers = isinstance(interval, (tuple, list)) and len(interval) == 2
    numbers = numbers and all(isinstance(v, Real) for v in interval)
    if not numbers or not 0 <= interval[0] < interval[1]:
        raise ValueError(
            "the interval of model guidance must be (low, high) in sigma with 0 <= low < high, "
            f"got {interval!r}"
        )


def within(interval: tuple[float, float] | None, sigma: Tensor) -> bool:
    """Return whether a noise level lies in the interval (low, high]; None is everywhere.

    The ends are rounded to the dtype of sigma, so that a level at an end is taken as written.

    Raises:
        ValueError: samples of different levels; k-diffusion's [N] of one level is none.
    """
    if interval is None:
        return True
    low, high = torch.tensor(interval, dtype=sigma.dtype).tolist()
    least, most = (float(level) for level in torch.aminmax(sigma))
    if least != most:
        raise ValueError(
            f"an interval of model guidance needs one noise level for all samples, got {least:g} "
            f"to {most:g}"
        )
    return low < least <= high


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


@runtime_checkable
class PairedDenoiser(Protocol):
    """A guiding network that can be evaluated together with the network it guides."""

    def pair(
        self, net: ConditionalDenoiser, x: Tensor, sigma: Tensor, labels: Tensor | None, /
    ) -> tuple[Tensor, Tensor] | None:
        """Return the outputs of `net` and of this one by a single call, each like x.

        None means that there is no such call, or that two calls are faster.
        """
        ...


def guided_denoiser(
    net: ConditionalDenoiser,
    gnet: ConditionalDenoiser | None,
    strength: float,
    interval: tuple[float, float] | None = None,
) -> ConditionalDenoiser:
    """Return the denoiser of a network and its guiding network.

    Args:
        net, gnet: called as ``net(x, sigma, labels)``. If `gnet` is a `PairedDenoiser` it may
            evaluate both at once.
        strength: of model guidance; with 1 `gnet` is not run, and may be None.
        interval: see `ModelGuidance`.

    Raises:
        ValueError: a strength other than 1 without `gnet`, or no interval of noise levels.
    """
    if interval is not None:
        check_interval(interval)
    if strength == 1:
        return net
    if gnet is None:
        raise ValueError(f"model guidance of {strength} needs a guiding network (gnet)")
    paired = gnet if isinstance(gnet, PairedDenoiser) else None
    return _GuidedNetwork(net, gnet, paired, strength, interval)


@dataclass(frozen=True)
class _GuidedNetwork:
    net: ConditionalDenoiser
    gnet: ConditionalDenoiser
    paired: PairedDenoiser | None
    strength: float
    interval: tuple[float, float] | None

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        if self.paired is not None and within(self.interval, sigma):
            both = self.paired.pair(self.net, x, sigma, labels)
            if both is not None:
                return _led_away(both[0].to(x.dtype), both[1], self.strength)
        main, guide = (partial(_with_labels, network, labels) for network in (self.net, self.gnet))
        return ModelGuidance(main, guide, self.strength, self.interval)(x, sigma)


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
