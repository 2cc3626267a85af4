"""Feature detectors, which turn images into the features that are compared.

A detector is anything with a `name`, a `feature_dim` and a call on uint8 images. Register your
own with `register_detector`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import sha256_of, user_path
from erk_guid.common.programs import OURS, files_of_program, is_installed, together

OWN = "the detector's own"
"""Said of what a detector does not name."""


class DetectorError(ErkGuidError):
    """A detector that cannot be loaded, or images that it cannot use."""


@runtime_checkable
class Detector(Protocol):
    """A function from images to features."""

    name: str
    feature_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features [N, feature_dim] of images on the detector's device.

        Args:
            images: uint8 [N, C, H, W], with C of 1 (grey) or 3.
        """
        ...


@runtime_checkable
class Classifier(Detector, Protocol):
    """A detector that also classifies, as the inception score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, feature_dim] and logits [N, classes] of uint8 [N, C, H, W]."""
        ...


Factory = Callable[[torch.device, "Path | None"], Detector]
"""Makes a detector on a device. The path is the user's file of weights, None for the usual."""


class _Registered(NamedTuple):
    """A factory, and the files of the modules that registered it."""

    factory: Factory
    files: tuple[Path, ...]


_FACTORIES: dict[str, _Registered] = {}


def register_detector(name: str, factory: Factory) -> None:
    """Make a detector known by `name` to the command lines and `load_detector`.

    Args:
        name: letters, digits, '_' and '-'; it also names the metric.
        factory: ``factory(device, weights)`` returns the detector; `weights` is the path that
            the user gave by `--detector-weights`, or None.

    Raises:
        ValueError: the name is taken or has other characters.
        TypeError: the factory cannot be called.
    """
    if not callable(factory):
        raise TypeError(f"the factory of {name!r} must be callable, got {factory!r}")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"a detector's name has letters, digits, '_' and '-' only, got {name!r}")
    if name in _FACTORIES:
        raise ValueError(f"there is a detector {name!r} already")
    _FACTORIES[name] = _Registered(factory, tuple(_registering()))


def _registering() -> list[Path]:
    """Return the files that call `register_detector`, up to that of the module that is imported.

    Not that of the main program: two programs may register the same detector.
    """
    found: list[Path] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, path = str(frame.f_globals.get("__name__")), Path(frame.f_code.co_filename)
        if module == "__main__" or module.partition(".")[0] == OURS:
            break
        if path.is_file() and not is_installed(path):
            found.append(path.absolute())
        if frame.f_code.co_name == "<module>":
            break
        frame = frame.f_back
    return found


def detector_names() -> list[str]:
    """Return the names that `load_detector` knows."""
    return sorted(_FACTORIES)


def check_detector_name(name: str) -> None:
    """Refuse an unknown name of a detector.

    Raises:
        DetectorError: there is no detector of that name; the message lists the known ones.
    """
    if name not in _FACTORIES:
        raise DetectorError(
            f"unknown metric {printable(name, 80)!r}; there are {', '.join(detector_names())}"
        )


def weights_file(name: str, weights: Path | str) -> Path:
    """Return the path of the user's file of weights.

    Raises:
        DetectorError: there is no detector of that name, or no such file.
    """
    check_detector_name(name)
    path = user_path(weights)
    if not os.path.isfile(path):
        raise DetectorError(
            f"--detector-weights {name}={printable(weights, 200)}: there is no such file"
        )
    return path


def load_detector(
    name: str, device: torch.device | str = "cpu", weights: Path | str | None = None
) -> Detector:
    """Load a detector that is ready to be called on `device`.

    Args:
        weights: a local file of weights, in place of the cached or downloaded one.

    Raises:
        DetectorError: there is no such detector, or its weights cannot be obtained; the message
            says which file to put where.
    """
    check_detector_name(name)
    path = weights_file(name, weights) if weights is not None else None
    detector = _FACTORIES[name].factory(torch.device(device), path)
    if detector.name != name:
        raise DetectorError(f"the detector registered as {name!r} calls itself {detector.name!r}")
    if path is not None and not hasattr(detector, "weights"):
        with contextlib.suppress(AttributeError):  # __slots__
            detector.weights = identify(path)  # type: ignore[attr-defined]
    return detector


