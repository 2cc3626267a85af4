"""Plots of lines and of bars, as SVG."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from erk_guid.common.errors import MissingExtraError
from erk_guid.common.files import OWN

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
"""In greyscale, the markers tell the curves apart."""
MARKERS = "osD^vPX*"
PLAIN = "#18181b"
MUTED = ("#94a3b8", "#d6b37a", "#a7c4b0", "#d8a9c0", "#b9aee0", "#9ec9d6", "#c3c9a0", "#e0b0a8")
MUTED_MARKERS = "<>hpd8H|"
"""For curves that are there to compare with."""


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: for the legend.
        x, y, error: points and their standard errors (0 where not known).
        paper: the paper's points (x, y), drawn hollow.
        plain: whether it is the unguided baseline.
        muted: whether it is there to compare with; others are drawn over it.
    """

    name: str
    x: list[float]
    y: list[float]
    error: list[float]
    paper: list[tuple[float, float]] = field(default_factory=list)
    plain: bool = False
    muted: bool = False


def draw(
    title: str,
    curves: list[Curve],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    wanted_by: str = "the report",
    x_ticks: Sequence[float] | None = None,
    y_ticks: Sequence[float] | None = None,
) -> bytes:
    """Return an SVG of the curves; the vertical axis is logarithmic if they spread far.

    Args:
        title, x_label, y_label: texts.
        curves: at least one.
        log_x: whether the horizontal axis is logarithmic.
        wanted_by: what needs the plot; the error names it.
        x_ticks: ticks; on a logarithmic axis those outside its range are ignored, and by default
            they are at the points.
        y_ticks: ticks of the vertical axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _drawing(title, 4.6, wanted_by) as (figure, axes, svg):
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        handles = []
        for curve, style in _styled(curves):
            # Without error bars in the legend, which hide the markers there.
            handles += axes.plot(curve.x, curve.y, label=curve.name, **style)
            if any(curve.error):
                axes.errorbar(
                    curve.x, curve.y, yerr=curve.error, fmt="none", ecolor=style["color"],
                    capsize=2, elinewidth=1, zorder=style["zorder"],
                )  # fmt: skip
            if curve.paper:
                x, y = zip(*curve.paper, strict=True)
                handles += axes.plot(
                    x, y, label=f"{curve.name}, paper",
                    **{**style, "linestyle": "none", "markersize": 9, "markerfacecolor": "none"},
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
        elif x_ticks is not None:
            axes.set_xticks(x_ticks)
        if y_ticks is not None:
            axes.set_yticks(y_ticks)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        figure.legend(
            handles=handles, loc="outside lower center", frameon=False, fontsize=10, ncols=3
        )
    return svg.getvalue()


def _styled(curves: Sequence[Curve]) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """Yield the curves in the legend's order, each with a colour and a marker of its own."""
    front = [c for c in curves if not c.plain and not c.muted]
    groups = (
        ([c for c in curves if c.plain], (PLAIN,), "o", {"linewidth": 2, "zorder": 4}),
        (front, COLOURS, MARKERS[1:] + MARKERS[:1], {"linewidth": 1.8, "zorder": 3}),
        ([c for c in curves if c.muted], MUTED, MUTED_MARKERS, {"linewidth": 1.1, "zorder": 2}),
    )
    for group, colours, markers, common in groups:
        for k, curve in enumerate(group):
            # Where there are more curves than colours, the same colour has another marker.
            marker = markers[(k + k // len(colours)) % len(markers)]
            style = {"color": colours[k % len(colours)], "marker": marker, "markersize": 5.5}
            yield curve, {**common, **style, "linestyle": "--" if curve.plain else "-"}


def draw_bars(
    title: str,
    bars: Sequence[tuple[str, float]],
    x_label: str,
    wanted_by: str = "the report",
    front: Collection[str] = (),
    plain: Collection[str] = (),
) -> bytes:
    """Return an SVG of horizontal bars, the first on top, each with its number.

    Args:
        title, x_label: texts.
        bars: names and lengths, at least one.
        front: names of bars in colour; if there are any, the others are muted.
        plain: names of the baseline's bars.
        wanted_by: what needs the plot; the error names it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names, lengths = zip(*bars, strict=True)
    with _drawing(title, 1.2 + 0.28 * len(bars), wanted_by) as (_, axes, svg):
        usual = MUTED[0] if front else COLOURS[0]
        colours = [
            PLAIN if name in plain else COLOURS[0] if name in front else usual for name in names
        ]
        drawn = axes.barh(range(len(bars)), lengths, color=colours, height=0.7)
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
        "text.parse_math": False,  # names may hold "$"
    }  # fmt: skip
    svg = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=12, loc="left")
        yield figure, axes, svg
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": OWN})
