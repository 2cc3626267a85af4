"""The shipped digit classifier as a detector: ``fd_digits``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from erk_guid.metrics.detectors.base import DetectorError, register_detector
from erk_guid.models.networks.digits import load_digit_classifier


class _Digits:
    """The shipped digit classifier: offline, and in float64 so that batches do not matter."""

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


register_detector("fd_digits", _Digits)
