"""EDM2's functions for scripts, by name and signature, built on this package.

The scripts in the root of the checkout offer the same names::

    from generate_images import generate_images, edm_sampler, StackedRandomGenerator
    from generate_images import config_presets, parse_int_list
    from calculate_metrics import calculate_stats_for_iterable, calculate_stats_for_files
    from calculate_metrics import calculate_metrics_from_stats, load_stats, save_stats
"""

from __future__ import annotations

from erk_guid.edm2 import edm_sampler
from erk_guid.integrations.edm2.generation import (
    StackedRandomGenerator,
    config_presets,
    generate_images,
    parse_int_list,
)
from erk_guid.integrations.edm2.statistics import (
    calculate_metrics_from_stats,
    calculate_stats_for_files,
    calculate_stats_for_iterable,
    load_stats,
    save_stats,
)

__all__ = [
    "StackedRandomGenerator",
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "config_presets",
    "edm_sampler",
    "generate_images",
    "load_stats",
    "parse_int_list",
    "save_stats",
]
