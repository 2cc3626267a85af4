#!/usr/bin/env python3
"""Generate images: EDM2's command line with ERK guidance. See --help."""

from erk_guid.cli.generate import generate_command

if __name__ == "__main__":
    generate_command()
