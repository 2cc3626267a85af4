"""A trace as a picture, and as one line per step."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from erk_guid.common.errors import ErkGuidError, MissingExtraError, printable
from erk_guid.common.files import OWN
from erk_guid.generation.trace import COLUMNS

LONGEST = 120
"""Characters of a title."""
QUANTILES = (0.05, 0.5, 0.95)
QUANTITIES = ("stiffness", "h_stiffness", "relative_correction", "step_size", "correction_size")

SUMMARY = (
    "step", "sigma", "sigma_next", "images", "gate_rate",
    *(f"{name}_q{round(100 * q):02d}" for name in QUANTITIES for q in QUANTILES),
)  # fmt: skip
"""Columns of `summarize`: quantiles over the images, and the share of open gates."""


def summarize(rows: np.ndarray) -> np.ndarray:
    """Compute one line per step, float64 [steps, len(SUMMARY)]; NaN where a step has no value.

    Args:
        rows: the rows of a trace, see `read_trace`.

    Raises:
        ErkGuidError: there are no rows, or they are from runs with different noise levels.
    """
    if not len(rows):
        raise ErkGuidError("the trace is empty: no image was made while it was written")
    columns = {name: rows[name] for name in COLUMNS}
    lines = []
    for step in np.unique(columns["step"]):
        of_step = {name: values[columns["step"] == step] for name, values in columns.items()}
        levels = np.unique(of_step["sigma"])
        if len(levels) > 1:
            raise ErkGuidError(
                f"the trace mixes runs: step {step:g} begins at sigma {levels[0]:g} and "
                f"{levels[-1]:g}; trace each run to a file of its own"
            )
        line = [step, levels[0], of_step["sigma_next"][0], len(of_step["seed"])]
        line.append(_of_known(np.mean, of_step["gate"]))
        line += [
            _of_known(lambda v, q=q: np.quantile(v, q), of_step[name])
            for name in QUANTITIES
            for q in QUANTILES
        ]
        lines.append(line)
    return np.asarray(lines, dtype=np.float64)


def _of_known(function: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(function(known)) if len(known) else float("nan")


def draw_trace(summary: np.ndarray, title: str) -> bytes:
    """Draw stiffness, stiffness times step, gate and correction over the noise levels, as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "the plot of a trace") from error
    data = dict(zip(SUMMARY, summary.T, strict=True))
    panels = (
        ("stiffness", "stiffness rho, in 1/sigma", True),
        ("h_stiffness", "step times stiffness, h rho", False),
        ("gate_rate", "share of images with an open gate", False),
        ("relative_correction", "correction over step", False),
    )
    settings: Any = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "font.family": "sans-serif", "text.parse_math": False,  # names of files may hold "$"
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        figure.suptitle(printable(title, LONGEST), x=0.02, ha="left", fontsize=12)
        for axes, (name, label, logarithmic) in zip(
            figure.subplots(2, 2).flat, panels, strict=True
        ):
            if name == "gate_rate" and np.isnan(data[name]).all():
                axes.set_axis_off()
                axes.text(0, 0.5, "no gate", transform=axes.transAxes)
                continue
            if name == "gate_rate":
                axes.plot(data["sigma"], data[name], "o-", color="#2563eb")
                axes.set_ylim(-0.03, 1.03)
            else:
                low, middle, high = (data[f"{name}_q{round(100 * q):02d}"] for q in QUANTILES)
                axes.fill_between(data["sigma"], low, high, color="#2563eb", alpha=0.2)
                axes.plot(data["sigma"], middle, "o-", color="#2563eb")
                if logarithmic and np.nanmax(high, initial=0) > 0:
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(bottom=0)
            axes.set_xscale("log")
            axes.invert_xaxis()
            axes.set_title(label, loc="left", fontsize=10)
            axes.grid(alpha=0.25)
        figure.supxlabel("noise level sigma the step begins at (median; band: 5 to 95 %)")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": OWN})
    return buffer.getvalue()
