"""UniPC: Zhao et al. 2023 (arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from erk_guid.solvers.dpmpp import LogSNRSolver, check_flags, orders_of
from erk_guid.solvers.multistep import MAX_ORDER, PredictorCorrectorStep, check_order

Variant = Literal["bh1", "bh2"]


@dataclass(frozen=True)
class UniPC(LogSNRSolver):
    """UniPC: a multistep predictor and a corrector that costs no evaluation of its own.

    Args:
        order: evaluations combined in a step, 1 to 4; the first steps have fewer.
        predict_x0: combine denoised images, not noise.
        variant: the paper's two choices of B(h).
        lower_order_final: lower the order near the end.
        threshold: with predict_x0: limit denoised images to the range of most of their pixels, as
            the diff-sampler toolbox does.
    """

    order: int = 3
    predict_x0: bool = True
    variant: Variant = "bh2"
    lower_order_final: bool = True
    threshold: bool = False

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "unipc")
        check_flags(self.predict_x0, self.lower_order_final, self.threshold)
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    def steps(self, levels: Sequence[float]) -> list[PredictorCorrectorStep]:
        count = len(levels) - 1
        steps = []
        for i, order in enumerate(orders_of(self.order, self.lower_order_final, count)):
            lambdas, h = self._log_snrs(levels, i, order)
            predictor, corrector = self._weights(h, [(lam - lambdas[0]) / h for lam in lambdas])
            factor = 1.0 if self.predict_x0 else levels[i + 1]
            # The last step is not corrected, but (as published) where the order is still rising.
            corrects = i < count - 1 or count < self.order
            steps.append(
                PredictorCorrectorStep(
                    levels[i],
                    levels[i + 1],
                    predictor=tuple(-factor * w for w in predictor),
                    corrector=tuple(-factor * w for w in corrector) if corrects else None,
                    scale=levels[i + 1] / levels[i] if self.predict_x0 else 1.0,
                    predict_x0=self.predict_x0,
                    threshold=self.threshold,
                )
            )
        return steps

    def _weights(self, h: float, places: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return predictor's and corrector's, for values at `places` (0, -h0 / h, ...) and at 1."""
        order = len(places)
        hh = -h if self.predict_x0 else h
        lead = self._rounded(math.expm1(hh))  # hh times the first of the phi functions
        b_h = hh if self.variant == "bh1" else lead
        at = [*places[1:], 1.0]
        rows, right = [], []
        term, factorial = lead / hh - 1, 1.0
        for k in range(order):
            rows.append([place**k for place in at])
            right.append(term * factorial / b_h)
            factorial *= k + 2
            term = term / hh - 1 / factorial
        # Published: the first two of each are one half, not solved for.
        rho_p = [0.5] if order == 2 else _solve([r[:-1] for r in rows[:-1]], right[:-1])
        rho_c = [0.5] if order == 1 else _solve(rows, right)
        predictor = [lead, *(b_h * rho / place for rho, place in zip(rho_p, at, strict=False))]
        predictor[0] -= sum(predictor[1:])
        later = [b_h * rho / place for rho, place in zip(rho_c, at, strict=True)]
        # The corrector's values begin with the new one, at place 1.
        corrector = [later[-1], lead - sum(later), *later[:-1]]
        return predictor, corrector


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    if not right:
        return []
    solution: list[float] = torch.linalg.solve(
        torch.tensor(matrix, dtype=torch.float64, device="cpu"),
        torch.tensor(right, dtype=torch.float64, device="cpu"),
    ).tolist()
    return solution
