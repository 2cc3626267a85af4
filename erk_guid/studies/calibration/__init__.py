"""Settings of ERK guidance for one's own model: the search, and the file they are kept in."""

from erk_guid.studies.calibration.search import Calibration, Trial, calibrate

__all__ = ["Calibration", "Trial", "calibrate"]
