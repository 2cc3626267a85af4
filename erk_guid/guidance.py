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
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

AUTO = "auto"
"""The word for the parameter-free form."""

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
        form: "published", or "auto" for the parameter-free form (`Guidance.auto`), in which the
            two numbers play no part.

    Raises:
        ValueError: a value is not a finite number, or negative; the message names it.
    """

    w_stiff: float = 0.0
    w_con: float = 0.5
    form: str = "published"

    def __post_init__(self) -> None:
        if self.form not in ("published", AUTO):
            raise ValueError(f"form must be 'published' or {AUTO!r}, got {self.form!r}")
        for name in ("w_stiff", "w_con"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")

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
        """The parameter-free form: the pair blended by the measured response of the denoiser.

        For Heun and DPM-Solver-2; see `blend_weight`. Not the paper's method, but built on its
        idea.
        """
        return cls(form=AUTO)

    @classmethod
    def of(cls, w_stiff: float | str, w_con: float) -> Guidance:
        """Settings as users write them: two numbers, or "auto" for the first.

        Raises:
            ValueError: see `Guidance`.
        """
        if isinstance(w_stiff, str):
            if w_stiff != AUTO:
                raise ValueError(f"w_stiff must be a number or {AUTO!r}, got {w_stiff!r}")
            return cls.auto()
        return cls(w_stiff, w_con)

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
    """bool: whether rho exceeds w_con."""
    coefficient: Tensor
    """The correction is this times (f_high - f_low)."""
    size: Tensor
    """Euclidean norm of the correction."""


class Embedded(NamedTuple):
    """What the parameter-free form blends: the lower-order end of a two-stage step, and its stages.

    The step went from sigma to sigma_next with a second evaluation at the node, a point of
    Euler's line at noise level ``node * sigma``.
    """

    x_low: Tensor
    """Euler's solution at sigma_next."""
    f: Tensor
    """The drift at sigma."""
    f_node: Tensor
    """The drift at the node."""
    ratio: Tensor
    """sigma_next / sigma, without dimensions."""
    node: Tensor
    """Noise level of the node over sigma, without dimensions."""
    weight_node: float
    """What the high-order slope takes of f_node; it takes 1 - this of f."""
    companion: Pair | None = None
    """A pair at sigma itself, from the step before, if there is one."""


def response_of_pair(pair: Pair, sigma: Tensor) -> Tensor:
    """How the denoiser answers along a pair at noise level `sigma`: <dD, dx> / <dx, dx>, [N].

    0 where it does not move, 1 where it follows x; on a Gaussian mode of deviation s it is
    s^2 / (s^2 + sigma^2). Clipped to [0, 1]; 1 where the pair agrees.
    """
    dx = pair.x_high - pair.x_low
    size = _inner(dx, dx)
    dd = size - sigma.to(size) * _inner(pair.f_high - pair.f_low, dx)
    return torch.where(size > 0, dd / size.clamp_min(_tiny(size)), 1).clamp(0, 1)


def response_in_step(f: Tensor, f_node: Tensor, node: Tensor) -> Tensor:
    """The same response from one step's two drifts, [N], when there is no pair at sigma.

    On a Gaussian mode with response mu at sigma, the drift at the node is q times that at sigma,
    q = node (mu + (1 - mu) node) / (mu + (1 - mu) node^2), wherever the mode is centred: a
    linear equation for mu. Measured along the drift itself.
    """
    size = _inner(f, f)
    node = node.to(size)
    q = torch.where(size > 0, _inner(f_node, f) / size.clamp_min(_tiny(size)), 1)
    q = torch.minimum(torch.maximum(q, node), torch.ones_like(q))
    return (node**2 * (1 - q) / (q * (1 - node**2) - node * (1 - node))).clamp(0, 1)


def blend_weight(
    mu: Tensor, ratio: Tensor, node: Tensor | None = None, weight_node: float = 0.5
) -> Tensor:
    """How much of the high-order solution makes a step exact on a Gaussian mode, [N].

    On a mode whose response at sigma is `mu`, an exact step multiplies by
    E = sqrt(mu + (1 - mu) ratio^2) and Euler's by A = mu + (1 - mu) ratio. The two-stage
    solution's factor H lies so that (E - A) / (H - A) has no 0/0 left in it; for Heun it is
    2 E^2 / (E + A), which rises from `ratio` (mu = 0: Heun in data-prediction form) to 1, so the
    blend is a convex combination of the two solutions and cannot run away.

    Args:
        mu: [N], from 0 to 1.
        ratio: sigma_next / sigma, above 0 and below 1.
        node: noise level of the second evaluation over sigma; by default `ratio`, as Heun's.
        weight_node: what the high-order slope takes of that evaluation.
    """
    ratio = ratio.to(mu)
    node = ratio if node is None else node.to(mu)
    exact = (mu + (1 - mu) * ratio**2).sqrt()
    euler = mu + (1 - mu) * ratio
    at_node = mu + (1 - mu) * node**2
    return (1 - ratio) / (1 - node) * at_node / (weight_node * (exact + euler))


