"""The report: paper beside measured, plots, samples; as one HTML file and as Markdown."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from erk_guid._version import __version__
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import check_writable, write_bytes
from erk_guid.common.pictures import is_whole_png
from erk_guid.common.plots import Curve, draw
from erk_guid.metrics.scores.neighbours import NEIGHBOURS
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.studies.reproduce.findings import (
    CLEAR,
    EMPTY,
    Findings,
    name_of_metric,
    number,
    stated,
)
from erk_guid.studies.reproduce.planning import Reproduction, slug, spell
from erk_guid.studies.reproduce.runner import read_results
from erk_guid.studies.reproduce.tables import CAPTIONS, NOTES, PAPER_NUM, Row

LONGEST = 4000
"""Characters of one text in a report."""

SMALL_PICTURE = 100_000
"""Bytes of a picture that is embedded as it is."""


@dataclass(frozen=True)
class Cell:
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    title: str
    path: Path
    """Relative to the report."""
    uri: Markup
    """The picture itself, for the self-contained file."""


def write_report(job: Reproduction) -> list[Path]:
    """Write `report.html`, `report.md` and the plots into the job's folder; return the two.

    Raises:
        ErkGuidError: a file cannot be read or written.
    """
    findings = Findings(job, read_results(job.outdir))
    plots = [
        _picture(
            job.outdir, title, Path("plots") / f"{slug(name)}.svg", draw(title, curves, **labels)
        )
        for name, title, curves, labels in _curves(findings)
    ]
    content = {
        "title": "ERK-Guid: paper and measurement" if findings.comparable
        else f"ERK-Guid on the model {findings.model}",
        "date": datetime.now(timezone.utc).strftime("%d %B %Y").lstrip("0"),
        "facts": _facts(findings),
        "summary": _summary(findings),
        "tables": [_table(findings, table) for table in findings.tables],
        "best": [best] if (best := _best(findings)) else [],
        "plots": plots,
        "samples": _samples(findings),
        "commands": _commands(findings),
        "version": __version__,
    }  # fmt: skip
    written = []
    for suffix, escape in (("html", _for_html), ("md", _for_markdown)):
        template = (files("erk_guid.studies.reproduce") / f"report.{suffix}.j2").read_text(
            encoding="utf-8"
        )
        environment = Environment(
            autoescape=suffix == "html", finalize=escape, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["verbatim"] = _verbatim
        text = environment.from_string(template).render(content)
        written.append(_write(job.outdir, Path(f"report.{suffix}"), text.encode()))
    return written


def _for_html(value: object) -> object:
    """Make a text printable; the template escapes it afterwards."""
    return value if isinstance(value, Markup) else printable(value, LONGEST)


def _for_markdown(value: object) -> str:
    """Return a text that Markdown shows as it is: on one line, in a table or a link, too."""
    if isinstance(value, Markup):
        return str(value)
    text = re.sub(r"[\\`*~$\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(value, LONGEST))
    return text.translate(_ENTITIES)


_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})


def _verbatim(value: object) -> Markup:
    """Mark a text of one line that stands in a block of code, where nothing is escaped."""
    return Markup(printable(value, LONGEST))


def _write(outdir: Path, relative: Path, data: bytes) -> Path:
    """Write a file of the report; return where it is.

    Raises:
        ErkGuidError: it cannot be written, does not lie in the report's folder, or would replace
            somebody's file.
    """
    path = outdir / relative
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(outdir)):
        raise ErkGuidError(f"cannot write {path}: it leads out of {outdir}; remove the link")
    check_writable(path)
    try:
        write_bytes(path, data)
    except OSError as error:
        raise ErkGuidError(f"cannot write {path}: {error}") from error
    return path


def _facts(findings: Findings) -> list[tuple[str, str]]:
    """Return what the numbers depend on; all values that occur if rows differ."""
    seeds = findings.job.chosen_seeds
    spelled = spell(seeds)
    several = spelled if len(spelled) < 60 else f"{spelled[:57]}…"
    results = findings.by_row.values()

    def distinct(describe: Callable[[Any], str]) -> str:
        return "; ".join(dict.fromkeys(map(describe, results)))

    facts = [("Model", findings.model), ("Images per row", f"{len(seeds):,}, seeds {several}")]
    if results:
        facts += [
            ("Reference", distinct(lambda r: _reference_fact(r["reference"]))),
            ("Detectors", distinct(lambda r: "; ".join(map(_detector_fact, r["detectors"])))),
            ("Device", distinct(lambda r: f"{r['device']}, {r['processes']} process(es)")),
            ("Versions", distinct(lambda r: ", ".join(map(" ".join, r["versions"].items())))),
        ]
    return facts


def _reference_fact(reference: Mapping[str, Any]) -> str:
    return f"{reference['source']} (SHA-256 {reference['sha256'][:12]}…)"


def _detector_fact(detector: Mapping[str, Any]) -> str:
    return f"{detector['name']}: {detector['preprocessing']}"


def _summary(findings: Findings) -> list[str]:
    """Return what the tables say, in sentences."""
    rows = findings.rows
    done = [r for r in rows if r.id in findings.by_row]
    lines = [f"{len(done)} of {len(rows)} rows measured."]
    if not findings.comparable and any(row.paper for row in rows):
        lines.append(
            f"The model ({findings.model}) or its scoring is not the paper's: the paper's "
            "numbers stand beside for orientation and are not comparable."
        )
    elif findings.comparable and len(findings.job.chosen_seeds) < PAPER_NUM:
        lines.append(
            f"With {len(findings.job.chosen_seeds):,} images, distances come out larger than "
            f"with the paper's {PAPER_NUM:,}; compare them among each other only."
        )
    for metric in findings.metrics:
        changes = [c for c in (findings.change(r, metric) for r in done) if c is not None]
        if not changes:
            continue
        if all(c.error is None for c in changes):
            lower = sum(c.value < 0 for c in changes)
            lines.append(
                f"{name_of_metric(metric)}: with ERK-Guid lower in {lower} of {len(changes)} "
                "guided rows (no standard errors were computed; see --bootstrap)."
            )
            continue
        better = sum(c.verdict == "better" for c in changes)
        worse = sum(c.verdict == "worse" for c in changes)
        lines.append(
            f"{name_of_metric(metric)}: of {len(changes)} guided rows, {better} are better than "
            f"the unguided run of the same steps by more than {CLEAR:g} standard errors, {worse} "
            f"are worse, and {len(changes) - better - worse} show no clear difference."
        )
    return lines


def _table(findings: Findings, table: str) -> Table:
    rows = [r for r in findings.rows if r.table == table]
    paper_metrics = list(dict.fromkeys(m for r in rows for m in r.paper))
    metrics = findings.metrics or paper_metrics
    shared = [m for m in metrics if m in paper_metrics] if findings.comparable else []
    scored = any(findings.quality(r) for r in rows)
    # Otherwise from features, if these and the reference's were kept.
    quality = [
        m for m in metrics if not scored and any(findings.precision_recall(r, m) for r in rows)
    ]
    columns = ["Steps", "Run", "Evaluations"]
    for metric in [m for m in paper_metrics if m not in shared]:
        columns.append(f"Paper's {name_of_metric(metric)}")
    for metric in metrics:
        if metric in shared:
            columns.append(f"{name_of_metric(metric)}, paper")
        columns.append(f"{name_of_metric(metric)}, measured")
        if metric in shared:
            columns.append("Difference")
        columns.append("Change by ERK-Guid")
    if scored:
        columns += [name for name, _ in _QUALITY]
    for _ in quality:
        columns += ["Precision", "Recall"]
    body = []
    for row in rows:
        title = row.title + (f" ({row.note})" if row.note else "")
        cells = [Cell(str(row.steps)), Cell(title), Cell(str(row.evaluations))]
        for metric in [m for m in paper_metrics if m not in shared]:
            cells.append(Cell(stated(row.paper.get(metric)), "paper"))
        for metric in metrics:
            cells += _measured(findings, row, metric, metric in shared)
        if scored:
            values = findings.quality(row)
            cells += [Cell(f"{values[key]:.3f}" if key in values else EMPTY) for _, key in _QUALITY]
        for metric in quality:
            found = findings.precision_recall(row, metric)
            cells += [Cell(f"{v:.3f}") for v in found] if found else [Cell(EMPTY)] * 2
        body.append(cells)
    notes = [NOTES[table]] if table in NOTES else []
    if any(findings.error(r, m) is not None for r in rows for m in metrics):
        notes.append(
            "± is a standard error (bootstrap over images; for the change, over pairs of images "
            f"from the same seeds). Coloured changes exceed {CLEAR:g} standard errors."
        )
    if quality:
        notes.append(f"Precision and recall: k = {NEIGHBOURS}, against the reference's features.")
    return Table(CAPTIONS[table], columns, body, " ".join(notes))


_QUALITY = (
    ("Precision", "precision"),
    ("Recall", "recall"),
    ("Inception score", "inception_score_mean"),
)
"""Columns and the scores that they show."""


def _measured(findings: Findings, row: Row, metric: str, shared: bool) -> list[Cell]:
    score, error = findings.score(row, metric), findings.error(row, metric)
    scatter = "" if error is None else f" ± {number(error)}"
    cells = []
    if shared:
        cells.append(Cell(stated(row.paper.get(metric)), "paper"))
    cells.append(Cell(number(score) + scatter, "measured"))
    if shared:
        known = score is not None and metric in row.paper
        apart = score - row.paper[metric] if known and score is not None else None
        cells.append(Cell(number(apart, sign=True)))
    change = findings.change(row, metric)
    cells.append(Cell(str(change), change.verdict) if change else Cell(EMPTY))
    return cells


def _best(findings: Findings) -> Table | None:
    """Return the setting with the lowest score for every group of rows."""
    body = []
    for metric in findings.metrics:
        for group in dict.fromkeys(r.group for r in findings.rows):
            scored = [
                (score, row)
                for row in findings.rows
                if row.group == group and (score := findings.score(row, metric)) is not None
            ]
            if len(scored) < 3:  # a baseline and one setting leave nothing to choose
                continue
            score, row = min(scored, key=lambda pair: pair[0])
            change = findings.change(row, metric)
            body.append(
                [
                    Cell(str(row.steps)),
                    Cell(row.title),
                    Cell(name_of_metric(metric)),
                    Cell(number(score)),
                    Cell(str(change), change.verdict) if change else Cell(EMPTY),
                ]
            )
    if not body:
        return None
    note = (
        "The lowest of several noisy numbers is lower than it would be with new seeds: read the "
        "table above before trusting a small lead."
    )
    columns = ["Steps", "Lowest with", "Metric", "Score", "Change by ERK-Guid"]
    return Table("Best settings among those tried", columns, body, note)


def _curves(findings: Findings) -> list[tuple[str, str, list[Curve], dict[str, Any]]]:
    """Return the plots as (file name, title, curves, axis labels)."""
    plots: list[tuple[str, str, list[Curve], dict[str, Any]]] = []
    for metric in findings.metrics:
        y_label = f"{name_of_metric(metric)} (lower is better)"
        for table in findings.tables:
            rows = [r for r in findings.rows if r.table == table]
            several = len({r.solver for r in rows}) > 1
            over = "evaluations" if several else "steps"
            curves = []
            for name in dict.fromkeys(r.title for r in rows):
                of_name = [r for r in rows if r.title == name]
                points = [(r.evaluations if several else r.steps, r) for r in of_name]
                curve = replace(
                    _curve(findings, metric, printable(name), points),
                    plain=of_name[0].solver == "heun" and not of_name[0].guided,
                    muted=not _in_front(of_name[0]),
                )
                if len(curve.x) > 1 or (curve.x and table == "2"):
                    curves.append(curve)
            if sum(len(c.x) for c in curves) > 1 and len({x for c in curves for x in c.x}) > 1:
                title = f"{name_of_metric(metric)} against {over}, {_short(table)}"
                labels = {"x_label": over, "y_label": y_label, "log_x": True}
                plots.append((f"{metric}-{over}-{table}", title, curves, labels))
            for group in dict.fromkeys(r.group for r in rows):
                plots += _sweep(findings, metric, [r for r in rows if r.group == group], y_label)
    return plots


def _in_front(row: Row) -> bool:
    """Return whether a row's curve is in front: of a sweep, the pair that is recommended."""
    chosen = PRESETS[row.model].erk if row.model in PRESETS else None
    swept = row.guided and not isinstance(row.w_stiff, str)
    return not swept or chosen is None or (row.w_stiff, row.w_con) == tuple(chosen)


