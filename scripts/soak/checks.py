"""What must hold after each process, and when a job is done; every function returns findings."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from scripts.soak.jobs import Job, Rows, Undisturbed, rows_of
from scripts.soak.programs import Ended

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
"""Exit codes after a signal."""
TRACEBACK = "Traceback (most recent call last)"
MENDING = ("--resume", "the same command begins again")
"""What tells a user how to go on."""
DONE = " made in "
"""What the program says last."""
TOLERANCE = 1e-2
"""Relative, between values of two traces: batches of other sizes round otherwise."""
IMAGE_NAME = re.compile(r"^\d{6,18}\.png$")
KEPT = re.compile(r"\.trace\.\d+\.part$")
"""Rows of a trace, which stay with the images."""


class Found(NamedTuple):
    """Findings, and how many images differ by one level in some pixels."""

    findings: list[str]
    rounding: int = 0


def after_signal(ended: Ended) -> list[str]:
    """Check a process that was sent signals."""
    first = ended.sent[0]
    name = signal.Signals(first.number).name
    if ended.code is None:
        return [f"no end after {name}"]
    if ended.code == 0 or any(s.number == signal.SIGKILL for s in ended.sent):
        return tracebacks(ended) if first.listening else []
    if not first.listening:
        return []  # Python itself was beginning
    if first.ending and ended.code == -first.number:
        return tracebacks(ended)  # it had come to its end, and Python itself was ending
    findings = tracebacks(ended)
    told = any(text in ended.err for text in MENDING)
    if DONE in ended.out or (told and len(ended.sent) > 1 and ended.code == -first.number):
        return findings  # all was done and said, and Python itself was ending
    if ended.code != CODES[signal.Signals(first.number)]:
        findings.append(f"exit code {ended.code} after {name}: {ended.error!r}")
    elif first.begun and not told:
        findings.append(f"nothing says how to go on after {name}: {ended.error!r}")
    return findings


def tracebacks(ended: Ended) -> list[str]:
    """Check that a process printed no traceback."""
    text = ended.out + ended.err
    if TRACEBACK not in text:
        return []
    block = text.partition(TRACEBACK)[2]
    ends = [line for line in block.splitlines() if re.match(r"^[A-Za-z_][\w.]*(:|$)", line)]
    return [f"traceback: {ends[0] if ends else 'no end'}"]


def refused(ended: Ended, *words: str) -> list[str]:
    """Check a process that must end with an error: code 1, and one line with these words."""
    findings = tracebacks(ended)
    errors = [line for line in ended.err.replace("\r", "\n").splitlines() if "Error: " in line]
    if ended.code != 1:
        findings.append(f"exit code {ended.code} where 1 was due: {ended.error!r}")
    elif len(errors) != 1:
        findings.append(f"{len(errors)} lines of error: {ended.error!r}")
    elif not all(word in errors[0] for word in words):
        findings.append(f"the error does not say {' and '.join(words)}: {errors[0]!r}")
    return findings


def succeeded(ended: Ended) -> list[str]:
    """Check a process that nothing disturbed."""
    findings = tracebacks(ended)
    if ended.code != 0:
        findings.append(f"exit code {ended.code} of an undisturbed process: {ended.error!r}")
    return findings


def unchanged(job: Job, before: dict[int, tuple[int, int]]) -> list[str]:
    """Check that images which were whole have not been made again."""
    now = job.there()
    again = [seed for seed, stamp in before.items() if now.get(seed) != stamp]
    return [f"{len(again)} whole images were made again, such as {again[0]}"] if again else []


def stopped(job: Job) -> list[str]:
    """Check the folder after a process that ended by itself: nothing half-written is left."""
    left = [p.name for p in _entries(job) if ".partial" in p.name or ".lock" in p.name]
    return [f"left after a stop: {', '.join(sorted(left)[:3])}"] if left else []


def finished(job: Job, reference: Undisturbed, skipped: Collection[int] = ()) -> Found:
    """Check a job that is done against the undisturbed one."""
    images = _images(job, reference, skipped)
    findings = [
        *images.findings, *_leftovers(job), *_run(job, reference, skipped),
        *_trace(job, reference, skipped), *_grid(job),
    ]  # fmt: skip
    return Found(findings, images.rounding)


def _entries(job: Job) -> list[Path]:
    beside = {path.parent for path in (job.trace, job.grid) if path} - {job.outdir}
    hidden = [p for folder in beside for p in folder.glob(".*") if p.is_file()]
    return [p for p in job.outdir.rglob("*") if p.is_file()] + hidden


def _leftovers(job: Job) -> list[str]:
    left = [
        p.name
        for p in _entries(job)
        if not IMAGE_NAME.match(p.name) and p.name != "run.json" and not KEPT.match(p.name)
    ]
    return [f"left at the end: {', '.join(sorted(left)[:3])}"] if left else []


def _images(job: Job, reference: Undisturbed, skipped: Collection[int]) -> Found:
    expected = {job.image(seed): reference.job.image(seed) for seed in job.seeds}
    for seed in skipped:
        expected.pop(job.image(seed))
    there = set(job.outdir.rglob("*.png"))
    findings = []
    if missing := expected.keys() - there:
        findings.append(f"{len(missing)} images are missing, such as {min(missing).name}")
    if more := there - expected.keys():
        findings.append(f"{len(more)} images are too many, such as {min(more).name}")
    pairs = {path: expected[path] for path in there & expected.keys()}
    levels = {path: _difference(path, one, job.own_model) for path, one in pairs.items()}
    if wrong := sorted(path for path, level in levels.items() if level > 1):
        findings.append(f"{len(wrong)} images differ, such as {wrong[0].name}")
    if other := sorted(path for path, level in levels.items() if 0 < level < 1):
        findings.append(f"{len(other)} files differ in other than pixels, such as {other[0].name}")
    return Found(findings, sum(level == 1 for level in levels.values()))


def _difference(path: Path, reference: Path, own_model: bool) -> float:
    """Return by how much pixels differ at most; 0.5 if only other parts of the files differ."""
    if path.read_bytes() == reference.read_bytes():
        return 0
    try:
        with Image.open(path) as one, Image.open(reference) as other:
            ours, theirs = (np.asarray(image, dtype=np.int16) for image in (one, other))
            same = own_model and _described(one) == _described(other)
    except (OSError, ValueError, SyntaxError):
        return math.inf
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max()) or (0 if same else 0.5)


def _described(image: Image.Image) -> str:
    """Return what an image says of itself, without where its model came from."""
    return re.sub(r"model \S+,", "", str(image.info))


def _run(job: Job, reference: Undisturbed, skipped: Collection[int]) -> list[str]:
    try:
        run = json.loads((job.outdir / "run.json").read_text())
    except (OSError, ValueError) as error:
        return [f"run.json: {error}"]
    findings = []
    if run.get("seeds") != sorted(job.seeds):
        findings.append("run.json does not list the seeds")
    if run.get("nonfinite", []) != sorted(skipped):
        findings.append(f"run.json lists {len(run.get('nonfinite', []))} seeds as not finite")
    if run.get("settings") != {**reference.run["settings"], "subdirs": job.subdirs}:
        findings.append("run.json does not have the settings")
    return findings


def _trace(job: Job, reference: Undisturbed, skipped: Collection[int]) -> list[str]:
    if job.trace is None:
        return []
    try:
        rows = rows_of(job.trace)
    except (OSError, ValueError, KeyError) as error:
        return [f"trace: {error}"]
    seeds = set(job.seeds).difference(skipped)
    due = {key: values for key, values in reference.rows.items() if key[0] in seeds}
    findings = []
    if missing := due.keys() - rows.keys():
        findings.append(f"the trace lacks rows: {len(missing)} of {len(due)}")
    if more := rows.keys() - due.keys():
        findings.append(f"the trace has {len(more)} rows too many")
    return findings + _values(rows, due)


def _values(rows: Rows, due: Rows) -> list[str]:
    keys = sorted(rows.keys() & due.keys())
    if not keys:
        return []
    ours, theirs = (np.array([table[key] for key in keys]) for table in (rows, due))
    near = np.isclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True).all(1)
    count = int((~near).sum())
    return [f"{count} rows of the trace have other values"] if count else []


def _grid(job: Job) -> list[str]:
    if job.grid is None:
        return []
    try:
        with Image.open(job.grid) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return [f"contact sheet: {error}"]
    return []