def blend(x: Tensor, embedded: Embedded, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The parameter-free form of a step's solution `x`, and the size of the change, [N]."""
    if embedded.companion is not None:
        mu = response_of_pair(embedded.companion, sigma)
    else:
        mu = response_in_step(embedded.f, embedded.f_node, embedded.node)
    weight = blend_weight(mu, embedded.ratio, embedded.node, embedded.weight_node)
    apart = x - embedded.x_low
    change = weight - 1
    return torch.addcmul(x, _per_sample(change, x), apart), change.abs() * _norm(apart)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


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
    return _norm(f_high - f_low) / (_norm(x_high - x_low) + EPS)


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
    return df / _per_sample(_norm(df) + EPS, df)


def correction(
    x_high: Tensor,
    x_low: Tensor,
    f_high: Tensor,
    f_low: Tensor,
    h: Tensor | float,
    guidance: Guidance,
) -> Tensor:
    """What guidance ADDS to the high-order solution of a Heun or DPM-Solver-2 step.

    ``-h [rho > w_con] (w_stiff h rho)^2 <v, f_high> v``: the paper's minus sign is inside.

    Args:
        x_high, x_low: solutions of different order, [N, ...].
        f_high, f_low: the drifts there; `f_high` is also the one whose projection is removed.
        h: length of the step that is corrected, sigma - sigma_next > 0: a number or [N].
        guidance: the settings.

    Returns:
        Like x; exactly 0 where the gate is shut or the pair agrees.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(x_high, x_low, f_high, f_low)
    if isinstance(h, Tensor) and h.ndim and h.shape != x_high.shape[:1]:
        raise ValueError(f"h must be a number or [{len(x_high)}], got shape {list(h.shape)}")
    df = f_high - f_low
    measured = measure(Pair(x_high, x_low, f_high, f_low, h), guidance, df)
    return df * _per_sample(measured.coefficient, df)


def measure(pair: Pair, guidance: Guidance, df: Tensor | None = None) -> Measurement:
    """Stiffness, gate and size of the correction for `pair` (`df`: its drift difference)."""
    x_high, x_low, f_high, f_low, h = pair
    if df is None:
        df = f_high - f_low
    f_norm = _norm(df)
    rho = f_norm / (_norm(x_high - x_low) + EPS)
    gate = rho > guidance.w_con
    if isinstance(h, Tensor):
        h = h.to(rho)
    # <v, f> v = <df, f> df / (|df| + eps)^2, divided twice so that tiny norms do not underflow.
    along = _inner(df, f_high) / (f_norm + EPS) / (f_norm + EPS)
    # where, not a product: a shut gate gives 0 even if the other factor overflowed.
    coefficient = torch.where(
        gate, -h * (guidance.w_stiff * h * rho) ** 2 * along, torch.zeros_like(rho)
    )
    return Measurement(rho, gate, coefficient, coefficient.abs() * f_norm)


def guide(x: Tensor, pair: Pair, guidance: Guidance) -> tuple[Tensor, Measurement]:
    """The guided step ``x + correction(*pair, guidance)``, and what was measured on the way."""
    df = pair.f_high - pair.f_low
    measured = measure(pair, guidance, df)
    return torch.addcmul(x, _per_sample(measured.coefficient, df), df), measured


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm per sample, [N], accumulated in float32 at least."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=_accumulator(x))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per sample, [N], accumulated in float32 at least."""
    dtype = _accumulator(a)
    return torch.linalg.vecdot(a.flatten(1).to(dtype), b.flatten(1).to(dtype))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] values shaped to multiply `like` [N, ...], in its dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(*tensors: Tensor) -> None:
    shapes = [list(t.shape) for t in tensors]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) < 2:
        raise ValueError(
            "the solutions and drifts of a pair must share one shape [N, ...], got "
            + ", ".join(map(str, shapes))
        )
