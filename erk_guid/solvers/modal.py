"""Modal: predictor and corrector fitted to Gaussian modes. Our own; no published method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from erk_guid.quadrature import modal_weights, prior_response
from erk_guid.solvers.ancestral import Descent, check_eta
from erk_guid.solvers.base import Solver
from erk_guid.solvers.multistep import MAX_ORDER, PredictorCorrectorStep, check_order

NOISY_ORDER = 3
"""Evaluations that a step combines at eta 1, at most. The values of past steps hold noise of their
own, and extrapolation enlarges it the more, the higher its order and the longer the step: where the
last step is much longer than those before (Stable Diffusion's levels), by half."""


@dataclass(frozen=True)
class Modal(Solver):
    """Predictor and corrector fitted to Gaussian modes, one evaluation a step.

    ``x' = (sigma_next / sigma) x + sum_j w_j D_j``. Other methods interpolate D by polynomials in
    some variable. Here the weights have the least mean squared error over Gaussian data of all
    sizes (`erk_guid.quadrature.modal_weights`). The corrector reuses the evaluation at the
    predicted point, as UniPC's does. Then the kept value is moved by half of the correction: that
    is the mean response of a denoiser over those modes. Other methods leave it where it was.

    The last step cannot be corrected. It extrapolates as far as the step before was right to:
    ``x' = low + trust (predicted - low)``, where `low` uses the newest D alone, and trust is the
    share of (predicted - low) that the correction before confirmed
    (`erk_guid.solvers.multistep.trust_in_past`).

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer. With noise the
            weights go over to those of order 3, by the share eta^2.
        response: in place of one half, one number for each corrected step, as `erk_guid.fit` finds
            them for a model.
        eta: noise in each step, from 0 (none, the ODE) to 1 (the reverse SDE).
    """

    order: int = 4
    response: tuple[float, ...] | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "modal")
        check_eta(self.eta)
        if self.response is None:
            return
        try:
            numbers = tuple(float(value) for value in self.response)
        except (TypeError, ValueError):
            numbers = (math.nan,)
        if isinstance(self.response, str) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"response must be finite numbers or None, got {self.response!r}")
        object.__setattr__(self, "response", numbers)

    @property
    def noisy(self) -> bool:
        return self.eta > 0

    def steps(self, levels: Sequence[float]) -> list[PredictorCorrectorStep]:
        corrected = max(len(levels) - 2, 0)
        response = self.response
        if response is None:
            response = tuple(prior_response(t) for t in levels[1:-1])
        elif len(response) != corrected:
            raise ValueError(
                f"response has {len(response)} numbers, but {len(levels)} noise levels above 0 "
                f"have {corrected} corrected steps between them"
            )
        steps = []
        for i, (s, t) in enumerate(pairwise(levels)):
            past = [levels[k] for k in range(i, max(i - self.order, -1), -1)]
            last = i == len(levels) - 2
            corrector = self._weights([t, *past][: max(self.order, 2)], s, t)
            descent = Descent.of(s, t, self.eta)
            steps.append(
                PredictorCorrectorStep(
                    s,
                    t,
                    predictor=descent.weights_to(self._weights(past, s, t)),
                    corrector=None if last else descent.weights_to(corrector),
                    scale=descent.scale,
                    predict_x0=True,
                    response=0.0 if last else response[i],
                    measures_trust=i == len(levels) - 3,
                    spread=descent.spread,
                )
            )
        return steps

    def _weights(self, nodes: Sequence[float], s: float, t: float) -> list[float]:
        """Return the weights of denoised images at `nodes` in the step from s to t.

        With noise those of four nodes make way for those of three.
        """
        found = modal_weights(nodes, s, t)
        few = modal_weights(nodes[:NOISY_ORDER], s, t) if self.noisy else found
        share = self.eta**2
        pairs = zip_longest(found, few, fillvalue=0.0)
        return [weight + share * (other - weight) for weight, other in pairs]
