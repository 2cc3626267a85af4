"""What a search for noise levels found, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erk_guid.guidance import Guidance
from erk_guid.solvers import Solver
from erk_guid.studies.fitting.trials import Method

FITTED = "fitted"
"""Name of the spacing that a search found."""
RESAMPLES = 2000
"""Draws of a bootstrap interval."""


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


class Cost(NamedTuple):
    """What a fit took."""

    search: int
    """Calls of the denoiser, counted per sample, of search, choice and report."""
    reference: int
    """Those of the fine solution."""
    seconds: float


class Tried(NamedTuple):
    """One run that was judged on the samples of the choice."""

    method: Method
    spacing: str
    """"polynomial", "logsnr", "time" or "fitted"."""
    levels: tuple[float, ...]
    error: float
    """Mean distance there."""

    @property
    def described(self) -> str:
        """The run in words."""
        return described(self.method, self.spacing)


def described(method: Method, spacing: str) -> str:
    """Return a run in words."""
    return f"{method} with {spacing} spacing"


@dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Attributes:
        sigmas: noise levels for `erk_guid.sample`, or times where there is a process; float64.
        solver, guidance: what they are for, for `erk_guid.sample`, too.
        evaluations: calls of the denoiser that such a run takes; no more than was asked for.
        spacing: "fitted", or the usual spacing that nothing was significantly better than.
        before: error of the best usual run on the samples of the report: mean distance of the end
            points from the fine solution's, with a bootstrap interval (95 %).
        before_is: which run that was.
        after: error with `sigmas` on the same samples.
        ratio: after over before, with the interval of that ratio.
        usual: errors of the chosen solver with each usual spacing, on the same samples.
        tried: the runs among which it was chosen, best first.
        reference_error: estimate of the fine solution's own error over `after`.
        samples: how many samples were searched on, chosen on, reported on.
        cost: evaluations and seconds.
    """

    sigmas: Tensor
    solver: Solver
    guidance: Guidance | None
    evaluations: int
    spacing: str
    before: Interval
    before_is: str
    after: Interval
    ratio: Interval
    usual: dict[str, float]
    tried: tuple[Tried, ...]
    reference_error: float
    samples: tuple[int, int, int]
    cost: Cost

    @property
    def found(self) -> bool:
        """Whether fitted levels are significantly better than the usual ones."""
        return self.spacing == FITTED

    def __str__(self) -> str:
        method = Method(self.solver, self.guidance)
        levels = ", ".join(f"{level:.4g}" for level in self.sigmas.tolist())
        said = (
            f"error {self.after} against {self.before} of {self.before_is}: {self.ratio} times"
            if self.found
            else f"nothing is significantly better than {self.before_is}, error {self.before}"
        )
        return f"{method}, {self.evaluations} evaluations at {levels}; {said}"


def bootstrap_mean(errors: Tensor) -> Interval:
    """Return the mean of errors [N] with its 95 % bootstrap interval."""
    means = errors[_resampled(len(errors))].mean(dim=1)
    return _interval(float(errors.mean()), means)


def bootstrap_ratio(after: Tensor, before: Tensor) -> Interval:
    """Return the ratio of two means over the same samples, with its 95 % bootstrap interval."""
    rows = _resampled(len(after))
    ratios = after[rows].mean(dim=1) / before[rows].mean(dim=1)
    return _interval(float(after.mean() / before.mean()), ratios)


def _resampled(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def _interval(mean: float, drawn: Tensor) -> Interval:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Interval(mean, low, high)
