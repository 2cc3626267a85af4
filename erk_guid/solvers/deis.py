"""Multistep methods on the drift: DEIS, iPNDM, iPNDM_v.

DEIS: Zhang and Chen 2023 (arXiv 2204.13902). iPNDM: ibid., after Liu et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from erk_guid.quadrature import lagrange_integrals
from erk_guid.schedules import vp_sigma_slope, vp_time
from erk_guid.solvers.base import Solver
from erk_guid.solvers.multistep import MAX_ORDER, MultistepStep, check_order

DEISMode = Literal["tab", "rhoab", "log"]

_VARIABLES: dict[str, tuple[Callable[[float], float], Callable[[float], float] | None]] = {
    "tab": (vp_time, vp_sigma_slope),
    "rhoab": (float, None),
    "log": (math.log, math.exp),
}
"""Mode of DEIS to the variable that it interpolates in, and d sigma / d variable."""


LEAST_IN_TAB = 1e-7
"""Noise level down to which deis_mode 'tab' holds. Its time is that of a process made for noise
levels from 0.002 on; below this one its times agree in all but their last digits."""


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS: the drift, interpolated through the last `order` points, integrated over the step.

    The pair is the last two points of the trajectory.

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer.
        deis_mode: variable of the interpolation. 'rhoab': sigma. 'tab': time of the
            variance-preserving SDE (sigma from 0.002 to 80 and epsilon 1e-3, whatever the run's
            own range; for noise levels of 1e-7 and above). 'log': log sigma, as diffusers'
            DEISMultistepScheduler.

    In bfloat16 'tab' with few steps enlarges rounding, by weights of both signs: for a Gaussian and
    8 noise levels order 4 came out 33 % off, order 3 9 %, 'rhoab' and other solvers 1 to 4 %.
    """

    order: int = 4
    deis_mode: DEISMode = "tab"

    has_pair = True

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "deis")
        if self.deis_mode not in get_args(DEISMode):
            known = " or ".join(map(repr, get_args(DEISMode)))
            raise ValueError(f"deis_mode must be {known}, got {self.deis_mode!r}")

    def steps(self, levels: Sequence[float]) -> list[MultistepStep]:
        if self.deis_mode == "tab" and levels and min(levels) < LEAST_IN_TAB:
            raise ValueError(
                f"deis_mode 'tab' cannot tell noise levels below {LEAST_IN_TAB:g} apart, got "
                f"{min(levels):g}; take deis_mode 'rhoab' or 'log'"
            )
        place, density = _VARIABLES[self.deis_mode]
        places = [place(level) for level in levels]
        steps: list[MultistepStep] = []
        for i, (s, t) in enumerate(pairwise(levels)):

            def weights(order: int, i: int = i, h: float = t - s) -> tuple[float, ...]:
                if order == 1:  # published: Euler's
                    return (h,)
                nodes = [places[k] for k in range(i, i - order, -1)]
                return tuple(lagrange_integrals(nodes, places[i], places[i + 1], density))

            order = min(self.order, i + 1)
            if i == 0:
                steps.append(MultistepStep(s, t, weights(order)))
                continue
            # Order 1 has no lower one; the distance to order 2 says the same.
            lower = weights(order - 1 if order > 1 else 2)
            steps.append(MultistepStep(s, t, weights(order), lower=lower, pair_h=levels[i - 1] - s))
        return steps


@dataclass(frozen=True)
class IPNDM(Solver):
    """Improved PNDM: Adams-Bashforth with the weights of equal steps, the order rising from 1.

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "ipndm")

    def steps(self, levels: Sequence[float]) -> list[MultistepStep]:
        steps = []
        for i, (s, t) in enumerate(pairwise(levels)):
            equal = [-float(k) for k in range(min(self.order, i + 1))]
            weights = [(t - s) * w for w in lagrange_integrals(equal, 0, 1)]
            steps.append(MultistepStep(s, t, tuple(weights)))
        return steps


@dataclass(frozen=True)
class IPNDMV(Solver):
    """iPNDM with variable steps, by the published weights.

    From order 3 on these are not the exact integrals of the interpolant (a bracket is misplaced
    in the published formula). DEIS with deis_mode 'rhoab' has those. So where the ratio of steps
    that follow each other does not tend to 1, errors do not vanish with more steps: in flow
    matching with evenly spaced times from t = 1, a linear problem kept an error of 2 %.

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "ipndm_v")

    def steps(self, levels: Sequence[float]) -> list[MultistepStep]:
        lengths = [t - s for s, t in pairwise(levels)]
        steps = []
        for i, h in enumerate(lengths):
            past = lengths[max(i - self.order + 1, 0) : i][::-1]
            weights = tuple(h * w for w in _published_weights(h, past))
            steps.append(MultistepStep(levels[i], levels[i + 1], weights))
        return steps


def _published_weights(h: float, past: Sequence[float]) -> list[float]:
    """Return iPNDM_v's weights for a step of h after steps past[0], past[1], ..., latest first."""
    if not past:
        return [1.0]
    a = past[0]
    weights = [(2 + h / a) / 2, -h / (2 * a)]
    if len(past) == 1:
        return weights
    b = past[1]
    t1 = (1 - h / (3 * (h + a)) * (h * (h + a)) / (a * (a + b))) / 2
    weights = [*(w + t1 * u for w, u in zip(weights, (1, -(1 + a / b)), strict=True)), t1 * a / b]
    if len(past) == 2:
        return weights
    c = past[2]
    first = (1 - h / (3 * (h + a))) / 2 + (1 - h / (2 * (h + a))) * h / (6 * (h + a + b))
    t2 = first * h * (h + a) * (h + a + b) / (a * (a + b) * (a + b + c))
    q = a * (a + b) / (b * (b + c))
    more = (1, -(1 + a / b + q), a / b + q * (1 + b / c), -q * a / b)
    return [w + t2 * u for w, u in zip([*weights, 0.0], more, strict=True)]
