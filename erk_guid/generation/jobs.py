"""A generation job: one or many processes write images into a folder, and can resume.

`run.json` in the folder records what was asked. A killed job leaves only whole images. `resume`
continues it, and refuses to mix settings.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    with workers() as group:
        models = job.open(device, group)
        todo = group.agree(lambda: _prepare(job, models))
        queue = _generate(job, models, group, todo)
        if group.rank:
            return 0  # rank 0 counts them all
        if job.trace:
            _write_trace(job, todo, queue.notes())
        if job.grid:
            _write_grid(job)
        return len(todo)


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
                "they were made; choose another --outdir, or leave out --resume to overwrite"
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
        _clear(job, seeds)
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
    try:
        write_bytes(path, (json.dumps(run, indent=1) + "\n").encode())
    except OSError as error:
        reason = error.strerror or error
        raise ErkGuidError(f"cannot write to --outdir {job.outdir}: {reason}") from error
    return todo


def _clear(job: GenerationJob, seeds: list[int]) -> None:
    """Delete old images of these seeds so that --resume cannot reuse them."""
    ours = {image_path(job.outdir, seed, job.subdirs) for seed in seeds}
    there = set(_files(job.outdir, "*.png"))
    _remove(there & ours)
    if there - ours:
        # A score over the folder would count them, too.
        count = len(there - ours)
        print(f"Note: {job.outdir} holds {count} other images, which stay", file=sys.stderr)


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
    except (OSError, ValueError) as error:
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


def _generate(job: GenerationJob, models: Models, group: Workers, todo: list[int]) -> Queue:
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
        return image_path(job.outdir, seed, job.subdirs)

    def made(index: int, files: list[Future[None]], rows: np.ndarray | None) -> None:
        finish(files, job.outdir)
        queue.done(index, len(files), rows)
        bar.update(queue.made() - bar.n)

    try:
        with bar, ImageWriter(models.encoder, models.device, path, about) as writer:

            def begin(index: int) -> tuple[int, list[Future[None]], np.ndarray | None]:
                batch = batches.sample(parts[index])
                files = writer.write(batch)
                return index, files, trace.end_batch(batch.seeds) if trace else None

            before = None
            for index in queue.fresh():
                now = begin(index)
                if before is not None:
                    made(*before)
                before = now
            if before is not None:
                made(*before)
            for index in queue.abandoned():
                made(*begin(index))
            bar.update(queue.made() - bar.n)
    except torch.cuda.OutOfMemoryError as error:
        raise ErkGuidError(
            f"{models.device} ran out of memory with --batch {job.batch}; choose a smaller one"
        ) from error
    return queue


def _write_grid(job: GenerationJob) -> None:
    assert job.grid is not None
    seeds = list(dict.fromkeys(job.seeds))[:MAX_GRID]
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
