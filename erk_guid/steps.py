"""One step of a solver: small objects without state of their own.

``step(denoiser, x, sigma, sigma_next, state) -> (result, state)``. What a step wants to
remember for the next one is in `state`, which it returns and never changes; begin with None.
The result carries the new x *without* guidance and, where the solver has one, the embedded pair
from which guidance is computed. `erk_guid.sample` is the loop around this; a loop of your own is

    step, state = erk_guid.HeunStep(), None
    for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
        result, state = step(denoiser, x, sigma, sigma_next, state)
        x = result.x
        if result.pair is not None:
            x = x + erk_guid.correction(*result.pair, guidance)
    x = denoiser(x, sigmas[-2])  # Euler to sigma = 0

Steps take the denoiser, not the drift, because solvers in data-prediction form and the trace
want the denoised x itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from erk_guid.auto import Answer, Embedded
from erk_guid.denoisers import Denoiser
from erk_guid.flow import FlowAnswer
from erk_guid.guidance import Pair, norm


class Evaluation(NamedTuple):
    """One call of the denoiser."""

    denoised: Tensor
    """D(x; sigma), in the dtype of x."""
    drift: Tensor
    """dx/dsigma = (x - D) / sigma."""


@dataclass(frozen=True)
class AnalyticFirst:
    """A denoiser that is not called at one noise level (AFS, Dockhorn et al. 2022).

    There the drift is taken to be x / sqrt(1 + sigma^2), nearly that of standard normal data.

    Args:
        denoiser: called at all other noise levels.
        first: that noise level: this very tensor, not its value.
    """

    denoiser: Denoiser
    first: Tensor

    def at_first(self, x: Tensor) -> Evaluation:
        """What stands for an evaluation at `first`."""
        # The drift itself: by way of the denoised x it would be rounded once more.
        drift = x / (1 + self.first**2).sqrt()
        return Evaluation(x - self.first * drift, drift)

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        return self.denoiser(x, sigma)


def evaluate(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Evaluation:
    """Call the denoiser at (x, sigma > 0) and turn its output into the drift.

    The output is copied: a denoiser may return the same tensor each time (CUDA graphs do, and
    ``torch.compile(mode="reduce-overhead")``), and what it returned before is still needed.

    Raises:
        ValueError: the output is not shaped like x, or the denoiser edited its x or sigma.
    """
    if isinstance(denoiser, AnalyticFirst) and sigma is denoiser.first:
        return denoiser.at_first(x)
    # Inference tensors count no edits: the denoiser gets copies of those.
    given, level = (t.clone() if t.is_inference() else t for t in (x, sigma))
    before = [None if t.is_inference() else t._version for t in (given, level)]
    denoised = denoiser(given, level)
    for name, tensor, edits in zip(("x", "sigma"), (given, level), before, strict=True):
        if edits is not None and tensor._version != edits:
            raise ValueError(
                f"the denoiser edited its {name} in place, which the sampler still needs; let it "
                f"work on a copy ({name}.clone())"
            )
    if denoised.shape != x.shape:
        raise ValueError(
            f"the denoiser returned {list(denoised.shape)} for an x of {list(x.shape)}"
        )
    denoised = denoised.to(x.dtype, copy=True)
    return Evaluation(denoised, (x - denoised) / sigma)


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        x: the solution at sigma_next, without guidance, like the x that came in.
        denoised: D(x; sigma) at the beginning of the step.
        drift: dx/dsigma there.
        evaluations: calls of the denoiser spent.
        pair: the embedded pair guidance is computed from, or None (no pair at this step).
        spread: computes how far x is from the embedded solution of lower order, [N]; None if
            there is none.
        embedded: what the parameter-free form is made of, or None (there is no such form).
    """

    x: Tensor
    denoised: Tensor
    drift: Tensor
    evaluations: int
    pair: Pair | None = None
    spread: Callable[[], Tensor] | None = None
    embedded: Embedded | None = None


class Step(Protocol):
    """The protocol of a step; see the module's text."""

    @property
    def has_pair(self) -> bool:
        """Whether results (from the second step on, at least) carry an embedded pair."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: Any
    ) -> tuple[StepResult, Any]: ...


@dataclass(frozen=True)
class EulerStep:
    """Order 1, one evaluation, no embedded pair. The only step that may end at sigma = 0."""

    has_pair = False
    one_step = True

    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, state: None = None
    ) -> tuple[StepResult, None]:
        denoised, drift = evaluate(denoiser, x, sigma)
        return StepResult(x + (sigma_next - sigma) * drift, denoised, drift, 1), None


class Companion(NamedTuple):
    """Heun's state: the Euler solution of the step before, and the drift there."""

    x_low: Tensor
    f_low: Tensor


@dataclass(frozen=True)
class HeunStep:
    """Order 2 (Karras et al. 2022, algorithm 1), two evaluations, Euler embedded.

    The Euler solution and its drift at sigma_next, which Heun computes anyway, wait there for
    the next step's first evaluation: the two drifts at one noise level are the embedded pair.

    Args:
        quadrature: what the parameter-free form gives the denoised image at sigma_next, see
            `erk_guid.auto`; None if that form is not wanted. `erk_guid.solvers.Heun` fills it in.
        times: of a flow-matching model, where the step begins and ends, see `erk_guid.flow`; in
            place of `quadrature`.
    """

    quadrature: float | None = None
    times: tuple[float, float] | None = None
    has_pair = True
    one_step = True

    @property
    def blends(self) -> bool:
        return self.quadrature is not None or self.times is not None

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        state: Companion | None = None,
    ) -> tuple[StepResult, Companion]:
        if sigma_next.device.type == "cpu" and not sigma_next > 0:
            raise ValueError(
                f"Heun evaluates the drift at sigma_next, which must be above 0, got "
                f"{sigma_next.item()}; take EulerStep (or the denoised x) for the step to 0"
            )
        denoised, f = evaluate(denoiser, x, sigma)
        x_low = x + (sigma_next - sigma) * f
        f_low = evaluate(denoiser, x_low, sigma_next).drift
        x_high = x + (sigma_next - sigma) * (0.5 * f + 0.5 * f_low)
        pair = None
        if state is not None:
            pair = Pair(x, state.x_low, f, state.f_low, sigma - sigma_next)
        embedded: Embedded | None = None
        if self.times is not None:
            embedded = FlowAnswer(x, x_low, f, f_low, *self.times, pair)
        elif self.quadrature is not None:
            embedded = Answer(x_low, f, f_low, sigma, sigma_next, self.quadrature, pair)
        result = StepResult(x_high, denoised, f, 2, pair, lambda: norm(x_high - x_low), embedded)
        return result, Companion(x_low, f_low)
