"""Feature detectors, which turn images into the features that are compared.

A detector is anything with a `name`, a `feature_dim` and a call on uint8 images. Register your
own with `register_detector`.
"""

from erk_guid.metrics.detectors import digits, dinov2, torch_fidelity  # noqa: F401 (they register)
from erk_guid.metrics.detectors.base import (
    Classifier,
    Detector,
    DetectorError,
    check_detector_name,
    describe,
    detector_names,
    load_detector,
    refuse_others,
    register_detector,
    run_detector,
    weights_file,
)

__all__ = [
    "Classifier",
    "Detector",
    "DetectorError",
    "check_detector_name",
    "describe",
    "detector_names",
    "load_detector",
    "refuse_others",
    "register_detector",
    "run_detector",
    "weights_file",
]
