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
from erk_guid.norms import per_sample, projection
from erk_guid.solvers.ancestral import noise_of
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
        measures_trust: whether the correction measures `Memory.trust` for the step behind it.
        spread: standard deviation of noise that is added at the end, see
            `erk_guid.solvers.ancestral`. The evaluation there sees it; prediction and correction
            are of x without it.
    """

    sigma: float
    sigma_next: float
    predictor: tuple[float, ...]
    corrector: tuple[float, ...] | None
    scale: float
    predict_x0: bool
    response: float = 0.0
    threshold: bool = False
    measures_trust: bool = False
    spread: float = 0.0

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        memory: Memory | None = None,
        noise: Tensor | None = None,
    ) -> tuple[StepResult, Memory]:
        added = noise_of(self.spread, noise, x) if self.spread else None
        nfe = 0
        if memory is None:
            memory = Memory(x, (self._evaluated(denoiser, x, self.sigma),))
            nfe = 1
        value = memory.values[0]
        if self.predict_x0:
            denoised, drift = value, (x - value) / x.new_full((), self.sigma)
        else:
            denoised, drift = x - x.new_full((), self.sigma) * value, value
        begin = Evaluation(x, self.sigma, denoised, drift)
        memory = memory._replace(x=x)  # it may have been guided
        x_next = self.predict(memory)
        if self.corrector is not None:
            at = x_next if added is None else x_next + added
            value = self._evaluated(denoiser, at, self.sigma_next)
            nfe += 1
            memory = self.correct(memory, x_next, value)
            x_next = memory.x
        if added is not None:
            x_next = x_next + added
        return StepResult(x_next, self.sigma, self.sigma_next, (begin,), nfe), memory

    def _evaluated(self, denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
        return value_of(evaluate(denoiser, x, sigma), self.predict_x0, self.threshold)

    def predict(self, memory: Memory) -> Tensor:
        """Return the point at the end of the step where the denoiser is called next.

        Where the step before measured its trust, the past counts for that share.

        Args:
            memory: where the step begins, and the values there and before, the newest first.
        """
        high = combine(memory.x, self.scale, self.predictor, memory.values)
        if memory.trust is None:
            return high
        return self._low(memory).lerp(high, per_sample(memory.trust, high))

    def _low(self, memory: Memory) -> Tensor:
        """Return the end of the step by the newest value alone."""
        return combine(memory.x, self.scale, (sum(self.predictor),), memory.values)

    def correct(self, memory: Memory, predicted: Tensor, value: Tensor) -> Memory:
        """Return the corrected end of the step, with what the next one needs.

        Args:
            memory: what `predict` was given.
            predicted: what it gave.
            value: the evaluation there.

        Raises:
            ValueError: it is the last step, which has no corrector.
        """
        if self.corrector is None:
            raise ValueError("the last step has no corrector")
        values = (value, *memory.values)
        corrected = combine(memory.x, self.scale, self.corrector, values)
        if self.response:
            moved = torch.add(value, corrected - predicted, alpha=self.response)
            values = (moved, *values[1:])
        trust = None
        if self.measures_trust:
            trust = trust_in_past(self._low(memory), predicted, corrected)
        return Memory(corrected, values[:MAX_ORDER], trust)


def trust_in_past(low: Tensor, predicted: Tensor, corrected: Tensor) -> Tensor:
    """Return which share of (predicted - low) the correction confirmed, per sample, 0 to 1, [N].

    ``<corrected - low, predicted - low> / |predicted - low|^2``, clamped; 1 where the two agree.

    Args:
        low: the end of a step by its newest value alone, [N, ...].
        predicted: the end by the past values, too.
        corrected: the end by the evaluation there.
    """
    return projection(corrected - low, predicted - low).clamp(0, 1)


def check_order(order: int, highest: int, name: str) -> None:
    """Raise ValueError unless `order` is a whole number from 1 to `highest`."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"{name} combines 1 to {highest} evaluations, got order {order!r}")