def identify(path: Path) -> dict[str, str]:
    """Return what identifies a file, in JSON's types."""
    return {"file": path.name, "sha256": sha256_of(path)}


def describe(detector: Detector) -> dict[str, Any]:
    """Return what a score depends on besides the images, in JSON's types."""
    return {
        "name": detector.name,
        "feature_dim": detector.feature_dim,
        "preprocessing": getattr(detector, "preprocessing", OWN),
        "weights": getattr(detector, "weights", OWN),
        **_program_of(detector),
    }


def _program_of(detector: Detector) -> dict[str, Any]:
    """Return what identifies the program of a detector that is none of ours.

    These are the files that register it, that of its class, and what they import.
    """
    registered = _FACTORIES.get(detector.name)
    files = list(registered.files) if registered is not None else []
    called = detector if hasattr(detector, "__code__") else type(detector).__call__
    path = Path(getattr(getattr(called, "__code__", None), "co_filename", ""))
    if type(detector).__module__.partition(".")[0] not in (OURS, "torch") and path.is_file():
        files.append(path)
    found = files_of_program(files)
    if not found:
        return {}
    names = ", ".join(dict.fromkeys(path.name for path in found))
    return {"program": {"file": names, "sha256": together(found)}}


def refuse_others(source: str, about: Mapping[str, Any], detector: Detector) -> None:
    """Refuse features that were made with other weights, or by another program, than a detector's.

    Args:
        source: of the features, for the message.
        about: what their file says of its origin; where it says nothing, nothing is refused.
        detector: the one that they are to be compared with.

    Raises:
        DetectorError: the message names both.
    """
    made = about.get("detectors", []) if isinstance(about, dict) else []
    for one in made if isinstance(made, list) else []:
        if not isinstance(one, dict) or one.get("name") != detector.name:
            continue
        now = describe(detector)
        for what, other in (("weights", "with other weights"), ("program", "by another program")):
            theirs, ours = one.get(what), now.get(what)
            if theirs is not None and ours is not None and _digest(theirs) != _digest(ours):
                raise DetectorError(
                    f"{source}: its features of {detector.name} were made {other} "
                    f"({_told(theirs)}) than now ({_told(ours)}); take the same, or make it again "
                    "with 'ref'"
                )


def _digest(given: object) -> object:
    """Return what tells two files apart; what they are called does not."""
    return given.get("sha256") if isinstance(given, dict) else given


def _told(given: object) -> str:
    """Return which file is meant, in words."""
    if isinstance(given, dict):
        name, digest = printable(given.get("file"), 60), printable(given.get("sha256"), 64)
        return f"{name}, sha256 {digest}"
    return printable(given, 60)


def run_detector(
    detector: Detector, images: Tensor, with_logits: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the features, and the logits if asked for.

    Raises:
        DetectorError: features that are no tensor of real numbers, of another shape than promised
            or not finite, or no logits.
    """
    logits = None
    if with_logits:
        if not isinstance(detector, Classifier):
            raise DetectorError(
                f"{detector.name} does not classify, so it gives no inception score"
            )
        features, logits = detector.features_and_logits(images)
    else:
        features = detector(images)
    if not isinstance(features, Tensor) or not features.dtype.is_floating_point:
        given = getattr(features, "dtype", None)
        raise DetectorError(
            f"{detector.name} must return a floating-point tensor, got {type(features).__name__}"
            + ("" if given is None else f" of {given}")
        )
    if tuple(features.shape) != (len(images), detector.feature_dim):
        raise DetectorError(
            f"{detector.name} promised [{len(images)}, {detector.feature_dim}] features and "
            f"returned {list(features.shape)}"
        )
    if not features.isfinite().all():
        raise DetectorError(f"{detector.name} returned features that are not finite")
    return features, logits


def in_colour(images: Tensor) -> Tensor:
    """Return grey images [N, 1, H, W] as [N, 3, H, W]; others unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
