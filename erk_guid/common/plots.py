"""Plots of lines and of bars, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from erk_guid.common.errors import MissingExtraError

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
"""In greyscale, the markers tell the curves apart."""
MARKERS = "osD^vPX*"
PLAIN = "#18181b"


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: for the legend.
        x, y, error: points and their standard errors (0 where not known).
        paper: the paper's points (x, y), drawn hollow.
        plain: whether it is the unguided baseline.
    """

    name: str
    x: list[float]
    y: list[float]
    error: list[float]
    paper: list[tuple[float, float]] = field(default_factory=list)
    plain: bool = False


def draw(
    title: str,
    curves: list[Curve],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    wanted_by: str = "the report",
    x_ticks: Sequence[float] | None = None,
) -> bytes:
    """Return an SVG of the curves; the vertical axis is logarithmic if they spread far.

    Args:
        title, x_label, y_label: texts.
        curves: at least one.
        log_x: whether the horizontal axis is logarithmic.
        wanted_by: what needs the plot; the error names it.
        x_ticks: ticks of a logarithmic axis, outside its range ignored; by default at the points.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _drawing(title, 4.6, wanted_by) as (figure, axes, svg):
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        for k, curve in enumerate(sorted(curves, key=lambda c: not c.plain)):
            colour = PLAIN if curve.plain else COLOURS[k % len(COLOURS)]
            axes.errorbar(
                curve.x, curve.y, yerr=curve.error if any(curve.error) else None,
                label=curve.name, color=colour, marker=MARKERS[k % len(MARKERS)], markersize=5,
                linewidth=2 if curve.plain else 1.4, capsize=2,
                linestyle="--" if curve.plain else "-",
            )  # fmt: skip
            if curve.paper:
                x, y = zip(*curve.paper, strict=True)
                axes.plot(
                    x, y, color=colour, marker=MARKERS[k % len(MARKERS)], markersize=9,
                    markerfacecolor="none", linestyle="none", label=f"{curve.name}, paper",
                )  # fmt: skip
        values = [y for c in curves for y in c.y]
        if min(values) > 0 and max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        if log_x:
            axes.set_xscale("log")
            points = sorted({x for c in curves for x in c.x})
            low, high = points[0], points[-1]
            ticks = points if x_ticks is None else [x for x in x_ticks if low <= x <= high]
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=3)
    return svg.getvalue()


def draw_bars(
    title: str, bars: Sequence[tuple[str, float]], x_label: str, wanted_by: str = "the report"
) -> bytes:
    """Return an SVG of horizontal bars, the first on top, each with its number.

    Args:
        title, x_label: texts.
        bars: names and lengths, at least one.
        wanted_by: what needs the plot; the error names it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names, lengths = zip(*bars, strict=True)
    with _drawing(title, 1.2 + 0.28 * len(bars), wanted_by) as (_, axes, svg):
        drawn = axes.barh(range(len(bars)), lengths, color=COLOURS[0], height=0.7)
        axes.bar_label(drawn, [f"{length:g}" for length in lengths], padding=3, fontsize=9)
        axes.set_yticks(range(len(bars)), names, fontsize=9)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel(x_label)
    return svg.getvalue()


@contextmanager
def _drawing(title: str, height: float, wanted_by: str) -> Iterator[tuple[Any, Any, io.BytesIO]]:
    """Give a figure, its axes, and a file that holds the SVG afterwards."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", wanted_by) from error
    settings: Any = {
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
        "svg.fonttype": "none", "svg.hashsalt": "erk_guid", "font.family": "sans-serif",
    }  # fmt: skip
    svg = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=12, loc="left")
        yield figure, axes, svg
        figure.savefig(svg, format="svg", metadata={"Date": None})
