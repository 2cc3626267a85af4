"""ERK-Guid: what an embedded pair of solutions says about stiffness, and the correction.

Kong, Lee, Hong, Kim, "Error as Signal: Stiffness-Aware Diffusion Sampling via Embedded
Runge-Kutta Guidance", ICLR 2026 (arXiv 2603.03692). Two solutions of different order at one
noise level, x_high and x_low, differ along the direction in which the step erred; the drifts
there, f_high and f_low, differ by the Jacobian applied to that. So

    rho = |f_high - f_low| / |x_high - x_low|      estimates the dominant |eigenvalue|,
    v   = (f_high - f_low) / |f_high - f_low|      its eigenvector,

and the step is corrected along v where rho exceeds a threshold.

Everything here is per sample, over all dimensions but the first, for tensors of any shape
[N, ...]. Norms accumulate in float32 at least, whatever the dtype of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

AUTO = "auto"
"""The word for the parameter-free form."""

GATES = ("stiffness", "step")
"""What w_con is compared with: rho, as published, or h rho, which has no unit."""

EPS = 1e-8
"""Added to norms before dividing by them, as in the published program."""

PAPER_SETTINGS = {8: (0.5, 0.1), 16: (0.75, 0.3), 32: (1.0, 0.5)}
"""Steps to (w_stiff, w_con) of the paper's EDM2-S runs (tables 2 and 3)."""


@dataclass(frozen=True)
class Guidance:
    """Settings of ERK guidance.

    Args:
        w_stiff: strength; 0 switches the correction off. 1/sqrt(6) = 0.408 cancels Heun's
            leading error on a linear mode, the paper uses 0.5 (8 steps) to 2.5 (32 steps).
        w_con: the correction acts where the stiffness exceeds this. Its unit is 1/sigma, so
            0.5 acts mainly below sigma = 2 in EDM's units.
        form: "published", or "auto" for the parameter-free form (`Guidance.auto`), which takes no
            numbers: they must be left at their defaults.
        bound: the correction is at most this times the distance between the step's solution and
            the one of lower order embedded in it, which is what the step has reason to doubt.
            On a linear mode with z = h lambda the error of Heun's step is about z / 3 of that
            distance, so a correction beyond 0.2 of it supposes z above 0.6, where the expansion
            it rests on no longer holds. None, as published, lets it grow without limit.
        gate: "stiffness" compares w_con with rho, as published: in units of 1/sigma, so that a
            setting does not carry over between EDM's sigma, latents of another scale and the
            times of flow matching. "step" compares it with h rho, h being the step's length: a
            pure number, which does.

    Raises:
        ValueError: a value is not a finite number, or negative, or stands beside the form "auto";
            the message names it.
    """

    w_stiff: float = 0.0
    w_con: float = 0.5
    form: str = "published"
    bound: float | None = None
    gate: str = GATES[0]

    def __post_init__(self) -> None:
        if self.form not in ("published", AUTO):
            raise ValueError(f"form must be 'published' or {AUTO!r}, got {self.form!r}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be {' or '.join(map(repr, GATES))}, got {self.gate!r}")
        for name in ("w_stiff", "w_con", "bound"):
            value = getattr(self, name)
            if name == "bound" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        if self.form == AUTO:
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name != "form" and value != field.default:
                    raise ValueError(
                        f"{field.name} {value!r} has no part in the parameter-free form "
                        f"({AUTO!r}); leave it out, or give w_stiff a number"
                    )

    @property
    def active(self) -> bool:
        """Whether there is anything to correct."""
        return self.blends or self.w_stiff > 0

    @property
    def blends(self) -> bool:
        """Whether it is the parameter-free form."""
        return self.form == AUTO

    @classmethod
    def auto(cls) -> Guidance:
        """The parameter-free form, for Heun and DPM-Solver-2; see `erk_guid.auto`.

        Not the paper's method, but built on its idea.
        """
        return cls(form=AUTO)

    @classmethod
    def of(
        cls,
        w_stiff: float | str,
        w_con: float | None = None,
        bound: float | None = None,
        gate: str = GATES[0],
    ) -> Guidance:
        """Settings as users write them: numbers, or "auto" for the first; None is a default.

        Raises:
            ValueError: see `Guidance`.
        """
        w_con = cls.w_con if w_con is None else w_con
        if isinstance(w_stiff, str):
            if w_stiff != AUTO:
                raise ValueError(f"w_stiff must be a number or {AUTO!r}, got {w_stiff!r}")
            return cls(w_con=w_con, form=AUTO, bound=bound, gate=gate)
        return cls(w_stiff, w_con, bound=bound, gate=gate)

    @classmethod
    def paper(cls, num_steps: int) -> Guidance:
        """The paper's settings for the nearest step count it reports (the smaller on a tie)."""
        return cls(*PAPER_SETTINGS[nearest_paper_steps(num_steps)])


