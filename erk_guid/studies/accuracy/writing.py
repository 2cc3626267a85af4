"""The tables as files: numbers, Markdown, plots, and what they were made with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from erk_guid.common.files import MARKDOWN, write_bytes
from erk_guid.common.plots import Curve, draw, draw_bars
from erk_guid.studies.accuracy.measuring import Table
from erk_guid.studies.accuracy.nearness import Nearness

TABLE_FILES = ("accuracy.csv", "accuracy.md", "accuracy.json", "accuracy.svg")
NEARNESS_FILES = ("as-near.csv", "as-near.md", "as-near.svg")
BEGINS = {
    **dict.fromkeys(("accuracy.csv", "as-near.csv"), (b"problem,method,evaluations,",)),
    "accuracy.json": (b'{\n "net_sha256": ', b'{\n "problem": '),
}
"""How those begin that others could have made, too."""

PLOTTED = (
    "heun", "heun + ERK 0.5/0.5", "heun + ERK auto", "deis tab 4", "dpmpp 2 data", "unipc 3 data",
    "diffusers DEIS 3", "modal", "modal (logsnr)", "fitted",
)  # fmt: skip
"""The rows that the plot shows of a table with many rows."""


def is_ours(name: str) -> bool:
    """Return whether a row is in front of a picture: guidance, our solver, or a fit."""
    return "ERK" in name or name.startswith(("modal", "fitted"))


def write_table(table: Table, outdir: Path, settings: dict[str, Any]) -> None:
    """Write accuracy.csv, .md, .svg and .json.

    Raises:
        MissingExtraError: matplotlib is not installed; the other files are written before.
    """
    write_bytes(outdir / "accuracy.csv", table.csv().encode())
    write_bytes(outdir / "accuracy.md", (MARKDOWN + table.markdown()).encode())
    write_bytes(outdir / "accuracy.json", (json.dumps(settings, indent=1) + "\n").encode())
    write_bytes(outdir / "accuracy.svg", plot(table))


def write_nearness(nearness: Nearness, outdir: Path) -> None:
    """Write as-near.csv, .md and .svg.

    Raises:
        MissingExtraError: matplotlib is not installed; the other files are written before.
    """
    write_bytes(outdir / "as-near.csv", nearness.csv().encode())
    write_bytes(outdir / "as-near.md", (MARKDOWN + nearness.markdown()).encode())
    bars = [(name, found.evaluations) for name, found in nearness.ranked if found is not None]
    if "heun" not in nearness.found:
        bars.append(("heun", nearness.target.evaluations))
    picture = draw_bars(
        f"As near as Heun's {nearness.steps} noise levels: {nearness.problem}", bars,
        "network evaluations", wanted_by="the plot",
        front=[name for name, _ in bars if is_ours(name)], plain=["heun"],
    )  # fmt: skip
    write_bytes(outdir / "as-near.svg", picture)


def plot(table: Table) -> bytes:
    """Return an SVG of the errors over evaluations; of a long table, the rows in `PLOTTED`."""
    few = len(table.errors) <= len(PLOTTED) + 1
    curves = []
    for name, row in table.errors.items():
        if not few and name not in PLOTTED:
            continue
        known = [(float(c), e) for c, e in zip(table.evaluations, row, strict=True)
                 if not math.isnan(e.mean)]  # fmt: skip
        curves.append(
            Curve(
                name,
                [count for count, _ in known],
                [error.mean for _, error in known],
                [error.standard_error for _, error in known],
                plain=name == "heun",
                muted=name != "heun" and not is_ours(name) and any(map(is_ours, table.errors)),
            )
        )
    return draw(
        f"Distance to the exact solution: {table.problem}", curves, "network evaluations",
        "mean distance", log_x=True, wanted_by="the plot",
    )  # fmt: skip
