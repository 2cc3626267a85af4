r"""ERK-Guid, the published form of guidance.

.. math::
    x' = x_{step} - h\,[\rho > w_{con}]\,(w_{stiff}\,h\,\rho)^2\,\langle v, f_{high}\rangle\,v,
    \qquad \rho = \frac{|f_{high} - f_{low}|}{|x_{high} - x_{low}|},
    \qquad v = \frac{f_{high} - f_{low}}{|f_{high} - f_{low}|}

Kong, Lee, Hong, Kim, "Error as Signal: Stiffness-Aware Diffusion Sampling via Embedded
Runge-Kutta Guidance", ICLR 2026 (arXiv 2603.03692). (The published program for DEIS adds the
correction; `Pair.sign` says so.) Two solutions of different order at one noise
level, x_high and x_low, differ along the direction in which the step erred. The drifts there,
f_high and f_low, differ by the Jacobian applied to that. So rho estimates the dominant
\|eigenvalue\| of the Jacobian and v its eigenvector. The step is corrected along v where rho
exceeds a threshold.

Everything is per sample, over all dimensions but the first, for tensors of any shape [N, ...].
Norms accumulate in float32 at least, whatever the dtype of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from erk_guid.guidance.base import Guided
from erk_guid.norms import inner, norm, per_sample, scaled
from erk_guid.solvers import name_of, names_of_solvers
from erk_guid.solvers.base import Pair, Solver, StepResult

Gate = Literal["stiffness", "step"]

EPS = 1e-8
"""Added to norms before dividing by them, as in the published program."""

PAPER_SETTINGS = {8: (0.5, 0.1), 16: (0.75, 0.3), 32: (1.0, 0.5)}
"""Steps to (w_stiff, w_con) of the paper's EDM2-S runs (tables 2 and 3)."""


class Measurement(NamedTuple):
    """What a pair says, per sample, each [N] in float32 or better.

    Attributes:
        stiffness: rho, in units of 1/sigma.
        gate: bool, whether rho (or h rho) exceeds w_con.
        coefficient: the correction is this times (f_high - f_low).
        size: Euclidean norm of the correction.
    """

    stiffness: Tensor
    gate: Tensor
    coefficient: Tensor
    size: Tensor


