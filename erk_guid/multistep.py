"""Multistep methods: one evaluation a step, and those of the last few steps.

All are of one kind. They add up evaluations, either drifts or denoised images:
``x' = scale * x + sum_j w_j v_j``. They differ in the weights alone, which are computed on the
host before the first step.

Sources: DEIS, Zhang and Chen 2023 (arXiv 2204.13902); iPNDM, ibid. after Liu et al. 2022;
DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095); UniPC, Zhao et al. 2023 (arXiv 2302.04867);
exponential Adams-Bashforth, Hochbruck and Ostermann 2010, called RES by Zhang et al. 2023 (arXiv
2308.02157).
Everything is written in sigma, for x that is the clean image plus sigma times noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.auto import PRIOR_RESPONSE
from erk_guid.denoisers import Denoiser
from erk_guid.flow import check_times, prior_response, step_weights
from erk_guid.guidance import Pair, norm, per_sample
from erk_guid.quadrature import lagrange_integrals, modal_weights
from erk_guid.schedules import vp_sigma_slope, vp_time
from erk_guid.steps import Evaluation, Step, StepResult, evaluate

MAX_ORDER = 4

THRESHOLD_SHARE = 0.995
"""Of the pixels of a denoised image that dynamic thresholding leaves as they are."""


def dynamic_threshold(denoised: Tensor) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Each image is clamped to its own 0.995 quantile of |D|, but to no less than 1, and divided by
    it. Made for pixels in [-1, 1]; latents are not meant to lie there.

    Args:
        denoised: [N, ...].

    Returns:
        Like `denoised`, from -1 to 1.
    """
    sizes = denoised.abs().flatten(1).to(torch.promote_types(denoised.dtype, torch.float32))
    limit = torch.quantile(sizes, THRESHOLD_SHARE, dim=1).clamp_min(1)
    limit = per_sample(limit, denoised)
    return torch.maximum(torch.minimum(denoised, limit), -limit) / limit


class History(NamedTuple):
    """What a multistep method remembers: values at past points, the newest first."""

    values: tuple[Tensor, ...]
    x: Tensor
    """The last point."""


@dataclass(frozen=True)
class MultistepStep:
    """``x' = scale * x + sum_j weights_j v_j`` with v_0 the evaluation at (x, sigma)."""

    weights: tuple[float, ...]
    scale: float = 1.0
    predict_x0: bool = False
    threshold: bool = False
    """Whether denoised images are limited by `dynamic_threshold`."""
    pair_h: float | None = None
    """Of the embedded pair, the last two points of the trajectory; None for none. The published
    program adds DEIS's correction where it subtracts the others': h is counted backwards."""
    lower: tuple[float, ...] = ()
    """The weights of the embedded method of the neighbouring order, if there is one."""

    @property
    def has_pair(self) -> bool:
        return self.pair_h is not None

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        state: History | None = None,
    ) -> tuple[StepResult, History]:
        found = evaluate(denoiser, x, sigma)
        past = state.values if state is not None else ()
        values = (_value(found, self.predict_x0, self.threshold), *past)
        pair = None
        if self.pair_h is not None and state is not None:
            pair = Pair(x, state.x, found.drift, state.values[0], self.pair_h)
        x_next = _combine(x, self.scale, self.weights, values)
        spread = (lambda: self._spread(values)) if self.lower else None
        result = StepResult(x_next, found.denoised, found.drift, 1, pair, spread)
        return result, History(values[: MAX_ORDER - 1], x)

    def _spread(self, values: Sequence[Tensor]) -> Tensor:
        apart = [a - b for a, b in zip_longest(self.weights, self.lower, fillvalue=0.0)]
        return norm(_combine(torch.zeros_like(values[0]), 1.0, apart, values))


def _value(found: Evaluation, predict_x0: bool, threshold: bool = False) -> Tensor:
    if not predict_x0:
        return found.drift
    return dynamic_threshold(found.denoised) if threshold else found.denoised


