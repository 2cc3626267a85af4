"""Scenarios with faults around a process: its disk, its folder, its server, its numbers."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from scripts.soak import checks
from scripts.soak.jobs import BROKEN, SETTINGS, Job, pool
from scripts.soak.programs import Process
from scripts.soak.rounds import DEADLY, Round, UnavailableError

SMALL_FILE = 300
"""Bytes of the largest file, fewer than an image has."""


def disk(r: Round) -> None:
    """Fill the disk, or forbid files of the size of an image; resume when there is room."""
    job = r.job()
    if r.rng.random() < 0.3:
        _refused(r, r.begin(job, resume=False, name="-small", limit=SMALL_FILE), job)
        r.finish(job)
        return
    room = r.folder / "room"
    with _small_disk(room, r.rng.randint(16, 40)):
        inside = replace(job, outdir=room / "images")
        if job.trace and r.rng.random() < 0.5:
            inside = replace(inside, trace=room / job.trace.name)
        _refused(r, r.begin(inside, resume=False, name="-full"), inside, "No space left")
        r.find(checks.stopped(inside))
        _run("mount", "-o", "remount,size=64m", room)
        r.finish(inside)


def _refused(r: Round, process: Process, job: Job, *words: str) -> None:
    ended = process.wait()
    r.tell(ended, job)
    r.find(checks.refused(ended, *words), ended.name)


@contextlib.contextmanager
def _small_disk(path: Path, pages: int) -> Iterator[None]:
    """Mount a file system of so many pages, each of which holds an image."""
    path.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={4096 * pages}", "none", path)
    try:
        yield
    finally:
        _run("umount", path)


def _run(*command: str | Path) -> None:
    """Run a command of the system.

    Raises:
        UnavailableError: it is not there, or not allowed.
    """
    try:
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"{command[0]} is not possible here") from error


def folder(r: Round) -> None:
    """Take the folder away while images are made: read-only, moved, replaced, or deleted."""
    job = replace(r.job(), subdirs=False)
    process = r.begin(job, resume=False)
    wanted = r.rng.randint(1, len(job.seeds) // 2)
    if not process.when(lambda: len(job.there()) >= wanted):
        r.ended(process, job, {})
        return
    take = r.rng.choice([_immutable, _moved, _replaced, _deleted])
    r.told(f"{process.name}: {take.__name__.strip('_')}")
    take(r, process, job)
    r.finish(job)


def _immutable(r: Round, process: Process, job: Job) -> None:
    _run("chattr", "+i", job.outdir)
    try:
        _refused(r, process, job)
        _refused(r, r.begin(job), job)  # nor does one begin in such a folder
    finally:
        _run("chattr", "-i", job.outdir)


def _moved(r: Round, process: Process, job: Job) -> None:
    aside = job.outdir.with_name("aside")
    job.outdir.rename(aside)
    _refused(r, process, job, "images")
    if job.outdir.exists():
        r.find(["a folder that was moved was made again"])
        shutil.rmtree(job.outdir, ignore_errors=True)
    aside.rename(job.outdir)


def _replaced(r: Round, process: Process, job: Job) -> None:
    aside = job.outdir.with_name("aside")
    job.outdir.rename(aside)
    job.outdir.mkdir()
    _refused(r, process, job, "images")
    # Those of the batch at hand cannot be kept from a folder of the same name.
    if len(job.there()) > job.batch:
        r.find([f"{len(job.there())} images were written to a folder that is not the job's"])
    if not job.outdir.exists():
        r.find(["a folder that is not the job's was removed"])
    shutil.rmtree(job.outdir, ignore_errors=True)
    aside.rename(job.outdir)


def _deleted(r: Round, process: Process, job: Job) -> None:
    while job.outdir.exists():  # files may be added meanwhile
        shutil.rmtree(job.outdir, ignore_errors=True)
    _refused(r, process, job, "images")
    if job.outdir.exists():
        r.find(["a folder that was deleted was made again"])


def nonfinite(r: Round) -> None:
    """Make images of which some come out as NaN; stop at them, then leave them out."""
    reference = r.references.of(BROKEN)
    bad = set(reference.run.get("nonfinite", []))
    seeds = tuple(r.rng.sample(pool(r.seeds), r.seeds // 2))
    skipped = bad.intersection(seeds)
    if not 0 < len(skipped) < len(seeds):
        raise UnavailableError("settings with which some images are not finite")
    trace = r.folder / f"trace{r.rng.choice(['.csv', '.npz'])}"
    job = Job(BROKEN, seeds, r.folder / "images", r.rng.randint(4, 16), trace=trace)
    _refused(r, r.begin(job, resume=False, name="-stop"), job, "--on-nonfinite=skip")
    skipping = job.with_option("--on-nonfinite=skip")
    before = job.there()
    process = r.begin(skipping, name="-skip")
    if not r.budget.over():
        r.strike(process, skipping)
    r.ended(process, skipping, before)
    r.finish(skipping, skipped)


def together(r: Round) -> None:
    """Begin two jobs in one folder, with the same settings or with others; one is refused."""
    one = replace(r.job(), subdirs=False)
    other = replace(one, settings=r.rng.choice(SETTINGS))
    both = [r.begin(one, name="-one")]
    time.sleep(r.rng.choice([0.0, r.rng.uniform(0, 3)]))
    both.append(r.begin(other, name="-other"))
    ends = [process.wait() for process in both]
    for ended in ends:
        r.tell(ended, one)
    winners = [job for job, ended in zip((one, other), ends, strict=True) if ended.code == 0]
    for ended in ends:
        r.find(checks.tracebacks(ended) if ended.code == 0 else checks.refused(ended), ended.name)
    if len(winners) == 1 or (len(winners) == 2 and one == other):
        r.compare(winners[0])
        _taken_over(r, winners[0])
    else:
        r.find([f"{len(winners)} of two jobs in one folder ended well"])


def _taken_over(r: Round, job: Job) -> None:
    """Kill a job and begin another one at once in its folder; a third meets that one."""
    folder = r.folder / "taken"
    # The first job's trace is not replaced by that of another folder.
    trace = None if job.trace is None else job.trace.with_stem("taken")
    job = replace(job, outdir=folder, trace=trace)
    first = r.begin(job, name="-first")
    if first.when((job.outdir / "run.json").exists):
        r.kill(first, r.rng.choice(DEADLY))
    heirs = [r.begin(job, name=f"-heir{k}") for k in range(2)]
    ends = [process.wait() for process in heirs]
    for ended in ends:
        r.tell(ended, job)
        r.find(checks.tracebacks(ended) if ended.code == 0 else checks.refused(ended), ended.name)
    first.wait()
    r.finish(job)
