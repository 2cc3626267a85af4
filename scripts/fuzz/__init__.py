"""Fuzzing of every reader of files: `make fuzz`, or `python -m scripts.fuzz --help`."""