def _combine(x: Tensor, scale: float, weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = x if scale == 1 else x * scale
    for weight, value in zip(weights, values, strict=False):
        total = total + weight * value
    return total


def _check_order(order: int, highest: int, name: str, lowest: int = 1) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or not lowest <= order <= highest:
        raise ValueError(f"{name} combines {lowest} to {highest} evaluations, got order {order!r}")


_VARIABLES: dict[str, tuple[Callable[[float], float], Callable[[float], float] | None]] = {
    "tab": (vp_time, vp_sigma_slope),
    "rhoab": (float, None),
    "log": (math.log, math.exp),
}
"""Mode of DEIS to the variable that it interpolates in, and d sigma / d variable."""

DEIS_MODES = tuple(_VARIABLES)


@dataclass(frozen=True)
class DEIS:
    """DEIS: the drift, interpolated through the last `order` points, integrated over the step.

    Args:
        order: evaluations combined, 1 to 4; the first steps have fewer.
        mode: 'rhoab' interpolates in sigma, 'tab' in the time of the variance-preserving SDE
            (with sigma from 0.002 to 80 and epsilon 1e-3, whatever the run's own range), 'log' in
            log sigma, as diffusers' `DEISMultistepScheduler` does.
    """

    order: int = 4
    mode: str = "tab"
    has_pair = True
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "deis")
        if self.mode not in DEIS_MODES:
            known = " or ".join(map(repr, DEIS_MODES))
            raise ValueError(f"deis_mode must be {known}, got {self.mode!r}")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        place, density = _VARIABLES[self.mode]
        places = [place(level) for level in levels]
        steps: list[Step] = []
        for i in range(len(levels) - 1):

            def weights(order: int, i: int = i) -> tuple[float, ...]:
                if order == 1:  # published: Euler's
                    return (levels[i + 1] - levels[i],)
                nodes = [places[k] for k in range(i, i - order, -1)]
                return tuple(lagrange_integrals(nodes, places[i], places[i + 1], density))

            order = min(self.order, i + 1)
            if i == 0:
                steps.append(MultistepStep(weights(order)))
                continue
            # Below order 1 there is nothing; the distance to order 2 says the same.
            lower = weights(order - 1 if order > 1 else 2)
            pair_h = -(levels[i - 1] - levels[i])
            steps.append(MultistepStep(weights(order), pair_h=pair_h, lower=lower))
        return steps


@dataclass(frozen=True)
class IPNDM:
    """Improved PNDM: Adams-Bashforth with the weights of equal steps, the order rising from 1.

    Args:
        order: evaluations combined, 1 to 4.
    """

    order: int = 4
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "ipndm")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        steps: list[Step] = []
        for i, (s, t) in enumerate(pairwise(levels)):
            equal = [-float(k) for k in range(min(self.order, i + 1))]
            weights = [(t - s) * w for w in lagrange_integrals(equal, 0, 1)]
            steps.append(MultistepStep(tuple(weights)))
        return steps


@dataclass(frozen=True)
class IPNDMV:
    """iPNDM with variable steps, by the published weights.

    From order 3 on these are not the exact integrals of the interpolant (a bracket is misplaced
    in the published formula); DEIS with mode 'rhoab' has those.

    Args:
        order: evaluations combined, 1 to 4.
    """

    order: int = 4
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "ipndm_v")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        lengths = [t - s for s, t in pairwise(levels)]
        steps: list[Step] = []
        for i, h in enumerate(lengths):
            past = lengths[max(i - self.order + 1, 0) : i][::-1]
            steps.append(MultistepStep(tuple(h * w for w in _published_weights(h, past))))
        return steps


def _published_weights(h: float, past: Sequence[float]) -> list[float]:
    """iPNDM_v's, for a step of h after steps of past[0], past[1], ... (the latest first)."""
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


@dataclass(frozen=True)
class RES:
    """Exponential Adams-Bashforth in log sigma on denoised images; RES 2M at order 2.

    The denoised image is interpolated by a polynomial in log sigma through its last `order`
    values, and the step integrated exactly (Zhang et al. 2023, arXiv 2308.02157; ComfyUI's
    res_multistep is order 2). DPM-Solver++ differs from order 2 on by approximate integrals.

    Args:
        order: evaluations combined, 1 to 4; the first steps have fewer.
    """

    order: int = 2
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "res")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        lambdas = [-math.log(level) for level in levels]
        steps: list[Step] = []
        for i in range(len(levels) - 1):
            nodes = lambdas[max(i + 1 - self.order, 0) : i + 1][::-1]

            def decay(at: float, end: float = lambdas[i + 1]) -> float:
                return math.exp(at - end)

            weights = lagrange_integrals(nodes, lambdas[i], lambdas[i + 1], decay)
            steps.append(MultistepStep(tuple(weights), levels[i + 1] / levels[i], predict_x0=True))
        return steps


