#!/usr/bin/env python3
"""Generate images: EDM2's command line with ERK guidance. See --help.

Scripts of EDM2's users find its functions here under their own names.
"""

from erk_guid.cli.generate import generate_command
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

if __name__ == "__main__":
    generate_command()
