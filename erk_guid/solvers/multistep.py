"""What multistep methods share: one evaluation a step, combined with those of past steps.

All add up evaluations, either drifts or denoised images: ``x' = scale x + sum_j w_j v_j``. They
differ in the weights alone, which are computed on the host before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from erk_guid.denoisers import Denoiser
from erk_guid.norms import per_sample
from erk_guid.solvers.base import Evaluation, Memory, Pair, StepResult, evaluate

MAX_ORDER = 4
"""Evaluations that a multistep method combines, at most."""

THRESHOLD_SHARE = 0.995
"""Share of the pixels that dynamic thresholding leaves unchanged."""


def dynamic_threshold(denoised: Tensor) -> Tensor:
    """Limit denoised images (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Each image is clamped to its own 0.995 quantile of |D|, but to no less than 1, and divided by
    it. This is for pixels in [-1, 1]. Latents have another range.

    Args:
        denoised: [N, ...].

    Returns:
        Like `denoised`, from -1 to 1.
    """
    sizes = denoised.abs().flatten(1).to(torch.promote_types(denoised.dtype, torch.float32))
    limit = torch.quantile(sizes, THRESHOLD_SHARE, dim=1).clamp_min(1)
    limit = per_sample(limit, denoised)
    return torch.maximum(torch.minimum(denoised, limit), -limit) / limit


@dataclass(frozen=True)
class MultistepStep:
    """``x' = scale x + sum_j weights_j v_j`` with v_0 the evaluation at (x, sigma).

    Args:
        sigma, sigma_next: the interval.
        weights: of the values, the newest first.
        scale: of x.
        predict_x0: whether the values are denoised images, or drifts.
        threshold: whether denoised images are limited by `dynamic_threshold`.
        lower: weights of the embedded method of the neighbouring order; empty for none.
        pair_h: length of the step from the last point to this one, where those two points are a
            pair to guide with; None for no pair.
    """

    sigma: float
    sigma_next: float
    weights: tuple[float, ...]
    scale: float = 1.0
    predict_x0: bool = False
    threshold: bool = False
    lower: tuple[float, ...] = ()
    pair_h: float | None = None

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, Memory]:
        found = evaluate(denoiser, x, self.sigma)
        past = memory.values if memory is not None else ()
        values = (value_of(found, self.predict_x0, self.threshold), *past)
        pair = None
        if self.pair_h is not None and memory is not None:
            # The published program adds the correction here: it counts this step backwards.
            pair = Pair(
                x, memory.x, found.drift, memory.values[0], self.pair_h, sign=-1, one_level=False
            )
        x_next = combine(x, self.scale, self.weights, values)
        x_error = (lambda: self._x_error(values)) if self.lower else None
        result = StepResult(
            x_next, self.sigma, self.sigma_next, (found,), 1, pair=pair, x_error=x_error
        )
        return result, Memory(x, values[: MAX_ORDER - 1])

    def _x_error(self, values: Sequence[Tensor]) -> Tensor:
        apart = [a - b for a, b in zip_longest(self.weights, self.lower, fillvalue=0.0)]
        return combine(torch.zeros_like(values[0]), 1.0, apart, values)


def value_of(found: Evaluation, predict_x0: bool, threshold: bool = False) -> Tensor:
    """Return what the method combines of an evaluation: the denoised image, or the drift."""
    if not predict_x0:
        return found.drift
    return dynamic_threshold(found.denoised) if threshold else found.denoised


def combine(x: Tensor, scale: float, weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return ``scale x + sum_j weights_j values_j``, as far as there are both."""
    total = x if scale == 1 else x * scale
    for weight, value in zip(weights, values, strict=False):
        total = total + weight * value
    return total


@dataclass(frozen=True)
class PredictorCorrectorStep:
    """Predict, evaluate there, correct with that evaluation, and keep it for the next step.

    Args:
        sigma, sigma_next: the interval.
        predictor: weights of the values, the newest first.
        corrector: weights of the values from the new one on; None at the last step.
        scale: of x.
        predict_x0: whether the values are denoised images, or drifts.
        response: fraction of (corrected - predicted) added to the value that is kept for the next
            step; 0 leaves it unchanged, though x has moved.
        threshold: whether denoised images are limited by `dynamic_threshold`.
    """

    sigma: float
    sigma_next: float
    predictor: tuple[float, ...]
    corrector: tuple[float, ...] | None
    scale: float
    predict_x0: bool
    response: float = 0.0
    threshold: bool = False

    def __call__(
        self, denoiser: Denoiser, x: Tensor, memory: Memory | None = None
    ) -> tuple[StepResult, Memory]:
        nfe = 0
        if memory is None:
            values: tuple[Tensor, ...] = (self._evaluated(denoiser, x, self.sigma),)
            nfe = 1
        else:
            values = memory.values
        if self.predict_x0:
            denoised, drift = values[0], (x - values[0]) / x.new_full((), self.sigma)
        else:
            denoised, drift = x - x.new_full((), self.sigma) * values[0], values[0]
        begin = Evaluation(x, self.sigma, denoised, drift)
        x_next = self.predict(x, values)
        if self.corrector is not None:
            value = self._evaluated(denoiser, x_next, self.sigma_next)
            nfe += 1
            x_next, values = self.correct(x, x_next, value, values)
        result = StepResult(x_next, self.sigma, self.sigma_next, (begin,), nfe)
        return result, Memory(x, values[:MAX_ORDER])

    def _evaluated(self, denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
        return value_of(evaluate(denoiser, x, sigma), self.predict_x0, self.threshold)

    def predict(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Return the point at the end of the step where the denoiser is called next."""
        return combine(x, self.scale, self.predictor, values)

    def correct(
        self, x: Tensor, predicted: Tensor, value: Tensor, values: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the corrected end of the step, and the values to keep.

        Args:
            x: where the step begins.
            predicted: what `predict` gave.
            value: the evaluation there.
            values: those before it, the newest first.

        Raises:
            ValueError: it is the last step, which has no corrector.
        """
        if self.corrector is None:
            raise ValueError("the last step has no corrector")
        values = (value, *values)
        corrected = combine(x, self.scale, self.corrector, values)
        if self.response:
            moved = torch.add(value, corrected - predicted, alpha=self.response)
            values = (moved, *values[1:])
        return corrected, values[:MAX_ORDER]


def check_order(order: int, highest: int, name: str) -> None:
    """Raise ValueError unless `order` is a whole number from 1 to `highest`."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"{name} combines 1 to {highest} evaluations, got order {order!r}")
