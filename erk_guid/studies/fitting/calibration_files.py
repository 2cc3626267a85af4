"""A calibration as files: numbers, table and plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from erk_guid.common.files import MARKDOWN, write_bytes
from erk_guid.common.plots import COLOURS, Curve, draw
from erk_guid.generation.settings import SETTINGS_START
from erk_guid.guidance import ERKGuidance, settings_of
from erk_guid.studies.fitting.calibration import Calibration, Trial, is_published, written

FILES = ("settings.json", "trials.csv", "calibration.md", "calibration.svg")
"""Files that the command writes to its folder."""

COLUMNS = (
    "w_stiff", "w_con", "bound", "gate", "error", "ratio", "ratio_error", "step_ratio", "samples",
)  # fmt: skip
BEGINS = {"settings.json": SETTINGS_START, "trials.csv": (",".join(COLUMNS).encode(),)}
"""How those begin that others could have made, too."""
WORST_DRAWN = 1.3
"""Ratio to plain beyond which a setting is left out of the plot."""
FEWEST_DRAWN = 3
"""Fewest points that make a line."""
TICKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)


def write_trials(calibration: Calibration, outdir: Path, title: str, heading: str) -> None:
    """Write trials.csv, calibration.md and calibration.svg.

    Args:
        calibration: what was found.
        outdir: folder to write to.
        title: title of the plot.
        heading: what was measured, above the table.

    Raises:
        MissingExtraError: matplotlib is not installed; the other files are written before.
    """
    write_bytes(outdir / "trials.csv", trials_csv(calibration.trials).encode())
    write_bytes(outdir / "calibration.md", f"{MARKDOWN}{heading}\n\n{calibration.table()}".encode())
    write_bytes(outdir / "calibration.svg", plot(calibration, title))


def trials_csv(trials: Sequence[Trial]) -> str:
    """Return a CSV with one line for each setting that was tried."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for trial in trials:
        shown = settings_of(trial.guidance)
        numbers = (trial.error, trial.ratio, trial.ratio_error, trial.step_ratio)
        writer.writerow(
            [
                *written(trial.guidance),
                "" if shown["bound"] is None else f"{shown['bound']:g}",
                shown["gate"],
                *("" if math.isnan(number) else f"{number:.6g}" for number in numbers),
                trial.samples,
            ]
        )
    return text.getvalue()


def plot(calibration: Calibration, title: str) -> bytes:
    """Return an SVG: the error over plain's against w_stiff, a line for each of the best w_con.

    Settings that were tried on few samples have no error bar.
    """
    full = calibration.plain.samples
    lines: dict[float, list[Trial]] = {}
    for trial in calibration.trials:
        g = trial.guidance
        if is_published(g) and trial.ratio <= WORST_DRAWN:
            lines.setdefault(g.w_con, []).append(trial)
    long = [w_con for w_con, trials in lines.items() if len(trials) >= FEWEST_DRAWN]
    best = sorted(long, key=lambda w_con: min(t.ratio for t in lines[w_con]))
    curves = []
    for w_con in sorted(best[: len(COLOURS) - 2]):
        points = sorted(lines[w_con], key=strength_of)
        curves.append(
            Curve(
                f"w_con {w_con:g}",
                [strength_of(t) for t in points],
                [t.ratio for t in points],
                [t.ratio_error if t.samples == full else 0.0 for t in points],
            )
        )
    strengths = [x for curve in curves for x in curve.x] or [TICKS[0], TICKS[-1]]
    ends = [min(strengths), max(strengths)]
    for trial in calibration.trials:
        if not isinstance(trial.guidance, ERKGuidance):
            curves.append(
                Curve(written(trial.guidance)[0], ends, [trial.ratio] * 2, [trial.ratio_error] * 2)
            )
    curves.append(Curve("no guidance", ends, [1.0, 1.0], [0.0, 0.0], plain=True))
    return draw(
        f"{title}\n(with error bars: on {full} images, without: on fewer)", curves, "w_stiff",
        f"error ({calibration.objective}) over plain's", log_x=True, wanted_by="the plot",
        x_ticks=TICKS,
    )  # fmt: skip


def strength_of(trial: Trial) -> float:
    """Return w_stiff of a trial of the published form."""
    assert isinstance(trial.guidance, ERKGuidance)
    return trial.guidance.w_stiff
