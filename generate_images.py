#!/usr/bin/env python3
"""Generate images: EDM2's command line with ERK guidance. See --help.

Scripts of EDM2's users find its functions here under their own names.
"""

from erk_guid.cli import run_script

if __name__ == "__main__":
    run_script("generate")  # it ends here

from erk_guid.integrations.edm2 import (
    StackedRandomGenerator,
    config_presets,
    edm_sampler,
    generate_images,
    parse_int_list,
)

__all__ = [
    "StackedRandomGenerator",
    "config_presets",
    "edm_sampler",
    "generate_images",
    "parse_int_list",
]
