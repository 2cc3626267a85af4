#!/usr/bin/env python3
"""Score images: FID, FD-DINOv2 and other Frechet distances. See --help."""

from erk_guid.cli.metrics import metrics_command

if __name__ == "__main__":
    metrics_command()
