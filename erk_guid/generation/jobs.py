"""A generation job: one or many processes write images into a folder, and can resume.

`run.json` in the folder records what was asked. A killed job leaves only whole images. `resume`
continues it, and refuses to mix settings.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from erk_guid._version import __version__
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import PARTIAL, check_writable, write_bytes
from erk_guid.common.pictures import is_whole_png, save_picture, tile
from erk_guid.generation.config import GenerationConfig, Models
from erk_guid.generation.images import divided, generate
from erk_guid.generation.locks import FolderLock, locked
from erk_guid.generation.nonfinite import NonFiniteImagesError
from erk_guid.generation.trace import NO_ROWS, Trace, check_trace_path, read_trace, write_trace
from erk_guid.generation.workers import Queue, Workers, workers
from erk_guid.generation.writing import ImageWriter, finish
from erk_guid.sampling import StepInfo
from erk_guid.solvers import same_as_recorded

RUN_FILE = "run.json"
MAX_GRID = 400
"""Largest number of images on a contact sheet."""
GRID_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class GenerationJob(GenerationConfig):
    """What to generate, and where to put it. Field names are those of generate_images.py."""

    outdir: Path
    seeds: Sequence[int]
    subdirs: bool = False
    resume: bool = False
    trace: Path | None = None
    grid: Path | None = None
    overwrite: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    refresh: bool = False


class Made(NamedTuple):
    """What rank 0 is told of a batch: rows of the trace, and seeds that were left out."""

    rows: np.ndarray | None
    skipped: list[int]


def image_path(outdir: Path, seed: int, subdirs: bool) -> Path:
    """Return the path of the image of `seed`; `subdirs` gives a folder per 1000 seeds."""
    folder = outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


def run_job(job: GenerationJob) -> int:
    """Generate the images of `job`; under torchrun, together with the other processes.

    Returns:
        How many images all processes made together, on rank 0; the other ranks return 0.

    Raises:
        ErkGuidError: anything the user can correct.
    """
    device = job.choose_device()
    _check_outputs(job)
    with ExitStack() as held, workers() as group:
        # Released after all ranks have left.
        token = group.agree(lambda: held.enter_context(locked(job.outdir)).token)
        lock = FolderLock(job.outdir, token)
        models = job.open(device, group, refresh=job.refresh)
        todo = group.agree(lambda: _prepare(job, models))
        queue = _generate(job, models, group, todo, lock)
        if group.rank:
            return 0  # rank 0 counts them all
        notes: list[Made] = queue.notes()
        skipped = sorted(seed for made in notes for seed in made.skipped)
        _check_folder(job, lock, [seed for seed in todo if seed not in set(skipped)])
        _record_skipped(job, skipped)
        if job.trace:
            _write_trace(job, todo, [made.rows for made in notes if made.rows is not None])
        if job.grid:
            _write_grid(job, skipped)
        return len(todo) - len(skipped)


def _check_outputs(job: GenerationJob) -> None:
    """Refuse outputs that cannot be written, before hours of work and not after."""
    if job.trace is not None:
        check_trace_path(job.trace)
    if job.grid is not None and job.grid.suffix.lower() not in GRID_SUFFIXES:
        raise ErkGuidError(
            f"cannot write a contact sheet to {job.grid}: end its name in .png or .jpg"
        )
    for path in (job.trace, job.grid):
        if path is not None:
            check_writable(path)


def _prepare(job: GenerationJob, models: Models) -> list[int]:
    """Prepare the folder and return the seeds still to be made. Runs on rank 0."""
    settings = {**models.record(), "subdirs": job.subdirs}
    path = job.outdir / RUN_FILE
    seeds = list(dict.fromkeys(job.seeds))
    todo = seeds
    recorded: list[int] = []
    if job.resume:
        before = _read_run(path)
        if before is None and any(_files(job.outdir, "*.png")):
            raise ErkGuidError(
                f"cannot resume: {job.outdir} holds images but no {RUN_FILE}, so nothing says how "
                "they were made; choose another --outdir, or --overwrite in place of --resume"
            )
        if before is not None:
            _refuse_mixture(job.outdir, before["settings"], settings)
            recorded = before["seeds"]
        for stale in list(_files(job.outdir, f".*{PARTIAL}*")):
            stale.unlink(missing_ok=True)
        # Keep only images of recorded seeds: those of other seeds may be from an older run.
        claimed = set(recorded)
        todo = [
            s
            for s in seeds
            if s not in claimed or not is_whole_png(image_path(job.outdir, s, job.subdirs))
        ]
        _remove(image_path(job.outdir, s, job.subdirs) for s in todo)
    else:
        recorded = _clear(job, seeds, settings)
    run = {
        "settings": settings,
        "net": job.net,
        "gnet": job.gnet if settings["gnet_sha256"] else None,
        "seeds": sorted({*recorded, *seeds}),
        "versions": {
            "erk_guid": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    _write_run(job, run)
    return todo


def _check_folder(job: GenerationJob, lock: FolderLock, seeds: list[int] | None = None) -> None:
    """Raise if the folder is gone, or images that were made; the message counts them."""
    try:
        lock.check()
    except ErkGuidError as error:
        there = sum(image_path(job.outdir, s, job.subdirs).exists() for s in job.seeds)
        raise ErkGuidError(
            f"{error}; {len(job.seeds) - there} of {len(job.seeds)} images are missing there"
        ) from error
    if seeds is None:
        return
    missing = [s for s in seeds if not image_path(job.outdir, s, job.subdirs).exists()]
    if missing:
        raise ErkGuidError(
            f"{len(missing)} of {len(seeds)} images made are missing in {job.outdir}, such as that "
            f"of seed {missing[0]}: something removed them; --resume makes them again"
        )


def _record_skipped(job: GenerationJob, skipped: list[int]) -> None:
    """Write into run.json which seeds of this run have no image, and say so."""
    if not skipped:
        return
    path = job.outdir / RUN_FILE
    run = _read_run(path)
    if run is not None:
        _write_run(job, {**run, "nonfinite": skipped})
    print(
        f"Note: {len(skipped)} images came out as NaN or infinity and were left out; {path} lists "
        "their seeds under nonfinite, and --resume makes them again",
        file=sys.stderr,
    )


def _write_run(job: GenerationJob, run: dict[str, Any]) -> None:
    try:
        write_bytes(job.outdir / RUN_FILE, (json.dumps(run, indent=1) + "\n").encode())
    except OSError as error:
        reason = error.strerror or error
        raise ErkGuidError(f"cannot write to --outdir {job.outdir}: {reason}") from error


def _clear(job: GenerationJob, seeds: list[int], settings: dict[str, Any]) -> list[int]:
    """Delete old images of these seeds, and with --overwrite those of other settings.

    Returns:
        The seeds of a run with the same settings, whose other images stay.

    Raises:
        ErkGuidError: there are images of other settings.
    """
    there = set(_files(job.outdir, "*.png"))
    if not there:
        return []
    recorded = _recorded(job.outdir, settings)
    if recorded is None:
        if not job.overwrite:
            raise ErkGuidError(
                f"{job.outdir} holds {len(there)} images of other settings, or of an unknown "
                "origin; choose another --outdir, --resume with the first run's settings, or "
                "--overwrite to delete them"
            )
        named = {path for path in there if re.fullmatch(r"\d{6,18}\.png", path.name)}
        _remove(named)
        there -= named
    ours = {image_path(job.outdir, seed, job.subdirs) for seed in [*seeds, *(recorded or [])]}
    _remove(there & {image_path(job.outdir, seed, job.subdirs) for seed in seeds})
    if there - ours:
        # A score over the folder would count them, too.
        count = len(there - ours)
        print(f"Note: {job.outdir} holds {count} other images, which stay", file=sys.stderr)
    return recorded or []


def _recorded(outdir: Path, settings: dict[str, Any]) -> list[int] | None:
    """Return the seeds of a recorded run with these settings; None if there is none."""
    try:
        before = _read_run(outdir / RUN_FILE)
        if before is None:
            return None
        _refuse_mixture(outdir, before["settings"], settings)
    except ErkGuidError:
        return None
    seeds: list[int] = before["seeds"]
    return seeds


def _files(outdir: Path, pattern: str) -> Iterator[Path]:
    """Yield files in the folder and in its --subdirs folders, where jobs write; none deeper."""
    yield from outdir.glob(pattern)
    yield from outdir.glob(f"{'[0-9]' * 6}*/{pattern}")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ErkGuidError(f"cannot replace {path}: {error.strerror}") from error


def _write_trace(job: GenerationJob, made: list[int], parts: list[np.ndarray]) -> None:
    """Write the rows of the seeds just made; when resuming, keep the file's other rows."""
    assert job.trace is not None
    if job.resume and job.trace.exists():
        before = read_trace(job.trace)
        parts = [before[~np.isin(before[:, 0], made)], *parts]
    try:
        write_trace(job.trace, np.concatenate([NO_ROWS, *parts]))
    except OSError as error:
        raise ErkGuidError(f"cannot write the trace {job.trace}: {error}") from error


