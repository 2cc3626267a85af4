"""The base class of all scores, and the register of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, is_dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from erk_guid.common.errors import ErkGuidError
from erk_guid.metrics.statistics.moments import Statistics

Need = Literal["statistics", "features", "logits"]


@dataclass(frozen=True)
class Observed:
    """One detector's results for a set of images, as far as scores need them.

    Attributes:
        statistics: mean and covariance of the features.
        features: float32 [N, d].
        logits: float32 [N, classes].
    """

    statistics: Statistics | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


class Score(ABC):
    """A comparison of generated images with real ones, by one detector's results for both.

    Subclasses are frozen dataclasses. Their fields are the settings that the values depend on.

    Attributes:
        detector: the detector that is used if none is named.
        needs: what must be known of the generated images.
        needs_of_reference: what must be known of the real ones.
    """

    detector: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    needs_of_reference: ClassVar[tuple[Need, ...]] = ()

    @property
    def fewest(self) -> int:
        """How many images it needs of either set, at least."""
        return 2

    @abstractmethod
    def __call__(
        self, generated: Observed, reference: Observed, device: torch.device
    ) -> dict[str, float]:
        """Return one or several values by name.

        Args:
            generated, reference: with at least what the score needs of them.
            device: where to compute what is too slow on the CPU.

        Raises:
            ValueError: too few images, or features that do not match.
        """


_SCORES: dict[str, Score] = {}


def register_score(name: str, score: Score) -> None:
    """Make a score known to the command lines, as ``NAME`` or ``NAME:DETECTOR``.

    Args:
        name: letters, digits, '_' and '-'.
        score: the score with its settings.

    Raises:
        ValueError: the name is taken or has other characters.
        TypeError: `score` is not a `Score`, no dataclass, or lacks a class attribute.
    """
    if not isinstance(score, Score):
        raise TypeError(f"{score!r} is not an erk_guid.metrics.Score; make one: MyScore()")
    if not is_dataclass(score):
        raise TypeError(f"{type(score).__name__} must be a dataclass: its fields are recorded")
    for attribute in ("detector", "needs"):
        if not hasattr(score, attribute):
            raise TypeError(f"{type(score).__name__} lacks the class attribute {attribute!r}")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"a score's name has letters, digits, '_' and '-' only, got {name!r}")
    if name in _SCORES:
        raise ValueError(f"there is a score {name!r} already")
    _SCORES[name] = score


def score_names() -> list[str]:
    """Return the names that `score_of` knows."""
    return sorted(_SCORES)


def score_of(name: str) -> Score:
    """Return the score of that name.

    Raises:
        ErkGuidError: there is no such score; the message lists the known ones.
    """
    if name not in _SCORES:
        raise ErkGuidError(f"unknown score {name!r}; there are {', '.join(score_names())}")
    return _SCORES[name]


def required(value: np.ndarray | None, what: str) -> np.ndarray:
    """Return `value`, which is never None if the score declares its needs.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"this score needs {what}")
    return value