def _sweep(
    findings: Findings, metric: str, rows: list[Row], y_label: str
) -> list[tuple[str, str, list[Curve], dict[str, Any]]]:
    """Return a plot of score against w_stiff, a curve for each w_con, the unguided run at 0."""
    known = [r for r in rows if isinstance(r.w_stiff, float | int) and r.id in findings.by_row]
    plain = [(0.0, r) for r in known if not r.guided]
    curves = []
    for w_con in sorted({r.w_con for r in known if r.w_con is not None}):
        points = [(float(r.w_stiff or 0), r) for r in known if r.w_con == w_con]
        if len(points) > 1:
            curves.append(_curve(findings, metric, f"w_con {w_con:g}", plain + points))
    if not curves:
        return []
    row = known[0]
    name = f"{metric}-w_stiff-{row.table}-{row.steps:02d}-{row.family}"
    title = f"{name_of_metric(metric)} against w_stiff, {row.steps} steps, {_short(row.table)}"
    return [(name, title, curves, {"x_label": "w_stiff (0: no guidance)", "y_label": y_label})]


def _curve(
    findings: Findings, metric: str, name: str, points: Sequence[tuple[float, Row]]
) -> Curve:
    found = [
        (x, score, findings.error(row, metric) or 0.0, row.paper.get(metric))
        for x, row in sorted(points, key=lambda point: point[0])
        if (score := findings.score(row, metric)) is not None
    ]
    paper = [(x, p) for x, _, _, p in found if p is not None] if findings.comparable else []
    return Curve(name, [f[0] for f in found], [f[1] for f in found], [f[2] for f in found], paper)


