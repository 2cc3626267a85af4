#!/usr/bin/env python3
"""Precision, recall and inception score of a folder of images. See --help."""

from erk_guid.cli.quality import quality_command

if __name__ == "__main__":
    quality_command()
