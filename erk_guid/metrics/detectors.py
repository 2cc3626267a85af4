"""Feature detectors: what turns images into the features that are compared.

A detector is anything with a `name`, a `feature_dim` and a call on uint8 images; register one
of your own with `register_detector`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.common.files import sha256_of, user_path
from erk_guid.models.checkpoints.download import download
from erk_guid.models.networks.digits import load_digit_classifier


class DetectorError(ErkGuidError):
    """A detector that cannot be had, or images that it cannot use."""


@runtime_checkable
class Detector(Protocol):
    """Images to features."""

    name: str
    feature_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W], C of 1 (grey) or 3, on the detector's device, to [N, feature_dim]."""
        ...


@runtime_checkable
class Classifier(Detector, Protocol):
    """A detector that also classifies, as the inception score needs."""

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, C, H, W] to features [N, feature_dim] and logits [N, classes]."""
        ...


Factory = Callable[[torch.device, "Path | None"], Detector]
"""Makes a detector on a device; the path is the user's file of weights, None for the usual."""

_FACTORIES: dict[str, Factory] = {}


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
    _FACTORIES[name] = factory


def detector_names() -> list[str]:
    """Names that `load_detector` knows."""
    return sorted(_FACTORIES)


def check_detector_name(name: str) -> None:
    """
    Raises:
        DetectorError: there is no detector of that name; the message lists those that are.
    """
    if name not in _FACTORIES:
        raise DetectorError(f"unknown metric {name!r}; there are {', '.join(detector_names())}")


def load_detector(
    name: str, device: torch.device | str = "cpu", weights: Path | str | None = None
) -> Detector:
    """A detector, ready to be called on `device`.

    Args:
        weights: a local file of weights, in place of the cached or downloaded one.

    Raises:
        DetectorError: no such detector, or its weights cannot be had; the message says which
            file to put where.
    """
    check_detector_name(name)
    path = user_path(weights) if weights is not None else None
    if path is not None and not path.is_file():
        raise DetectorError(f"--detector-weights {name}={weights}: there is no such file")
    return _FACTORIES[name](torch.device(device), path)


def describe(detector: Detector) -> dict[str, Any]:
    """What a score depends on besides the images, in JSON's types."""
    return {
        "name": detector.name,
        "feature_dim": detector.feature_dim,
        "preprocessing": getattr(detector, "preprocessing", "the detector's own"),
        "weights": getattr(detector, "weights", "the detector's own"),
    }


def _colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class _Digits:
    """The shipped digit classifier: offline, in float64, so that batches do not matter."""

    name = "fd_digits"
    feature_dim = 64
    preprocessing = "32x32 grey, / 127.5 - 1, float64"
    weights = "shipped with erk_guid"

    def __init__(self, device: torch.device, weights: Path | None) -> None:
        if weights is not None:
            raise DetectorError(f"{self.name} ships with its weights; leave --detector-weights out")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._net = load_digit_classifier().to(device, dtype)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 3 and bool((images == images[:, :1]).all()):
            images = images[:, :1]  # grey pictures that were stored as RGB
        if tuple(images.shape[1:]) != (1, 32, 32):
            raise DetectorError(
                f"{self.name} is for grey 32x32 digits, got images of {list(images.shape[1:])} "
                "(channels, height, width)"
            )
        features = self._net.features(images)
        return features, self._net.classify(features)

    def __call__(self, images: Tensor) -> Tensor:
        return self.features_and_logits(images)[0]


INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINO_REPOSITORY = "facebookresearch/dinov2:main"


class _Fidelity:
    """A feature extractor of torch-fidelity."""

    def __init__(
        self,
        name: str,
        extractor: Any,
        layers: tuple[str, ...],
        feature_dim: int,
        preprocessing: str,
        url: str,
        device: torch.device,
        weights: Path | None,
    ) -> None:
        self.name = name
        self.feature_dim = feature_dim
        self.preprocessing = preprocessing
        path = weights or fetch_weights(name, url)
        _check_weights(name, path)
        self.weights = _identify(path)
        try:
            # Its own torch.load is not the careful one; the file has just passed that.
            self._extractor = extractor(
                name, list(layers), feature_extractor_weights_path=str(path)
            ).to(device)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise DetectorError(f"{path} does not hold the weights of {name}: {error}") from error

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self._extractor(_colour(images))[0]
        return features