class _LogSNRSteps:
    """What steps in log-SNR share."""

    @staticmethod
    def _rounded(value: float) -> float:
        """A log-SNR, or a step in it, in the precision that the weights are computed from."""
        return value


@dataclass(frozen=True)
class DPMpp(_LogSNRSteps):
    """DPM-Solver++ multistep.

    Args:
        order: evaluations combined, 1 to 3.
        predict_x0: combine denoised images (the method's own form); False combines noise.
        lower_order_final: use fewer evaluations near the end, which steadies few steps.
        threshold: limit denoised images by `dynamic_threshold`, as the published program does.
    """

    order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    threshold: bool = False
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, 3, "dpmpp")
        _check_threshold(self)

    def plan(self, levels: Sequence[float]) -> list[Step]:
        steps: list[Step] = []
        for i, order in enumerate(_orders(self, len(levels) - 1)):
            lambdas = [self._rounded(-math.log(levels[k])) for k in range(i, i - order, -1)]
            h = self._rounded(self._rounded(-math.log(levels[i + 1])) - lambdas[0])
            scale = levels[i + 1] / levels[i] if self.predict_x0 else 1.0
            weights = _dpmpp_weights(h, lambdas, self.predict_x0)
            factor = 1.0 if self.predict_x0 else -levels[i + 1]
            weights = [factor * w for w in weights]
            steps.append(MultistepStep(tuple(weights), scale, self.predict_x0, self.threshold))
        return steps


def _check_threshold(solver: DPMpp | UniPC) -> None:
    if solver.threshold and not solver.predict_x0:
        raise ValueError("threshold limits denoised images: it needs predict_x0, which is False")


def _orders(solver: DPMpp | UniPC, count: int) -> list[int]:
    """How many evaluations each of `count` steps combines.

    As published, the order is not lowered while it still rises, even if the end is near.
    """
    orders = []
    for i in range(count):
        left = count - i if solver.lower_order_final else count
        orders.append(i + 1 if i + 1 < solver.order else min(solver.order, left))
    return orders


def _dpmpp_weights(h: float, lambdas: Sequence[float], predict_x0: bool) -> list[float]:
    """Weights in the published form, in log-SNR steps; for data prediction ready to use."""
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


