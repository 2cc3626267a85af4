"""Flow matching in the terms of this package.

A flow-matching model keeps ``x = (1 - t) clean + t noise``. Divided by 1 - t that is clean data
plus sigma = t / (1 - t) times noise, where Gaussian modes look as everywhere else here. The ODE,
dx/dt = (x - D) / t, has the same form with t for sigma, and an Euler step is the same point from
both sides. A Heun step is not, and diffusers and ComfyUI take it in t. So the solvers run in t,
and only what supposes Gaussian modes, the parameter-free form of Heun and the modal solver, is
computed from sigma: ``Heun(flow=True)`` and ``Modal(flow=True)`` of `erk_guid.solvers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from erk_guid.auto import Answer
from erk_guid.guidance import Pair
from erk_guid.weights import modal_weights

LARGEST_SIGMA = 1e4
"""Stands for the infinite noise level at which flow matching begins (t = 1)."""


def sigma_of(t: float) -> float:
    """The noise level sigma at the time t, which runs from 1 (noise) to 0 (data)."""
    return t / max(1 - t, 1 / (LARGEST_SIGMA + 1))


def check_times(times: Sequence[float]) -> None:
    """Whether these can be a flow's times.

    Raises:
        ValueError: the first is above 1, where x would be more than noise.
    """
    if times[0] > 1 + 1e-4:  # some callers' 1 is rounded
        raise ValueError(
            f"with flow=True, sigmas are times from 1 (noise) down to 0 (data), got {times[0]:g}"
        )


class FlowAnswer(NamedTuple):
    """`Answer` for a Heun step in a flow's time."""

    x: Tensor
    """Where the step begins."""
    x_low: Tensor
    """Euler's solution at t_next."""
    f: Tensor
    """The drift dx/dt at (x, t)."""
    f_low: Tensor
    """The drift at (x_low, t_next)."""
    t: float
    t_next: float
    pair: Pair | None
    """At t, in the flow's own terms."""

    def solution(self) -> Tensor:
        sigma, sigma_next = sigma_of(self.t), sigma_of(self.t_next)

        def drift(x: Tensor, f: Tensor, t: float, sigma: float) -> Tensor:
            return (x * (1 + sigma) - (x - t * f)) / sigma

        pair = None
        f = drift(self.x, self.f, self.t, sigma)
        if self.pair is not None:
            low = self.pair.x_low
            f_low = drift(low, self.pair.f_low, self.t, sigma)
            scaled = (self.x * (1 + sigma), low * (1 + sigma))
            pair = Pair(*scaled, f, f_low, sigma - sigma_next)
        scale = 1 + sigma_next
        answer = Answer(
            self.x_low * scale, f, drift(self.x_low, self.f_low, self.t_next, sigma_next),
            self.x.new_full((), sigma), self.x.new_full((), sigma_next),
            modal_weights((sigma_next, sigma), sigma, sigma_next)[0], pair,
        )  # fmt: skip
        return answer.solution() / scale
