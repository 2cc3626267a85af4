"""Statistics of features: moments, results of detectors for a set of images, reference files."""

from erk_guid.metrics.statistics.collecting import Collected, blocks, collect, reporting_memory
from erk_guid.metrics.statistics.moments import Moments, Statistics
from erk_guid.metrics.statistics.references import Reference, read_reference, write_reference

__all__ = [
    "Collected",
    "Moments",
    "Reference",
    "Statistics",
    "blocks",
    "collect",
    "read_reference",
    "reporting_memory",
    "write_reference",
]
