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

from erk_guid.auto import PRIOR_RESPONSE, Answer
from erk_guid.guidance import Pair
from erk_guid.quadrature import modal_weights

LARGEST_SIGMA = 1e4
"""Stands for the infinite noise level at which flow matching begins (t = 1)."""


ALL_NOISE = 0.99
"""Above this time sigma is 100 or more, and every mode that data has is small against it."""


MOSTLY_NOISE = 0.9
"""Above this time sigma is 9 or more, and a denoiser hardly answers a displacement."""


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


def step_weights(past: Sequence[float], t: float, t_next: float) -> list[float]:
    """What denoised images at the times `past` weigh in a step, in terms of sigma.

    `modal_weights`, but for steps that begin where all is noise: modes of all sizes would be
    mostly modes that no data has. D of those that it has goes as 1 / sigma there, in which the
    step's integral is exact by the trapezoid.

    Args:
        past: times, those of the step's two ends first, if its end is among them.
        t, t_next: the step.
    """
    sigma, sigma_next = sigma_of(t), sigma_of(t_next)
    if t > ALL_NOISE:
        whole = 1 - sigma_next / sigma
        return [whole / 2, whole / 2] if past[0] == t_next else [whole]
    return modal_weights([sigma_of(time) for time in past], sigma, sigma_next)


def prior_response(t: float) -> float:
    """How the denoiser answers a displacement at the time t, where that was not measured."""
    return 0.0 if t > MOSTLY_NOISE else PRIOR_RESPONSE


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
        if self.x.dtype.itemsize < 4:  # what is multiplied by sigma would overflow
            return self._wide().solution().to(self.x.dtype)

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
            step_weights((self.t_next, self.t), self.t, self.t_next)[0], pair,
            prior_response(self.t_next),
        )  # fmt: skip
        return answer.solution() / scale

    def _wide(self) -> FlowAnswer:
        """The same in float32."""
        pair = self.pair
        if pair is not None:
            x, x_low, f, f_low = (part.float() for part in pair[:4])
            pair = Pair(x, x_low, f, f_low, pair.h)
        x, x_low, f, f_low = (part.float() for part in self[:4])
        return FlowAnswer(x, x_low, f, f_low, self.t, self.t_next, pair)
