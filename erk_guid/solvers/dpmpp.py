"""DPM-Solver++, multistep: Lu et al. 2022 (arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from erk_guid.solvers.ancestral import Descent, check_eta, raised
from erk_guid.solvers.base import Solver, Step
from erk_guid.solvers.multistep import MultistepStep, check_order


class LogSNRSolver(Solver):
    """What solvers with steps in log-SNR share."""

    @staticmethod
    def _rounded(value: float) -> float:
        """Round a log-SNR, or a step in it, to the precision that weights are computed from."""
        return value

    def _log_snrs(self, levels: Sequence[float], i: int, order: int) -> tuple[list[float], float]:
        """Return the last `order` log-SNRs at step i, the newest first, and the step's length."""
        lambdas = [self._rounded(-math.log(levels[k])) for k in range(i, i - order, -1)]
        return lambdas, self._rounded(self._rounded(-math.log(levels[i + 1])) - lambdas[0])


@dataclass(frozen=True)
class DPMpp(LogSNRSolver):
    """DPM-Solver++ multistep.

    Args:
        order: evaluations combined in a step, 1 to 3; the first steps have fewer.
        predict_x0: combine denoised images, not noise.
        lower_order_final: lower the order near the end.
        threshold: with predict_x0: limit denoised images to the range of most of their pixels, as
            the diff-sampler toolbox does.
        eta: noise in each step, from 0 (none, the ODE) to 1 (the reverse SDE); needs predict_x0.
            1 is DPM-Solver++ SDE (with order 2, 2M SDE).
    """

    order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    threshold: bool = False
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_order(self.order, 3, "dpmpp")
        check_flags(self.predict_x0, self.lower_order_final, self.threshold)
        check_eta(self.eta)
        if self.noisy and not self.predict_x0:
            raise ValueError(
                f"eta is {self.eta:g}, but predict_x0 is False: predicted noise would carry the "
                "added noise on; take predict_x0=True"
            )

    @property
    def noisy(self) -> bool:
        return self.eta > 0

    def steps(self, levels: Sequence[float]) -> list[Step]:
        steps: list[Step] = []
        orders = orders_of(self.order, self.lower_order_final, len(levels) - 1)
        for i, order in enumerate(orders):
            s, t = levels[i], levels[i + 1]
            lambdas, h = self._log_snrs(levels, i, order)
            factor = 1.0 if self.predict_x0 else -t
            weights = tuple(factor * w for w in _weights(h, lambdas, self.predict_x0))
            descent = Descent.of(s, t, self.eta)
            scale = descent.scale if self.predict_x0 else 1.0
            step = MultistepStep(
                s, descent.down, descent.weights_to(weights), scale, self.predict_x0,
                self.threshold,
            )  # fmt: skip
            steps.append(raised(descent, step))
        return steps


def check_flags(predict_x0: bool, lower_order_final: bool, threshold: bool) -> None:
    """Raise ValueError for flags that are no bool, or a threshold without denoised images."""
    flags = {
        "predict_x0": predict_x0, "lower_order_final": lower_order_final, "threshold": threshold,
    }  # fmt: skip
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if threshold and not predict_x0:
        raise ValueError("threshold limits denoised images: it needs predict_x0, which is False")


def orders_of(order: int, lower_final: bool, count: int) -> list[int]:
    """Return how many evaluations each of `count` steps combines.

    As published, the order is not lowered while it still rises, even if the end is near.
    """
    orders = []
    for i in range(count):
        left = count - i if lower_final else count
        orders.append(i + 1 if i + 1 < order else min(order, left))
    return orders


def _weights(h: float, lambdas: Sequence[float], predict_x0: bool) -> list[float]:
    """Return weights in the published form, in log-SNR steps; for data prediction ready to use."""
    sign = -1.0 if predict_x0 else 1.0
    phi1 = math.expm1(sign * h)
    lead = -phi1 if predict_x0 else phi1
    if len(lambdas) == 1:
        return [lead]
    r0 = (lambdas[0] - lambdas[1]) / h
    if len(lambdas) == 2:
        return [lead * (1 + 0.5 / r0), -lead * 0.5 / r0]
    r1 = (lambdas[1] - lambdas[2]) / h
    phi2 = phi1 / h + 1 if predict_x0 else phi1 / h - 1
    phi3 = phi2 / h - 0.5
    # Divided differences of three values, as weights of those values.
    d10, d11 = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)
    d2 = [(p - q) / (r0 + r1) for p, q in zip(d10, d11, strict=True)]
    d1 = [p + r0 * q for p, q in zip(d10, d2, strict=True)]
    curve = -phi3 if predict_x0 else phi3
    return [
        first + phi2 * p + curve * q for first, p, q in zip((lead, 0.0, 0.0), d1, d2, strict=True)
    ]
