"""Draw docs/images/digits-evaluations.svg from the tables of docs/digits.md."""

from __future__ import annotations

import re
from pathlib import Path

from erk_guid.common.plots import Curve, draw

DOCS = Path(__file__).resolve().parents[1] / "docs"
FRONT = {"no ERK guidance": "plain Heun", "ERK-Guid 0.5 / 0.5": "published, 0.5 / 0.5"}
"""Rows of the sweep in front, with their names in the picture."""


def curves() -> list[Curve]:
    """Return a curve for each setting, over the network evaluations of an image."""
    text = (DOCS / "digits.md").read_text()
    found: dict[str, Curve] = {}

    def add(name: str, evaluations: float, score: str, error: str = "0") -> None:
        plain, muted = name == "no ERK guidance", name.startswith("ERK") and name not in FRONT
        shown = FRONT.get(name, name.removeprefix("ERK-Guid "))
        curve = found.setdefault(name, Curve(shown, [], [], [], plain=plain, muted=muted))
        curve.x.append(evaluations)
        curve.y.append(float(score))
        curve.error.append(float(error))

    row = r"^\| (\d+) \| (no ERK guidance|ERK-Guid [^|]+?) \| ([\d.]+) ± ([\d.]+) "
    for steps, name, score, error in re.findall(row, text, re.M):
        add(name, 2 * int(steps) - 1, score, error)
    for calls, score in re.findall(
        r"^\| \d+ \| (\d+) \| [\d.]+ \| [\d.]+ \| ([\d*.]+) ", text, re.M
    ):
        add("parameter-free", float(calls), score.strip("*"))
    row = r"^\| (modal[^|]*?) \| (\d+) \| ([\d.]+) ± ([\d.]+) "
    for name, calls, score, error in re.findall(row, text, re.M):
        add(name, float(calls), score, error)
    return [curve for curve in found.values() if len(curve.x) > 1]


def main() -> None:
    """Draw the picture."""
    picture = draw(
        "FD-digits against evaluations, digits model", curves(), "network evaluations an image",
        "FD-digits (lower is better)", log_x=True, x_ticks=(6, 9, 11, 15, 23, 31, 63),
        wanted_by="the picture",
    )  # fmt: skip
    (DOCS / "images" / "digits-evaluations.svg").write_bytes(picture)


if __name__ == "__main__":
    main()
