"""The table as files: numbers, Markdown, a plot, and what it was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from erk_guid.common.files import write_bytes
from erk_guid.common.plots import Curve, draw
from erk_guid.studies.accuracy.measuring import Table

SUFFIXES = (".csv", ".md", ".json", ".svg")
"""Suffixes of the files written."""

PLOTTED = (
    "heun", "heun + ERK 0.5/0.5", "heun + ERK auto", "deis tab 4", "dpmpp 2 data", "unipc 3 data",
    "diffusers DEIS 3", "modal", "modal (logsnr)",
)  # fmt: skip
"""The rows that the plot shows of a table with many rows."""


def write_table(table: Table, outdir: Path, settings: dict[str, Any]) -> None:
    """Write accuracy.csv, .md, .svg and .json.

    Raises:
        MissingExtraError: matplotlib is not installed; the other files are written before.
    """
    write_bytes(outdir / "accuracy.csv", table.csv().encode())
    write_bytes(outdir / "accuracy.md", table.markdown().encode())
    write_bytes(outdir / "accuracy.json", (json.dumps(settings, indent=1) + "\n").encode())
    write_bytes(outdir / "accuracy.svg", plot(table))


def plot(table: Table) -> bytes:
    """Return an SVG of the errors over evaluations; of a long table, the rows in `PLOTTED`."""
    few = len(table.errors) <= len(PLOTTED) + 1
    curves = [
        Curve(
            name,
            [float(count) for count in table.evaluations],
            [error.mean for error in row],
            [error.standard_error for error in row],
            plain=name == "heun",
        )
        for name, row in table.errors.items()
        if few or name in PLOTTED
    ]
    return draw(
        f"Distance to the exact solution: {table.problem}", curves, "network evaluations",
        "mean distance", log_x=True, wanted_by="the plot",
    )  # fmt: skip