class _FidelityClassifier(_Fidelity):
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._extractor(_colour(images))
        return features, logits


def _import_fidelity(name: str) -> Any:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as inception
        import torch_fidelity.feature_extractor_vgg16 as vgg
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "metrics", f"the metric {name}") from error
    return inception.FeatureExtractorInceptionV3, vgg.FeatureExtractorVGG16


def _inception(device: torch.device, weights: Path | None) -> Detector:
    extractor, _ = _import_fidelity("fid")
    return _FidelityClassifier(
        "fid", extractor, ("2048", "logits_unbiased"), 2048,
        "torch-fidelity's inception-v3-compat: TF1 bilinear to 299x299, (x - 128) / 128",
        INCEPTION_URL, device, weights,
    )  # fmt: skip


def _vgg16(device: torch.device, weights: Path | None) -> Detector:
    _, extractor = _import_fidelity("vgg16")
    return _Fidelity(
        "vgg16", extractor, ("fc2_relu",), 4096,
        "torch-fidelity's vgg16: TF1 bilinear to 224x224, ImageNet mean and deviation",
        VGG_URL, device, weights,
    )  # fmt: skip


DINO_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2_input(images: Tensor) -> Tensor:
    """What DINOv2 is fed for FD-DINOv2: uint8 [N, 1 or 3, H, W] to float32 [N, 3, 224, 224].

    Bicubic with antialiasing to 224x224 in floating point, without rounding or clipping, then
    / 255 and ImageNet's mean and deviation: as the reference statistics of EDM2 were made.
    """
    x = torch.nn.functional.interpolate(
        _colour(images).to(torch.float32), (DINO_SIZE, DINO_SIZE), mode="bicubic", antialias=True
    )
    mean = x.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = x.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (x / 255 - mean) / std


class _DINOv2:
    """DINOv2 ViT-L/14 through torch.hub (Oquab et al. 2023)."""

    name = "fd_dinov2"
    feature_dim = 1024
    preprocessing = "bicubic with antialias to 224x224 unrounded, ImageNet mean and deviation"

    def __init__(self, device: torch.device, weights: Path | None) -> None:
        path = weights or fetch_weights(self.name, DINO_URL)
        state = _check_weights(self.name, path)
        self.weights = _identify(path)
        where = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.filterwarnings("ignore", message="xFormers")
                net = torch.hub.load(
                    DINO_REPOSITORY, "dinov2_vitl14", pretrained=False, trust_repo=True,
                    skip_validation=True, verbose=False,
                )  # fmt: skip
        except Exception as error:  # the hub runs the repository's code: anything may happen
            raise DetectorError(
                f"{self.name} needs DINOv2's code, which could not be loaded "
                f"({_first_line(error)}). Put a checkout of https://github.com/"
                f"facebookresearch/dinov2 at {where}"
            ) from error
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise DetectorError(
                f"{path} does not hold the weights of DINOv2 ViT-L/14: {_first_line(error)}"
            ) from error
        self._net = net.to(device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self._net(dinov2_input(images))
        return features


def fetch_weights(name: str, url: str) -> Path:
    """The file of weights in torch.hub's cache or our own, downloaded if it is in neither.

    Raises:
        DetectorError: it cannot be fetched; the message says which file to put where.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        found = download(url)
        stem = path.stem.rpartition("-")[2]  # the names' convention: the first of the SHA-256
        if re.fullmatch("[0-9a-f]{8}", stem) and not sha256_of(found).startswith(stem):
            found.unlink()
            raise DetectorError(f"what {url} sent is another file; the copy was deleted")
    except ErkGuidError as error:
        raise DetectorError(
            f"cannot fetch the weights of {name} ({_first_line(error)}). Fetch {url} elsewhere and "
            f"put it at {path}, or give --detector-weights {name}=FILE"
        ) from error
    return found


def _check_weights(name: str, path: Path) -> dict[str, Tensor]:
    """Read a file of weights without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for bytes it cannot read
        raise DetectorError(
            f"{path} is no plain file of weights for {name} ({_first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DetectorError(f"{path} holds something else than the weights of {name}")
    return state


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return (text or type(error).__name__)[:160]


def _identify(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_of(path)}


register_detector("fid", _inception)
register_detector("fd_dinov2", _DINOv2)
register_detector("fd_digits", _Digits)
register_detector("vgg16", _vgg16)
