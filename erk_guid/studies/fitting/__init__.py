"""Settings of ERK guidance for your own model: the search, and the file that keeps them."""

from erk_guid.studies.fitting.calibration import Calibration, Trial, calibrate

__all__ = ["Calibration", "Trial", "calibrate"]
