"""Settings of ERK guidance for your own model: the search, and the file that keeps them."""

from erk_guid.studies.fitting.calibration import Calibration, Trial, calibrate
from erk_guid.studies.fitting.levels import fit, fit_each
from erk_guid.studies.fitting.results import Fitted

__all__ = ["Calibration", "Fitted", "Trial", "calibrate", "fit", "fit_each"]
