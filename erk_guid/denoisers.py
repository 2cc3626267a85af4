"""What a sampler calls: denoisers, and model guidance as a wrapper around two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        main = self.main(x, sigma).to(x.dtype)
        if self.strength == 1:
            return main
        return self.guide(x, sigma).to(x.dtype).lerp(main, self.strength)
