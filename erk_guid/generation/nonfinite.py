"""Images that came out as NaN or infinity: which, at which step, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.sampling import StepInfo, finite_rows


class Where(NamedTuple):
    """The first step after which a sample was not finite.

    Attributes:
        step, num_steps: its number, from 0, and how many there are.
        sigma: noise level where it began.
        cause: what was not finite first.
    """

    step: int
    num_steps: int
    sigma: float
    cause: str


class Watch:
    """Looks for the first step that is not finite: a callback, and a wrapper of networks.

    It waits for the device at each call, so it is for samples that are known to fail.
    """

    def __init__(self) -> None:
        self.found: Where | None = None
        self._network: str | None = None

    def __call__(self, info: StepInfo) -> None:
        if self.found is None and not bool(finite_rows(info.x).all()):
            self.found = Where(info.step, info.num_steps, info.sigma, self._cause(info))

    def network(self, net: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        """Return a network that is called in the place of `net`, and is looked at."""

        def watched(x: Tensor, sigma: Tensor, *labels: Tensor | None) -> Tensor:
            denoised = net(x, sigma, *labels)
            given = bool(x.isfinite().all())
            if self._network is None and given and not bool(denoised.isfinite().all()):
                level = float(sigma.flatten()[0])
                self._network = f"{name} returned NaN or infinity at sigma {level:.4g}"
            return denoised

        return watched

    def _cause(self, info: StepInfo) -> str:
        if self._network is not None:
            return self._network
        size = info.correction_size
        if size is not None and not bool(size.isfinite().all()):
            return "the correction of guidance was not finite; choose a smaller w_stiff"
        return "the solver's step was not finite"


class NonFiniteImagesError(ErkGuidError, ValueError):
    """Images that came out as NaN or infinity.

    Attributes:
        seeds: of these images.
        indices: their places in the list of all seeds.
        where: the first step that failed; None where that is not known.
    """

    def __init__(
        self, seeds: Sequence[int], indices: Sequence[int], where: Where | None = None
    ) -> None:
        self.seeds, self.indices, self.where = list(seeds), list(indices), where
        shown = ", ".join(map(str, self.seeds[:8])) + (", ..." if len(self.seeds) > 8 else "")
        plural = "s" if len(self.seeds) > 1 else ""
        if where is None:
            reason = "sampling again did not fail: look at the decoder, or at the machine"
        else:
            reason = f"step {where.step + 1} of {where.num_steps}, from sigma {where.sigma:.4g}: "
            reason += where.cause
        super().__init__(f"NaN or infinity in the image{plural} of seed{plural} {shown} ({reason})")
