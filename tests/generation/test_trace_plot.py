"""Traces drawn and summed up."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from erk_guid.cli import main
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.plots import Curve, draw, draw_bars
from erk_guid.generation.trace import ROW, read_trace, write_trace
from erk_guid.generation.trace_plot import SUMMARY, summarize


@pytest.mark.slow
def test_a_real_trace_is_drawn(tmp_path: Path) -> None:
    for suffix in (".csv", ".npz"):
        trace = tmp_path / f"t{suffix}"
        done = CliRunner().invoke(main, [
            "generate", "--preset=digits", "--device=cpu", "--seeds=0-4", "--steps=5",
            "--w_stiff=0.5", f"--outdir={tmp_path / suffix[1:]}", f"--trace={trace}",
        ])  # fmt: skip
        assert done.exit_code == 0, done.output
        done = CliRunner().invoke(main, ["plot-trace", str(trace), "--title", "five"])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
        with open(tmp_path / "t-steps.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert [line["step"] for line in lines] == ["0", "1", "2", "3", "4"]
        assert lines[0]["stiffness_q50"] == lines[4]["stiffness_q50"] == ""
        rows = read_trace(trace)
        rho = rows["stiffness"][rows["step"] == 2]
        assert float(lines[2]["stiffness_q50"]) == pytest.approx(np.median(rho), rel=1e-5)
        assert float(lines[3]["gate_rate"]) == 1


def test_rows_that_are_there_twice_count_once(tmp_path: Path) -> None:
    # Catches: a trace that was put together twice, with twice as many images.
    trace = tmp_path / "t.csv"
    write_trace(
        trace, np.array([(s, k, 2.0, 1.0, *[0.5] * 6) for s in (0, 1) for k in (0, 1)], ROW)
    )
    lines = trace.read_text().splitlines()
    trace.write_text("\n".join([*lines, *lines[1:]]) + "\n")
    done = CliRunner().invoke(main, ["plot-trace", str(trace)])
    assert done.exit_code == 0, done.output
    assert "4 rows of" in done.output
    with open(tmp_path / "t-steps.csv", newline="") as file:
        assert [line["images"] for line in csv.DictReader(file)] == ["2", "2"]


def test_a_summary_counts_and_orders(tmp_path: Path) -> None:
    rows = np.array([(0, 0, *[np.nan] * (len(ROW) - 2))] * 8, ROW)
    rows["seed"], rows["step"] = np.repeat(np.arange(4), 2), np.tile([0, 1], 4)
    rows["sigma"], rows["sigma_next"] = np.tile([3.0, 1.0], 4), np.tile([1.0, 0.5], 4)
    second = rows["step"] == 1
    rows["gate"][second] = [1, 0, 0, 0]
    rows["stiffness"][second] = [4, 1, 2, 3]
    write_trace(tmp_path / "t.csv", rows)
    summary = summarize(read_trace(tmp_path / "t.csv"))
    line = dict(zip(SUMMARY, summary[1], strict=True))
    assert (line["images"], line["gate_rate"], line["stiffness_q50"]) == (4, 0.25, 2.5)
    assert np.isnan(summary[0, 4:]).all()
    rows["sigma"][0] = 2.0
    with pytest.raises(ErkGuidError, match="mixes runs: step 0 begins at sigma 2 and 3"):
        summarize(rows)
    with pytest.raises(ErkGuidError, match="the trace is empty"):
        summarize(rows[:0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "", "is no trace: those end in"),
        ("t.csv", "a,b\n1,2\n", "cannot read the trace"),
        ("missing.csv", None, "cannot read the trace"),
        ("t.npz", "no zip", "cannot read"),
    ],
)
def test_what_is_no_trace(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = CliRunner().invoke(main, ["plot-trace", str(tmp_path / name)])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("name", [b"n\xff$\\frac{$.csv", b"$_{$ & <b>.csv"])
def test_names_that_cannot_be_written_in_a_picture(name: bytes, tmp_path: Path) -> None:
    # Before: matplotlib's traceback, about a name that is not UTF-8. "$" begins a formula there.
    trace = tmp_path / os.fsdecode(name)
    write_trace(trace, np.zeros(3, ROW))
    for title in ([], [f"--title={trace.name}"]):
        done = CliRunner().invoke(main, ["plot-trace", str(trace), *title])
        assert done.exit_code == 0, done.output
        assert trace.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        trace.with_suffix(".png").unlink()
    stem = printable(trace.stem)
    assert b"<svg" in draw_bars(stem, [(stem, 1.0)], stem)
    assert b"<svg" in draw(stem, [Curve(stem, [1.0, 2.0], [1.0, 2.0], [0.0, 0.0])], "x", "y")


def test_neither_the_trace_nor_a_folder_is_overwritten(tmp_path: Path) -> None:
    trace = tmp_path / "run-steps.csv"
    write_trace(trace, np.array([(0, 0, 2.0, 1.0, *[0.5] * 6)], ROW))
    before = trace.read_bytes()
    done = CliRunner().invoke(
        main, ["plot-trace", str(trace), "--dest", str(tmp_path / "run.png")]
    )  # fmt: skip
    assert done.exit_code == 1
    assert "would overwrite the trace" in done.output
    assert trace.read_bytes() == before
    (tmp_path / "a-steps.csv").mkdir()
    done = CliRunner().invoke(main, ["plot-trace", str(trace), "--dest", str(tmp_path / "a.png")])
    assert "it is a folder" in done.output
    # A title is text, not mathematics.
    done = CliRunner().invoke(
        main, ["plot-trace", str(trace), "--dest", str(tmp_path / "b.png"), "--title", "$x_$"]
    )
    assert done.exit_code == 0, done.output