def _short(table: str) -> str:
    return {"digits": "digits model", "settings": "own settings"}.get(table, f"table {table}")


def _samples(findings: Findings) -> list[tuple[str, list[Picture]]]:
    """Return the grids of the same seeds, by group of rows."""
    groups: dict[str, list[Picture]] = {}
    for row in findings.rows:
        if row.id not in findings.by_row:
            continue
        path = findings.plans[row.id].grid
        embedded = _embedded(path) if is_whole_png(path) else None
        if embedded is None:
            continue
        name = f"{row.steps} steps" + ("" if row.family == "plain" else f", {row.family}")
        relative = path.relative_to(findings.job.outdir)
        groups.setdefault(name, []).append(Picture(row.title, relative, embedded))
    return list(groups.items())


def _embedded(path: Path) -> Markup | None:
    """Return a picture as a data URI; large ones as JPEG, so that the report can be mailed.

    A picture that cannot be decoded is left out, like one that is not there: None.
    """
    buffer = io.BytesIO()
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=85)
    except Exception:  # decoders raise many kinds for damaged files
        return None
    small = len(data) <= SMALL_PICTURE
    return _data_uri("image/png", data) if small else _data_uri("image/jpeg", buffer.getvalue())


def _picture(outdir: Path, title: str, relative: Path, svg: bytes) -> Picture:
    _write(outdir, relative, svg)
    return Picture(title, relative, _data_uri("image/svg+xml", svg))


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _commands(findings: Findings) -> list[str]:
    """Return the commands of the first row that was run; every row is made in this way."""
    latest = next(iter(findings.by_row.values()), None)
    return list(latest["commands"]) if latest else []
