#!/usr/bin/env python3
"""Precision, recall and inception score of a folder of images. See --help."""

from erk_guid.cli.precision_recall import precision_recall_command

if __name__ == "__main__":
    precision_recall_command()
