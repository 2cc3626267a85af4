"""Detectors of torch-fidelity: InceptionV3 (``fid``) and VGG16 (``vgg16``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.metrics.detectors.base import (
    Detector,
    DetectorError,
    identify,
    in_colour,
    register_detector,
)
from erk_guid.metrics.detectors.weights import check_weights, fetch_weights

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


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
        check_weights(name, path)
        self.weights = identify(path)
        try:
            # The extractor's own torch.load is not the safe one; check_weights has used that one.
            self._extractor = extractor(
                name, list(layers), feature_extractor_weights_path=str(path)
            ).to(device)
        except (RuntimeError, KeyError, AttributeError) as error:
            raise DetectorError(f"{path} does not hold the weights of {name}: {error}") from error

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self._extractor(in_colour(images))[0]
        return features


class _FidelityClassifier(_Fidelity):
    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._extractor(in_colour(images))
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


register_detector("fid", _inception)
register_detector("vgg16", _vgg16)