def nearest_paper_steps(num_steps: int) -> int:
    """The step count of `PAPER_SETTINGS` nearest to `num_steps`."""
    return min(PAPER_SETTINGS, key=lambda steps: (abs(steps - num_steps), steps))


class Pair(NamedTuple):
    """An embedded pair: two solutions, the drifts there, and the step to be corrected.

    ``correction(*pair, guidance)`` is what guidance adds.
    """

    x_high: Tensor
    x_low: Tensor
    f_high: Tensor
    f_low: Tensor
    h: Tensor | float


class Measurement(NamedTuple):
    """What a pair says, per sample, each [N] in float32 or better."""

    stiffness: Tensor
    """rho, in units of 1/sigma."""
    gate: Tensor
    """bool: whether rho (or h rho) exceeds w_con."""
    coefficient: Tensor
    """The correction is this times (f_high - f_low)."""
    size: Tensor
    """Euclidean norm of the correction."""


def stiffness(x_high: Tensor, x_low: Tensor, f_high: Tensor, f_low: Tensor) -> Tensor:
    """Estimate of the dominant |eigenvalue| of the drift's Jacobian (arXiv 2603.03692).

    Args:
        x_high, x_low: solutions of different order, [N, ...].
        f_high, f_low: the drifts dx/dsigma there, like x.

    Returns:
        [N], in float32 or better, unit 1/sigma; 0 where the two solutions and drifts agree.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(x_high, x_low, f_high, f_low)
    return norm(f_high - f_low) / (norm(x_high - x_low) + EPS)


def dominant_eigenvector(f_high: Tensor, f_low: Tensor) -> Tensor:
    """Estimate of the dominant eigenvector: the normalized difference of the drifts.

    Args:
        f_high, f_low: drifts at the two solutions, [N, ...].

    Returns:
        Like f; of length 1 per sample, or 0 where the drifts agree. Its sign is arbitrary.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(f_high, f_low)
    df = f_high - f_low
    return df / per_sample(norm(df) + EPS, df)


def correction(
    x_high: Tensor,
    x_low: Tensor,
    f_high: Tensor,
    f_low: Tensor,
    h: Tensor | float,
    guidance: Guidance,
    spread: Tensor | None = None,
) -> Tensor:
    """What guidance ADDS to the high-order solution of a Heun or DPM-Solver-2 step.

    ``-h [rho > w_con] (w_stiff h rho)^2 <v, f_high> v``: the paper's minus sign is inside.

    Args:
        x_high, x_low: solutions of different order, [N, ...].
        f_high, f_low: the drifts there; `f_high` is also the one whose projection is removed.
        h: length of the step that is corrected, sigma - sigma_next > 0: a number or [N].
        guidance: the settings.
        spread: [N], how far the step's solution is from the embedded one of lower order
            (`StepResult.spread`); needed if the settings have a bound.

    Returns:
        Like x; exactly 0 where the gate is shut or the pair agrees.

    Raises:
        ValueError: the shapes differ, a bound without `spread`, or settings of the parameter-free
            form, which is no correction of a pair (`erk_guid.sample` computes it).
    """
    _check_shapes(x_high, x_low, f_high, f_low)
    if guidance.blends:
        raise ValueError(
            "the parameter-free form is not a correction that a pair decides; erk_guid.sample "
            "computes it, and in a loop of your own result.embedded.solution() is the step's "
            "solution in that form"
        )
    if isinstance(h, Tensor) and h.ndim and h.shape != x_high.shape[:1]:
        raise ValueError(f"h must be a number or [{len(x_high)}], got shape {list(h.shape)}")
    df = f_high - f_low
    measured = measure(Pair(x_high, x_low, f_high, f_low, h), guidance, df, spread)
    return df * per_sample(measured.coefficient, df)


