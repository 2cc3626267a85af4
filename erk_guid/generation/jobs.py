"""A generation job: one or many processes write images into a folder, and can resume.

A killed job leaves only whole images. `resume` continues it, and refuses to mix settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from erk_guid._version import __version__
from erk_guid.common.datasets import refuse_in_folder, refuse_overwriting
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import check_folder, check_writable, remove_partials
from erk_guid.common.pictures import save_picture, tile
from erk_guid.common.signals import number_of
from erk_guid.generation.config import GenerationConfig, Models
from erk_guid.generation.folders import ImageFolder, fingerprint, image_path
from erk_guid.generation.images import divided, generate
from erk_guid.generation.locks import FolderLock, locked
from erk_guid.generation.nonfinite import NonFiniteImagesError
from erk_guid.generation.peers import RANK_TIMEOUT, watched
from erk_guid.generation.seeds import unique
from erk_guid.generation.stopping import Stop, StoppedError, stopping
from erk_guid.generation.trace import (
    BEGINS,
    check_trace_path,
    complete,
    read_parts,
    read_trace,
    recorded,
    refuse_other_rows,
    refuse_replaced,
    write_trace,
)
from erk_guid.generation.workers import Queue, Workers, workers
from erk_guid.generation.writing import ImageWriter, finish
from erk_guid.sampling import StepInfo

MAX_GRID = 400
"""Largest number of images on a contact sheet."""
NO_MEMORY = "can't allocate memory"
"""What torch says on a CPU, in a RuntimeError."""
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
    rank_timeout: float = RANK_TIMEOUT

    @property
    def folder(self) -> ImageFolder:
        """The folder that the images go to."""
        return ImageFolder(self.outdir, self.subdirs)


def run_job(job: GenerationJob) -> int:
    """Generate the images of `job`; under torchrun, together with the other processes.

    SIGTERM and SIGINT end it after the step at hand, unless the program handles them itself.

    Returns:
        How many images all processes made together, on rank 0; the other ranks return 0.

    Raises:
        StoppedError: a signal ended it.
        ErkGuidError: anything else that the user can correct.
    """
    device = job.choose_device()
    _check_outputs(job)
    with stopping() as stop, ExitStack() as held, workers() as group:
        # Released after all ranks have left.
        token = group.agree(lambda: held.enter_context(locked(job.outdir)).token)
        lock = FolderLock(job.outdir, token)
        models = job.open(device, group, refresh=job.refresh)
        if group.world_size > 1:
            group.check_alike(_shared(job, models))
        todo, run = group.agree(lambda: _prepare(job, models))
        try:
            queue = _generate(job, models, group, todo, run, lock, stop)
        except KeyboardInterrupt as error:
            raise _stopped(job, group, run, number_of(error)) from None
        if group.rank:
            return 0  # rank 0 counts them all
        skipped = sorted(seed for notes in queue.notes() for seed in notes)
        made = sorted(set(todo).difference(skipped))
        job.folder.check(lock, made)
        job.folder.check_made(made)
        job.folder.record_skipped(skipped)
        _write_trace(job, run, skipped)
        if job.grid:
            _write_grid(job, skipped)
        return len(made)


def _check_outputs(job: GenerationJob) -> None:
    """Refuse outputs that cannot be written, before hours of work and not after."""
    check_folder(job.outdir)
    if not 0 <= job.rank_timeout < math.inf:
        raise ErkGuidError(
            f"--rank-timeout must be seconds, or 0 for no limit, got {job.rank_timeout}"
        )
    if job.trace is not None:
        check_trace_path(job.trace)
    if job.grid is not None and job.grid.suffix.lower() not in GRID_SUFFIXES:
        raise ErkGuidError(
            f"cannot write a contact sheet to {job.grid}: end its name in .png or .jpg"
        )
    outputs = {"--trace": job.trace, "--grid": job.grid}
    refuse_overwriting(outputs, [job.net, job.gnet or ""])
    for option, path in outputs.items():
        if path is not None:
            refuse_in_folder(option, path, job.outdir)
            check_writable(path, BEGINS if option == "--trace" else ())


def _shared(job: GenerationJob, models: Models) -> dict[str, Any]:
    """Return what all ranks must have been given; paths may differ from node to node."""
    digest = hashlib.sha256(json.dumps(list(job.seeds)).encode()).hexdigest()[:8]
    return {
        **{name: value for name, value in models.record().items() if name != "device"},
        "seeds": f"{len(job.seeds)} from {job.seeds[0]} to {job.seeds[-1]} ({digest})",
        "batch": job.batch,
        "subdirs": job.subdirs,
        "resume": job.resume,
        "overwrite": job.overwrite,
        "on-nonfinite": job.on_nonfinite,
        "trace": job.trace is not None,
        "grid": job.grid is not None,
    }


def _prepare(job: GenerationJob, models: Models) -> tuple[list[int], str]:
    """Prepare the folder, and return the seeds still to be made, and which run's they are.

    Runs on rank 0.
    """
    for output in (job.trace, job.grid):
        if output is not None:
            remove_partials(output)
    settings = {**models.record(), "subdirs": job.subdirs}
    run = fingerprint(settings)
    if job.trace is not None and not job.overwrite:
        _refuse_losing_rows(job, run, job.trace)
    todo = job.folder.prepare(
        unique(job.seeds),
        settings,
        {
            "net": job.net,
            "gnet": job.gnet if settings["gnet_sha256"] else None,
            "versions": {
                "erk_guid": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
        resume=job.resume,
        overwrite=job.overwrite,
    )
    return todo, run


def _refuse_losing_rows(job: GenerationJob, run: str, trace: Path) -> None:
    """Refuse to write a trace anew without rows that it has of images that stay.

    Raises:
        ErkGuidError: the message counts the images.
    """
    try:
        old = read_trace(trace)
    except ErkGuidError:  # none is there, or it was cut off
        return
    recorded = job.folder.recorded()
    there = recorded.difference(job.folder.missing(recorded))
    rows = complete(read_parts(job.outdir, run), there)
    refuse_other_rows(trace, old, rows, recorded)
    if not job.resume:
        there.difference_update(job.seeds)  # these are made again, with their rows
    lost = there.intersection(old["seed"].tolist()).difference(rows["seed"].tolist())
    if lost:
        raise ErkGuidError(
            f"{trace} has rows of {len(lost)} images, such as that of seed {min(lost)}, that are "
            f"no longer in the part files in {job.outdir}: writing it anew would lose them; give "
            "--trace another name"
        )


def _stopped(job: GenerationJob, group: Workers, run: str, number: int) -> StoppedError:
    """Write what there is of the trace, and return the error that says how to go on."""
    if group.rank:
        return StoppedError(number, f"rank {group.rank}; ranks that go on make its batches")
    missing = job.folder.missing(job.seeds)
    _write_trace(job, run, missing, tell=False)
    return StoppedError(
        number,
        f"{len(job.seeds) - len(missing)} of {len(job.seeds)} images are in {job.outdir}; the same "
        "command with --resume makes the others",
    )


def _write_trace(job: GenerationJob, run: str, left_out: Sequence[int], tell: bool = True) -> None:
    """Write the trace from the rows that all ranks have appended in the folder, now and before.

    Args:
        job: names the file.
        run: which run's rows, see `folders.fingerprint`.
        left_out: seeds that have no image.
        tell: tell of images without rows.
    """
    if not job.trace:
        return
    try:
        seeds = job.folder.recorded()
        rows = complete(read_parts(job.outdir, run), seeds.difference(left_out))
        if not job.overwrite:
            refuse_replaced(job.trace, rows, seeds)
        write_trace(job.trace, rows)
    except OSError as error:
        raise ErkGuidError(f"cannot write the trace {job.trace}: {error}") from error
    without = len(set(job.seeds).difference(left_out, rows["seed"].tolist()))
    if without and tell:
        print(
            f"Note: {job.trace} has no rows of {without} of the {len(job.seeds)} seeds: they were "
            "made without --trace or by an earlier version, or their rows are damaged",
            file=sys.stderr,
        )


def _generate(
    job: GenerationJob,
    models: Models,
    group: Workers,
    todo: list[int],
    run: str,
    lock: FolderLock,
    stop: Stop,
) -> Queue:
    """Take batches from the queue until all are made, by this process or by others."""
    parts = [part for part in divided(len(todo), job.batch, group.world_size) if part]
    queue = group.queue(len(parts))
    label = "images" if group.world_size == 1 else f"images of {group.world_size} ranks"
    try:
        with ExitStack() as opened:
            bar = opened.enter_context(
                tqdm(total=len(todo), desc=label, unit="image", disable=group.rank != 0)
            )
            rows = recorded(job.outdir, group.rank, run)
            trace = opened.enter_context(rows) if job.trace else None
            writer = opened.enter_context(_writer(job, models, run))
            # A single process is left to whoever looks at it: nobody else makes its batches.
            limit = job.rank_timeout if group.world_size > 1 else 0
            progress = opened.enter_context(watched(group.rank, limit))

            def callback(info: StepInfo) -> None:
                progress()
                stop.check()
                if trace:
                    trace.callback(info)
                bar.set_postfix_str(f"step {info.step + 1}/{info.num_steps}")

            batches = generate(
                models.loaded.net,
                todo,
                batch_size=job.batch,
                callback=callback,
                **models.generation_options,
            )

            def begin(index: int) -> list[Future[bool]]:
                with stop.deferred():
                    batch = batches.sample(parts[index])
                job.folder.check(lock, job.seeds)
                if trace:
                    trace.end_batch(batch.seeds)  # before the images: none is there without rows
                return writer.write(batch)

            def end(index: int, files: list[Future[bool]]) -> None:
                written = finish(files, job.outdir)
                progress()
                bad = [k for k, there in zip(parts[index], written, strict=True) if not there]
                if bad and job.on_nonfinite == "stop":
                    raise _not_finite(batches.failure(bad))
                queue.done(index, len(files) - len(bad), [todo[k] for k in bad])
                bar.update(queue.made() - bar.n)

            before: tuple[int, list[Future[bool]]] | None = None
            try:
                for index in queue.fresh():
                    last, before = before, (index, begin(index))
                    if last is not None:
                        end(*last)
            except BaseException:
                if before is not None:  # its images are written, or nearly
                    with suppress(ErkGuidError):
                        end(*before)
                raise
            if before is not None:
                end(*before)
            for index in queue.abandoned(progress):
                end(index, begin(index))
            bar.update(queue.made() - bar.n)
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not known and NO_MEMORY not in str(error):
            raise
        raise ErkGuidError(
            f"{models.device} ran out of memory with --batch {job.batch}; choose a smaller one"
        ) from error
    return queue


def _writer(job: GenerationJob, models: Models, run: str) -> ImageWriter:
    line = models.used.describe()

    def about(seed: int, number: int | None) -> str:
        return f"seed {seed}, {line}" if number is None else f"seed {seed}, class {number}, {line}"

    def path(seed: int) -> Path:
        target = job.folder.image(seed)
        if job.subdirs:
            target.parent.mkdir(exist_ok=True)
        return target

    return ImageWriter(models.encoder, models.device, path, about, run)


def _not_finite(failure: NonFiniteImagesError) -> ErkGuidError:
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