def _read_run(path: Path) -> dict[str, Any] | None:
    try:
        run = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ErkGuidError(f"cannot resume: {path} is not readable ({error})") from error
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("settings"), dict)
        or not isinstance(run.get("seeds"), list)
        or not all(isinstance(seed, int) for seed in run["seeds"])
    ):
        raise ErkGuidError(f"cannot resume: {path} does not describe a run")
    return run


def _refuse_mixture(outdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Through JSON, so that 1 and 1.0 and infinities compare as they were written.
    before, now = same_as_recorded(before), json.loads(json.dumps(now))
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        what = "; ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise ErkGuidError(
            f"cannot resume {outdir} with other settings: {what}. Repeat the first run's settings, "
            "or choose another --outdir"
        )


def _generate(
    job: GenerationJob, models: Models, group: Workers, todo: list[int], lock: FolderLock
) -> Queue:
    """Take batches from the queue until all are made, by this process or by others."""
    trace = Trace() if job.trace else None
    label = "images" if group.world_size == 1 else f"images of {group.world_size} ranks"
    bar = tqdm(total=len(todo), desc=label, unit="image", disable=group.rank != 0)

    def callback(info: StepInfo) -> None:
        if trace:
            trace.callback(info)
        bar.set_postfix_str(f"step {info.step + 1}/{info.num_steps}")

    batches = generate(
        models.loaded.net,
        todo,
        batch_size=job.batch,
        callback=callback if trace or group.rank == 0 else None,
        **models.generation_options,
    )
    parts = [part for part in divided(len(todo), job.batch, group.world_size) if part]
    queue = group.queue(len(parts))
    line = models.used.describe()

    def about(seed: int, number: int | None) -> str:
        return f"seed {seed}, {line}" if number is None else f"seed {seed}, class {number}, {line}"

    def path(seed: int) -> Path:
        target = image_path(job.outdir, seed, job.subdirs)
        if job.subdirs:
            target.parent.mkdir(exist_ok=True)
        return target

    def made(index: int, files: list[Future[bool]], rows: np.ndarray | None) -> None:
        written = finish(files, job.outdir)
        bad = [k for k, there in zip(parts[index], written, strict=True) if not there]
        if bad and job.on_nonfinite == "stop":
            failures.append(bad)
            return
        skipped = [todo[k] for k in bad]
        if rows is not None:
            rows = rows[~np.isin(rows[:, 0], skipped)]
        queue.done(index, len(files) - len(bad), Made(rows, skipped))
        bar.update(queue.made() - bar.n)

    failures: list[list[int]] = []

    try:
        with bar, ImageWriter(models.encoder, models.device, path, about) as writer:

            def begin(index: int) -> tuple[int, list[Future[bool]], np.ndarray | None]:
                batch = batches.sample(parts[index])
                _check_folder(job, lock)
                files = writer.write(batch)
                return index, files, trace.end_batch(batch.seeds) if trace else None

            before = None
            for index in queue.fresh():
                now = begin(index)
                if before is not None:
                    made(*before)
                before = now
                if failures:
                    break
            if before is not None:
                made(*before)
            if failures:
                raise _stopped(batches.failure(failures[0]))
            for index in queue.abandoned():
                made(*begin(index))
                if failures:
                    raise _stopped(batches.failure(failures[0]))
            bar.update(queue.made() - bar.n)
    except torch.cuda.OutOfMemoryError as error:
        raise ErkGuidError(
            f"{models.device} ran out of memory with --batch {job.batch}; choose a smaller one"
        ) from error
    return queue


def _stopped(failure: NonFiniteImagesError) -> ErkGuidError:
    return ErkGuidError(
        f"{failure}. They were not written; the images before are there. --on-nonfinite=skip "
        "leaves such images out and goes on"
    )


def _write_grid(job: GenerationJob, skipped: list[int]) -> None:
    assert job.grid is not None
    seeds = [seed for seed in dict.fromkeys(job.seeds) if seed not in skipped][:MAX_GRID]
    if not seeds:
        raise ErkGuidError(f"cannot make the contact sheet {job.grid}: no image is finite")
    images = []
    try:
        for seed in seeds:
            with Image.open(image_path(job.outdir, seed, job.subdirs)) as image:
                images.append(image.convert("RGB"))
        columns = int(np.ceil(np.sqrt(len(images))))
        # Small images are enlarged, so that digits can be seen.
        scale = max(1, 96 // images[0].width)
        save_picture(job.grid, tile(images, columns, scale))
    except (OSError, ValueError) as error:
        raise ErkGuidError(f"cannot make the contact sheet {job.grid}: {error}") from error
