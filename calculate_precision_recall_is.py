#!/usr/bin/env python3
"""Precision, recall and inception score of a folder of images. See --help."""

from erk_guid.cli import run_script

if __name__ == "__main__":
    run_script("precision-recall")  # it ends here