@dataclass(frozen=True)
class ERKGuidance:
    """The paper's correction, with a strength and a threshold.

    The bound, which is ours, rests on this: on a linear mode with z = h lambda the error of Heun's
    step is about z / 3 of the distance to the embedded solution of lower order. A correction beyond
    0.2 of it supposes z above 0.6, where the expansion it rests on no longer holds.

    Args:
        w_stiff: strength; 0 switches the correction off. 1/sqrt(6) = 0.408 cancels Heun's
            leading error on a linear mode, the paper uses 0.5 (8 steps) to 2.5 (32 steps).
        w_con: stiffness above which the correction acts. Its unit is 1/sigma, so that 0.5 acts
            mainly below sigma = 2 in EDM's units.
        gate: what w_con is compared with. 'stiffness': rho, in units of 1/sigma, as published.
            'step': rho times the step's length, a number without unit that carries over between
            models.
        bound: largest correction, as a multiple of the distance between the step's solution and
            the embedded one of lower order. 0.2 ends runaway samples. None, as published, sets no
            limit.

    Raises:
        ValueError: a value that is negative or not a finite number; the message names it.
    """

    w_stiff: float = 0.0
    w_con: float = 0.5
    gate: Gate = "stiffness"
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.gate not in get_args(Gate):
            known = " or ".join(map(repr, get_args(Gate)))
            raise ValueError(f"gate must be {known}, got {self.gate!r}")
        for name in ("w_stiff", "w_con", "bound"):
            value = getattr(self, name)
            if name == "bound" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if float(value) < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")

    @classmethod
    def paper(cls, num_steps: int) -> ERKGuidance:
        """Return the paper's settings for the nearest step count it reports (smaller on a tie)."""
        return cls(*PAPER_SETTINGS[nearest_paper_steps(num_steps)])

    @property
    def active(self) -> bool:
        """True if the strength is above 0."""
        return self.w_stiff > 0

    def check(self, solver: Solver) -> None:
        """Refuse a solver without a pair.

        Raises:
            ValueError: naming the solvers that have one.
        """
        if self.active and not solver.has_pair:
            raise ValueError(
                f"the solver {name_of(solver)!r} has no embedded pair to guide with (w_stiff "
                f"{self.w_stiff}); solvers that have one: "
                f"{', '.join(names_of_solvers(has_pair=True))}"
            )

    def __call__(self, result: StepResult) -> Guided:
        """Return the corrected solution of a step.

        Raises:
            ValueError: there is a bound, and the step has no embedded solution of lower order.
        """
        if result.pair is None:
            return Guided(result.x)
        if not self.active:
            seen = replace(self, bound=None).measure(result.pair)
            return Guided(result.x, seen.stiffness, seen.gate, seen.size)
        x_error = None
        if self.bound is not None and result.x_error is not None:
            x_error = result.x_error()
        df = result.pair.f_high - result.pair.f_low
        seen = self.measure(result.pair, x_error, df)
        x = torch.addcmul(result.x, per_sample(seen.coefficient, df), df)
        return Guided(x, seen.stiffness, seen.gate, seen.size)

    def correction(self, pair: Pair, x_error: Tensor | None = None) -> Tensor:
        """Return what guidance ADDS to the solution of a step; the paper's minus sign is inside.

        Args:
            pair: the two points and the length of the step.
            x_error: difference to the embedded solution of lower order, like x
                (`StepResult.x_error`); needed if there is a bound.

        Returns:
            Like x; exactly 0 where the gate is shut or the two points agree.

        Raises:
            ValueError: the shapes differ, or a bound without `x_error`.
        """
        _check_shapes(*pair[:4])
        if isinstance(pair.h, Tensor) and pair.h.ndim and pair.h.shape != pair.x_high.shape[:1]:
            raise ValueError(
                f"h must be a number or [{len(pair.x_high)}], got shape {list(pair.h.shape)}"
            )
        df = pair.f_high - pair.f_low
        return df * per_sample(self.measure(pair, x_error, df).coefficient, df)

    def measure(
        self, pair: Pair, x_error: Tensor | None = None, df: Tensor | None = None
    ) -> Measurement:
        """Return stiffness, gate and size of the correction.

        Args:
            pair, x_error: see `correction`.
            df: f_high - f_low, where the caller has it already.

        Raises:
            ValueError: a bound without `x_error`, which it is a multiple of.
        """
        if self.bound is not None and x_error is None:
            raise ValueError(
                f"bound {self.bound:g} is a multiple of the distance between the step's solution "
                "and the embedded one of lower order, and this step has none (StepResult.x_error)"
            )
        if df is None:
            df = pair.f_high - pair.f_low
        f_norm, along = _along(df, pair.f_high)
        rho = f_norm / (norm(pair.x_high - pair.x_low) + EPS)
        h = pair.h.to(rho) if isinstance(pair.h, Tensor) else pair.h
        gate = self.reading(rho, h) > self.w_con
        size_squared = (self.w_stiff * h * rho) ** 2
        # where, not a product: a shut gate gives 0 even if the other factor overflowed.
        coefficient = torch.where(
            gate, -pair.sign * h * size_squared * along, torch.zeros_like(rho)
        )
        size = coefficient.abs() * f_norm
        if self.bound is not None and x_error is not None:
            largest = self.bound * norm(x_error).to(size)
            excess = size > largest
            # Not a quotient of sizes: those may be 0, or have overflowed.
            held = largest / torch.where(excess, f_norm, torch.ones_like(f_norm))
            coefficient = torch.where(excess, torch.copysign(held, coefficient), coefficient)
            size = torch.where(excess, largest, size)
        return Measurement(rho, gate, coefficient, size)

    def reading(self, rho: Tensor, h: Tensor | float) -> Tensor:
        """Return what the gate compares with w_con: rho or h rho, [N]."""
        return rho if self.gate == "stiffness" else h * rho


def _along(df: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Return |df| and the multiple of df that <v, f> v is, <df, f> / (|df| + EPS)^2, each [N]."""
    direction = scaled(df)
    size = direction.norm()
    length = size + EPS
    # Divided twice: the square of a length may be out of range.
    return size, inner(direction.values, f) / (length / direction.unit) / length


def nearest_paper_steps(num_steps: int) -> int:
    """Return the step count of `PAPER_SETTINGS` nearest to `num_steps`."""
    return min(PAPER_SETTINGS, key=lambda steps: (abs(steps - num_steps), steps))


def stiffness(x_high: Tensor, x_low: Tensor, f_high: Tensor, f_low: Tensor) -> Tensor:
    """Estimate the dominant |eigenvalue| of the drift's Jacobian (arXiv 2603.03692).

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
    """Estimate the dominant eigenvector: the normalized difference of the drifts.

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


def _check_shapes(*tensors: Tensor) -> None:
    shapes = [list(t.shape) for t in tensors]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2:
        raise ValueError(
            "the solutions and drifts of a pair must share one shape [N, ...], got "
            + ", ".join(map(str, shapes))
        )
