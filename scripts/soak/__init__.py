"""Faults against real runs of the command line: `make soak`, or `python -m scripts.soak --help`."""