@dataclass(frozen=True)
class PredictorCorrectorStep:
    """Predict, evaluate there, correct with that evaluation, and keep it for the next step."""

    predictor: tuple[float, ...]
    corrector: tuple[float, ...] | None
    """For the values from the new one on; None at the last step."""
    scale: float
    predict_x0: bool
    answer: float = 0.0
    """What part of the correction of x the value kept for the next step is moved by; 0 keeps
    the evaluation as it is, though x is no longer where it was made."""
    threshold: bool = False
    """Whether denoised images are limited by `dynamic_threshold`."""
    has_pair = False

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        state: History | None = None,
    ) -> tuple[StepResult, History]:
        evaluations = 0
        if state is None:
            values: tuple[Tensor, ...] = (self._asked(denoiser, x, sigma),)
            evaluations = 1
        else:
            values = state.values
        if self.predict_x0:
            denoised, drift = values[0], (x - values[0]) / sigma
        else:
            denoised, drift = x - sigma * values[0], values[0]
        x_next = self.predict(x, values)
        if self.corrector is not None:
            value = self._asked(denoiser, x_next, sigma_next)
            evaluations += 1
            x_next, values = self.correct(x, x_next, value, values)
        result = StepResult(x_next, denoised, drift, evaluations)
        return result, History(values[:MAX_ORDER], x)

    def _asked(self, denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
        return _value(evaluate(denoiser, x, sigma), self.predict_x0, self.threshold)

    def predict(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """The point at the end of the step where the denoiser is asked next."""
        return _combine(x, self.scale, self.predictor, values)

    def correct(
        self, x: Tensor, predicted: Tensor, value: Tensor, values: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The end of the step by the evaluation at the predicted point, and the values to keep.

        Args:
            x: where the step begins.
            predicted: what `predict` gave.
            value: the evaluation there.
            values: those before it, the newest first.
        """
        if self.corrector is None:
            raise ValueError("the last step has no corrector")
        values = (value, *values)
        corrected = _combine(x, self.scale, self.corrector, values)
        if self.answer:
            moved = torch.add(value, corrected - predicted, alpha=self.answer)
            values = (moved, *values[1:])
        return corrected, values[:MAX_ORDER]


@dataclass(frozen=True)
class UniPC(_LogSNRSteps):
    """UniPC: a multistep predictor and a corrector that costs no evaluation of its own.

    Args:
        order: evaluations the predictor combines, 1 to 4 (the corrector has one more).
        predict_x0: combine denoised images; False combines noise.
        variant: 'bh1' or 'bh2', the paper's two choices of B(h).
        lower_order_final: use fewer evaluations near the end.
        threshold: limit denoised images by `dynamic_threshold`, as the published program does.
    """

    order: int = 3
    predict_x0: bool = True
    variant: str = "bh2"
    lower_order_final: bool = True
    threshold: bool = False
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "unipc")
        _check_threshold(self)
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    def plan(self, levels: Sequence[float]) -> list[Step]:
        count = len(levels) - 1
        steps: list[Step] = []
        for i, order in enumerate(_orders(self, count)):
            lambdas = [self._rounded(-math.log(levels[k])) for k in range(i, i - order, -1)]
            h = self._rounded(self._rounded(-math.log(levels[i + 1])) - lambdas[0])
            predictor, corrector = self._weights(h, [(lam - lambdas[0]) / h for lam in lambdas])
            factor = 1.0 if self.predict_x0 else levels[i + 1]
            # The last step is not corrected, but (as published) where the order is still rising.
            corrects = i < count - 1 or count < self.order
            steps.append(
                PredictorCorrectorStep(
                    predictor=tuple(-factor * w for w in predictor),
                    corrector=tuple(-factor * w for w in corrector) if corrects else None,
                    scale=levels[i + 1] / levels[i] if self.predict_x0 else 1.0,
                    predict_x0=self.predict_x0,
                    threshold=self.threshold,
                )
            )
        return steps

    def _weights(self, h: float, places: Sequence[float]) -> tuple[list[float], list[float]]:
        """Predictor's and corrector's, for values at `places` (0, then -h0 / h, ...) and at 1."""
        order = len(places)
        hh = -h if self.predict_x0 else h
        phi = [self._rounded(math.expm1(hh))]  # times hh: the first of the phi functions
        lead = phi[0]
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
        torch.tensor(matrix, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    ).tolist()
    return solution


@dataclass(frozen=True)
class Modal:
    """Ours: predictor and corrector fitted to Gaussian modes, one evaluation a step.

    Where other methods interpolate by polynomials in some variable, the weights here are those
    with the least mean squared error over Gaussian data of all sizes
    (`erk_guid.quadrature.modal_weights`). The corrector reuses the evaluation at the predicted
    point, as UniPC's does; then the kept value is moved by half of the correction, which is what
    a denoiser answers on the average over those modes, where others leave it at the point that
    was given up. No evaluation is spent on any of it.

    Args:
        order: evaluations combined, 1 to 4; the first steps have fewer.
        flow: the model is a flow-matching one, and levels are times: see `erk_guid.flow`.
    """

    order: int = 4
    flow: bool = False
    has_pair = False
    blends = False

    def __post_init__(self) -> None:
        _check_order(self.order, MAX_ORDER, "modal")

    def plan(self, levels: Sequence[float]) -> list[PredictorCorrectorStep]:
        weights = step_weights if self.flow else modal_weights
        if self.flow:
            check_times(levels)
        steps = []
        for i, (s, t) in enumerate(pairwise(levels)):
            past = [levels[k] for k in range(i, max(i - self.order, -1), -1)]
            last = i == len(levels) - 2
            # A flow's x is 1 - t times clean data plus sigma noise.
            share = 1 - t if self.flow else 1.0
            predictor = weights(past, s, t)
            corrector = weights([t, *past][: max(self.order, 2)], s, t)
            steps.append(
                PredictorCorrectorStep(
                    predictor=tuple(share * w for w in predictor),
                    corrector=None if last else tuple(share * w for w in corrector),
                    scale=t / s,
                    predict_x0=True,
                    answer=(prior_response(t) if self.flow else PRIOR_RESPONSE) / share,
                )
            )
        return steps
