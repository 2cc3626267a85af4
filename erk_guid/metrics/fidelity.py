"""The shipped digit classifier as a feature extractor of torch-fidelity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erk_guid.common.errors import MissingExtraError
from erk_guid.metrics.detectors import load_detector

try:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
except ImportError as error:
    raise MissingExtraError("torch-fidelity", "metrics", "erk_guid.metrics.fidelity") from error

NAME = "erk-guid-digits"
FEATURES, LOGITS = "64", "logits"


class FeatureExtractorDigits(FeatureExtractorBase):
    """Features '64' and 'logits' of the shipped classifier, float32."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self._detectors: dict[torch.device, Any] = {}  # torch-fidelity moves the images only

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return FEATURES, LOGITS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": LOGITS, "fid": FEATURES, "kid": FEATURES, "prc": FEATURES}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.device not in self._detectors:
            self._detectors[images.device] = load_detector("fd_digits", images.device)
        features, logits = self._detectors[images.device].features_and_logits(images)
        found = {FEATURES: features.float(), LOGITS: logits.float()}
        return tuple(found[name] for name in self.features_list)


def register() -> str:
    """Register the extractor with torch-fidelity (once) and return its name, `NAME`.

    ``torch_fidelity.calculate_metrics(input1=generated, input2=real, prc=True, isc=True,
    feature_extractor=erk_guid.metrics.fidelity.register())`` then needs no download.
    """
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, FeatureExtractorDigits)
    return NAME
