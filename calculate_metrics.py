#!/usr/bin/env python3
"""Score images: FID, FD-DINOv2 and other Frechet distances. See --help.

Scripts of EDM2's users find its functions here under their own names.
"""

from erk_guid.cli import run_script

if __name__ == "__main__":
    run_script("metrics")  # it ends here

from erk_guid.integrations.edm2 import (
    calculate_metrics_from_stats,
    calculate_stats_for_files,
    calculate_stats_for_iterable,
    load_stats,
    save_stats,
)

__all__ = [
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "load_stats",
    "save_stats",
]
