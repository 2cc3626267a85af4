"""RES: exponential Adams-Bashforth in log sigma.

Hochbruck and Ostermann 2010; named by Zhang et al. 2023 (arXiv 2308.02157).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from erk_guid.quadrature import lagrange_integrals
from erk_guid.solvers.base import Solver
from erk_guid.solvers.multistep import MAX_ORDER, MultistepStep, check_order


@dataclass(frozen=True)
class RES(Solver):
    """Exponential Adams-Bashforth on denoised images; RES 2M at order 2.

    The denoised image is interpolated by a polynomial in log sigma through its last `order`
    values, and the step is integrated exactly. ComfyUI's res_multistep is order 2. DPM-Solver++
    differs from order 2 on by approximate integrals.

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "res")

    def steps(self, levels: Sequence[float]) -> list[MultistepStep]:
        lambdas = [-math.log(level) for level in levels]
        steps = []
        for i, (s, t) in enumerate(pairwise(levels)):
            # Measured from the end of the step, where the density exp(lambda - end) is 1.
            end = lambdas[i + 1]
            nodes = [lam - end for lam in lambdas[max(i + 1 - self.order, 0) : i + 1][::-1]]
            weights = lagrange_integrals(nodes, nodes[0], 0.0, math.exp)
            steps.append(MultistepStep(s, t, tuple(weights), t / s, predict_x0=True))
        return steps
