"""What a sampler calls: denoisers, and model guidance as a wrapper around two of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Protocol

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
    ``gnet``. It combines two denoisers; `erk_guid.Guidance` corrects the solver's step. The two
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


def _with_labels(
    net: Callable[..., Tensor], labels: Tensor | None, x: Tensor, sigma: Tensor, /
) -> Tensor:
    return net(x, sigma, labels)


def combined(
    net: Callable[..., Tensor], gnet: Callable[..., Tensor] | None, strength: float
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The denoiser of a network and its guiding network, with labels as a third argument.

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
    guiding = gnet

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        main, guide = (partial(_with_labels, network, labels) for network in (net, guiding))
        return ModelGuidance(main, guide, strength)(x, sigma)

    return denoise