def measure(
    pair: Pair, guidance: Guidance, df: Tensor | None = None, spread: Tensor | None = None
) -> Measurement:
    """Stiffness, gate and size of the correction for `pair` (`df`: its drift difference).

    Raises:
        ValueError: a bound without `spread`, which it is a multiple of.
    """
    if guidance.bound is not None and spread is None:
        raise ValueError(
            "a bound is a multiple of spread, the distance between the step's solution and the "
            "embedded one of lower order: give spread, e.g. spread=result.spread()"
        )
    x_high, x_low, f_high, f_low, h = pair
    if df is None:
        df = f_high - f_low
    f_norm = norm(df)
    rho = f_norm / (norm(x_high - x_low) + EPS)
    if isinstance(h, Tensor):
        h = h.to(rho)
    gate = gauge(rho, h, guidance.gate) > guidance.w_con
    # <v, f> v = <df, f> df / (|df| + eps)^2, divided twice so that tiny norms do not underflow.
    along = inner(df, f_high) / (f_norm + EPS) / (f_norm + EPS)
    # where, not a product: a shut gate gives 0 even if the other factor overflowed.
    coefficient = torch.where(
        gate, -h * (guidance.w_stiff * h * rho) ** 2 * along, torch.zeros_like(rho)
    )
    size = coefficient.abs() * f_norm
    if guidance.bound is not None and spread is not None:
        largest = guidance.bound * spread.to(size)
        excess = size > largest
        # Not a quotient of sizes: those may be 0, or have overflowed.
        held = largest / torch.where(excess, f_norm, torch.ones_like(f_norm))
        coefficient = torch.where(excess, torch.copysign(held, coefficient), coefficient)
        size = torch.where(excess, largest, size)
    return Measurement(rho, gate, coefficient, size)


def gauge(rho: Tensor, h: Tensor | float, gate: str) -> Tensor:
    """What `gate` compares w_con with: rho or h rho, [N]."""
    # DEIS counts its step backwards: the sign of h says nothing here.
    return rho if gate == "stiffness" else (h * rho).abs()


def guide(
    x: Tensor, pair: Pair, guidance: Guidance, spread: Tensor | None = None
) -> tuple[Tensor, Measurement]:
    """``x + correction(*pair, guidance, spread)``, and what was measured on the way."""
    df = pair.f_high - pair.f_low
    measured = measure(pair, guidance, df, spread)
    return torch.addcmul(x, per_sample(measured.coefficient, df), df), measured


def norm(x: Tensor) -> Tensor:
    """Euclidean norm per sample, [N], accumulated in float32 at least."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=_accumulator(x))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample, [N], accumulated in float32 at least."""
    dtype = _accumulator(a)
    return torch.linalg.vecdot(a.flatten(1).to(dtype), b.flatten(1).to(dtype))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] values shaped to multiply `like` [N, ...], in its dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(*tensors: Tensor) -> None:
    shapes = [list(t.shape) for t in tensors]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2:
        raise ValueError(
            "the solutions and drifts of a pair must share one shape [N, ...], got "
            + ", ".join(map(str, shapes))
        )
