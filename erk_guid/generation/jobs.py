"""A generation job: one or many processes write images into a folder, and can resume.

`run.json` in the folder records what was asked. A killed job leaves only whole images. `resume`
continues it, and refuses to mix settings.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from erk_guid.common.pictures import is_whole_png, save_picture, save_png, tile
from erk_guid.generation.config import GenerationConfig, Models
from erk_guid.generation.images import Batch, generate
from erk_guid.generation.process_groups import ProcessGroup, process_group
from erk_guid.generation.trace import Trace, check_trace_path, read_trace, write_trace
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
    """Generate the images of `job`; under torchrun, this process's share of them.

    Returns:
        How many images all processes made together, on rank 0; the other ranks return 0.

    Raises:
        ErkGuidError: anything the user can correct.
    """
    device = job.choose_device()
    _check_outputs(job)
    with process_group(device) as group:
        models = job.open(device, group)
        todo = group.agree(lambda: _prepare(job, models))
        trace = Trace() if job.trace else None
        done = _generate(job, models, group, todo, trace)
        # The ranks meet only here, after the work, so that rank 0 can join the results.
        totals = group.gather(done)
        traces = group.gather(trace.rows() if trace else None)
        if group.rank == 0:
            if job.trace:
                _write_trace(job, todo, [rows for rows in traces if rows is not None])
            if job.grid:
                _write_grid(job)
        return sum(totals)


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
        write_trace(job.trace, np.concatenate(parts))
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


def _generate(
    job: GenerationJob,
    models: Models,
    group: ProcessGroup,
    todo: list[int],
    trace: Trace | None,
) -> int:
    """Generate this process's share; write images while the next batch is computed."""
    bar = tqdm(unit="image", disable=group.rank != 0)

    def callback(info: StepInfo) -> None:
        if trace:
            trace.callback(info)
        bar.set_postfix_str(f"step {info.step + 1}/{info.num_steps}")

    batches = generate(
        models.loaded.net,
        todo,
        batch_size=job.batch,
        rank=group.rank,
        world_size=group.world_size,
        callback=callback if trace or group.rank == 0 else None,
        **models.generation_options,
    )
    share = sum(len(part) for part in batches.shares)
    bar.total = share
    bar.set_description("images" if group.world_size == 1 else f"rank 0 of {group.world_size}")
    line = models.used.describe()
    pending: list[Future[None]] = []
    try:
        with bar, ThreadPoolExecutor(max_workers=4) as pool:
            for batch in batches:
                group.check()
                _finish(job, pending)
                pending = _save(job, batch, line, pool)
                if trace:
                    trace.end_batch(batch.seeds)
                bar.update(len(batch.seeds))
            _finish(job, pending)
    except torch.cuda.OutOfMemoryError as error:
        raise ErkGuidError(
            f"{models.device} ran out of memory with --batch {job.batch}; choose a smaller one"
        ) from error
    return share


def _save(
    job: GenerationJob, batch: Batch, line: str, pool: ThreadPoolExecutor
) -> list[Future[None]]:
    pixels = batch.images.cpu().numpy()
    classes = [None] * len(pixels) if batch.labels is None else batch.labels.argmax(1).tolist()
    futures = []
    for seed, image, number in zip(batch.seeds, pixels, classes, strict=True):
        about = f"seed {seed}, {line}" if number is None else f"seed {seed}, class {number}, {line}"
        path = image_path(job.outdir, seed, job.subdirs)
        futures.append(pool.submit(save_png, path, image, about))
    return futures


def _finish(job: GenerationJob, pending: list[Future[None]]) -> None:
    for future in pending:
        try:
            future.result()
        except OSError as error:
            raise ErkGuidError(f"cannot write an image to {job.outdir}: {error}") from error


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
