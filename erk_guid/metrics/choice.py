"""Metrics as users name them: a score and the detector whose features it compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from erk_guid.common.errors import ErkGuidError
from erk_guid.metrics.detectors import Detector, check_detector_name, detector_names, refuse_others
from erk_guid.metrics.scores import Need, Observed, Score, score_names, score_of
from erk_guid.metrics.statistics import Collected, Reference


@dataclass(frozen=True)
class Metric:
    """A score over the features of a detector.

    Attributes:
        name: as the user wrote it.
        score_name, score: what is computed.
        detector: the name of the detector.
    """

    name: str
    score_name: str
    score: Score
    detector: str

    def needs(self, what: Need) -> bool:
        """Return whether the score needs `what` of the generated images."""
        return what in self.score.needs

    def compute(
        self, collected: Collected, reference: Reference | None, device: torch.device
    ) -> dict[str, float]:
        """Return the values by name: NAME for a single value, NAME/VALUE for each of several.

        Raises:
            ErkGuidError: the reference lacks something.
            ValueError: see `Score`.
        """
        generated = Observed(
            collected.statistics.get(self.detector),
            collected.features.get(self.detector),
            collected.logits.get(self.detector),
        )
        real = Observed() if reference is None else self.of(reference)
        values = self.score(generated, real, device)
        if len(values) == 1:
            return {self.name: float(next(iter(values.values())))}
        return {f"{self.name}/{key}": float(value) for key, value in values.items()}

    def check_count(self, count: int, what: str) -> None:
        """Refuse too few images before they are looked at.

        Raises:
            ErkGuidError: fewer than the score needs.
        """
        if count < self.score.fewest:
            raise ErkGuidError(
                f"{self.name} needs at least {self.score.fewest} {what} images, got {count}"
            )

    def of(self, reference: Reference) -> Observed:
        """Return what the score needs of the real images.

        Raises:
            ErkGuidError: the reference does not have it.
        """
        needs = self.score.needs_of_reference
        statistics = reference.of(self.detector) if "statistics" in needs else None
        features = None
        if "features" in needs:
            if self.detector not in reference.features:
                raise ErkGuidError(
                    f"{self.name} compares single images, and {reference.source} holds no features "
                    f"of {self.detector}; make a reference with 'ref --keep-features'"
                )
            features = reference.features[self.detector].astype(np.float32)
        return Observed(statistics, features)

    def check(self, reference: Reference, detector: Detector) -> None:
        """Refuse a reference that lacks something, or was made with another detector.

        Raises:
            ErkGuidError: the message names what does not fit.
        """
        refuse_others(reference.source, reference.about, detector)
        real = self.of(reference)
        if real.features is not None:
            self.check_count(len(real.features), f"{reference.source}'s")
        for what, size in (
            ("statistics", real.statistics and len(real.statistics.mu)),
            ("features", None if real.features is None else real.features.shape[1]),
        ):
            if size is not None and size != detector.feature_dim:
                raise ErkGuidError(
                    f"{reference.source}: its {what} for {detector.name} are of {size} features, "
                    f"the detector has {detector.feature_dim}; they were made with another one"
                )

    def record(self) -> dict[str, Any]:
        """Return what the values depend on besides the features, in JSON's types."""
        return {"score": self.score_name, "detector": self.detector, **asdict(self.score)}  # type: ignore[call-overload]


def metrics_of(names: Sequence[str]) -> list[Metric]:
    """Return metrics from their names, each once.

    A detector's name alone is the Frechet distance of its features, as in EDM2 (``fid``,
    ``fd_dinov2``). ``SCORE:DETECTOR`` is another score of those features (``kid:fd_digits``). A
    score's name alone uses the score's usual detector (``kid``).

    Raises:
        ErkGuidError: there is no such score or detector.
    """
    return [_metric(name) for name in dict.fromkeys(names)]


def _metric(name: str) -> Metric:
    score, colon, detector = name.partition(":")
    if colon:
        found = score_of(score)
        if not detector:
            raise ErkGuidError(f"--metrics {name}: name a detector behind the colon")
        check_detector_name(detector)
        return Metric(name, score, found, detector)
    if name not in detector_names() and name in score_names():
        found = score_of(name)
        return Metric(name, name, found, found.detector)
    if name not in detector_names():
        raise ErkGuidError(
            f"unknown metric {name!r}; there are {', '.join(detector_names())} (Frechet distances) "
            f"and {', '.join(score_names())} (alone, or as SCORE:DETECTOR)"
        )
    return Metric(name, "frechet", score_of("frechet"), name)
