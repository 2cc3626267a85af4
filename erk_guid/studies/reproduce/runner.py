"""Run rows: generate, score, write down, delete the images; continue where a run stopped."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from erk_guid.common.datasets import open_images
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import check_folder, check_writable, sha256_of, user_path, write_bytes
from erk_guid.common.pictures import save_picture, tile
from erk_guid.common.signals import Interrupting, handled_by, number_of
from erk_guid.generation.devices import choose_device
from erk_guid.generation.folders import ImageFolder, image_path
from erk_guid.generation.locks import locked
from erk_guid.generation.stopping import StoppedError
from erk_guid.metrics.comparison import REAL
from erk_guid.metrics.detectors import weights_file
from erk_guid.metrics.statistics.references import PUBLISHED, SHIPPED, locate_reference
from erk_guid.models.checkpoints.download import is_url
from erk_guid.models.checkpoints.loading import check_source
from erk_guid.studies.reproduce.planning import (
    SCORE_NAME,
    Plan,
    Reproduction,
    check_real_images,
    plan,
    quality_of,
    resamples_of,
    settled,
)
from erk_guid.studies.reproduce.tables import Row

RESULTS, LINES = "results.jsonl", "result.txt"
DROPPED = "dropped.jsonl"
"""File of lines of results that are none."""
LARGEST_SCORE, LARGEST_COUNT = 1e100, 10**9
"""Bounds on the numbers of a result: a report computes with them, and draws them."""

GRID_IMAGES, GRID_COLUMNS, GRID_SIDE = 24, 8, 128
QUALITY_SCORES = (
    "precision", "recall", "inception_score_mean", "inception_score_std",
)  # fmt: skip


def read_results(outdir: Path) -> list[dict[str, Any]]:
    """Read the results in `results.jsonl`, oldest first, without a last line that was cut short.

    Raises:
        ErkGuidError: another line is not a result.
    """
    path = outdir / RESULTS
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ErkGuidError(f"cannot read {path}: {error}; mend or remove it") from error
    results = []
    for number, line in enumerate(lines, 1):
        result = _result(line)
        if result is not None:
            results.append(result)
        elif number < len(lines):
            raise ErkGuidError(f"{path}, line {number} is no result; mend or remove it")
    return results


def _result(line: str) -> dict[str, Any] | None:
    """Parse a line of `results.jsonl`; return None if it is not a whole result."""
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and _is_sound(result) else None


def _is_sound(result: dict[str, Any]) -> bool:
    """Return whether a result has all that the report shows, each of its kind.

    Results are often made elsewhere: names become file names, and numbers are drawn.
    """
    quality = result.setdefault("quality", {})
    if not isinstance(quality, dict):
        return False
    errors, reference = result.get("standard_errors"), result.get("reference")
    return (
        _is_sound_key(result.get("key"))
        and bool(result.get("scores"))
        and _are_scores(result["scores"])
        and _are_scores(errors, least=0.0)
        and _are_scores(quality.setdefault("scores", {}))
        and _is_count(result.get("num"))
        and _is_count(result.get("processes"))
        and _are_texts(result.get("commands"))
        and _are_texts([result.get("device")])
        and isinstance(reference, dict)
        and _are_texts([reference.get(name) for name in ("source", "sha256")])
        and isinstance(detectors := result.get("detectors"), list)
        and all(
            isinstance(one, dict) and _are_texts([one.get("name"), one.get("preprocessing")])
            for one in detectors
        )
        and isinstance(versions := result.get("versions"), dict)
        and _are_texts([*versions.values()])
    )


def _is_sound_key(key: object) -> bool:
    """Return whether what a key holds is of the types that `plan` gives it."""
    return (
        isinstance(key, dict)
        and all(type(key[name]) in types for name, types in _KEY_TYPES.items() if name in key)
        and all(_are_texts(key.get(name, [])) for name in ("model", "metrics"))
    )


_KEY_TYPES: dict[str, tuple[type, ...]] = {
    "row": (str,), "steps": (int,), "ref": (str,), "seeds": (str,), "settings": (str,),
    "solver": (str,), "device": (str,), "denoise_to_zero": (bool,),
    "w_stiff": (int, float, str), "w_con": (int, float, type(None)),
    "options": (dict,), "detector_weights": (dict,), "files": (dict,),
}  # fmt: skip
"""Types of JSON; what is true or false is no number there."""


def _are_scores(found: object, least: float = -LARGEST_SCORE) -> bool:
    return isinstance(found, dict) and all(
        SCORE_NAME.fullmatch(name) and isinstance(value, float) and least <= value <= LARGEST_SCORE
        for name, value in found.items()
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_COUNT


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def result_of(
    job: Reproduction, results: Sequence[Mapping[str, Any]], one: Plan, complete: bool = True
) -> Any:
    """Return the latest result of that plan that has the standard errors asked for, or None.

    Args:
        complete: also require precision and recall against the same real images, if asked for.
    """
    needed = set(one.key["metrics"]) if resamples_of(job, one.key["metrics"]) else set()
    return next(
        (
            r
            for r in reversed(results)
            if r["key"] == one.key
            and needed <= set(r["standard_errors"])
            and (not (complete and one.quality) or is_quality_of(r.get("quality", {}), job, one))
        ),
        None,
    )


def is_quality_of(quality: Mapping[str, Any], job: Reproduction, one: Plan) -> bool:
    """Return whether a result's precision and recall are against today's real images.

    Images that are not here, as where a report is made elsewhere, are known by their name only; so
    are those of results that earlier versions wrote.
    """
    real, detector = quality_of(job, one.row)
    if quality.get("asked") != {"real": real, "detector": detector}:
        return False
    recorded = quality.get("real_sha256")
    return recorded is None or recorded == _hash_of_real(real) or _hash_of_real(real) is None


@cache
def _hash_of_real(real: str | None) -> str | None:
    """Return a hash of real images; None where they are not here, or ship with the package."""
    if real is None or real == SHIPPED or not (path := user_path(real)).exists():
        return None
    try:
        if path.is_file():
            return sha256_of(path)
        digest = hashlib.sha256()
        names = open_images(path).names
        for name in tqdm(names, desc="reading the real images", unit="image", delay=2):
            # Names that are not UTF-8 have halves of characters in them.
            line = f"{name}\n{sha256_of(path / name)}\n"
            digest.update(line.encode(errors="surrogatepass"))
        return digest.hexdigest()
    except (ErkGuidError, OSError):
        return None  # what compares with them says why they cannot be read


def check_inputs(job: Reproduction) -> None:
    """Refuse what no run could use, before one is begun. Nothing is fetched, and nothing made.

    Raises:
        ErkGuidError: options that contradict each other, or that name what is not there.
    """
    job.check()
    check_folder(job.outdir)
    if job.device is not None:
        choose_device(job.device)
    for source in (job.model, job.gnet):
        if source is not None:
            check_source(source)
    if job.gnet is not None and all(row.family != "autog" for row in job.rows):
        raise ErkGuidError(
            f"--gnet {printable(job.gnet, 200)} has nothing to act on: it is for rows with "
            "autoguidance"
        )
    for name, path in job.detector_weights.items():
        weights_file(name, path)
    if job.ref is not None and job.ref not in PUBLISHED and not is_url(job.ref):
        locate_reference(job.ref)


def check_plans(job: Reproduction) -> None:
    """Refuse what `run` refuses besides, as far as it is known before settings are chosen.

    Raises:
        ErkGuidError: see `run`.
    """
    plans = [plan(job, row) for row in job.rows if settled(job, row).settled]
    # The usual real images need not be on the machine where a run is planned.
    usual = job.real is None
    _check_real(job, [p for p in plans if not (usual and quality_of(job, p.row)[0] == REAL)])


def _check_real(job: Reproduction, plans: Sequence[Plan]) -> None:
    try:
        check_real_images(job, plans)
    except OSError as error:
        raise ErkGuidError(
            f"--real {printable(job.real, 200)}: {error.strerror}; name a folder, zip or .npz"
        ) from error


def run(job: Reproduction) -> None:
    """Run the rows that `results.jsonl` does not have yet.

    Raises:
        StoppedError: a signal ended it.
        ErkGuidError: a row cannot be run, a command failed, or another run is at work there.
    """
    check_inputs(job)
    plans = [plan(job, row) for row in job.rows]
    before_now = read_results(job.outdir)
    _check_real(job, [one for one in plans if not result_of(job, before_now, one)])
    try:
        # So that SIGTERM to this process also ends the command that it waits for.
        with handled_by(Interrupting()), locked(job.outdir):
            _mend(job.outdir)
            for number, one in enumerate(plans, 1):
                heading = f"[{number}/{len(plans)}] {one.row.id}"
                if result_of(job, read_results(job.outdir), one):
                    print(f"{heading}: already in {job.outdir / RESULTS}", flush=True)
                else:
                    print(f"{heading}: {one.row.steps} steps, {one.row.title}", flush=True)
                    if result_of(job, read_results(job.outdir), one, complete=False):
                        print(
                            "  It was scored before, without precision and recall against these "
                            "real images: made again (--skip-quality leaves it as it is)",
                            flush=True,
                        )
                    _run_row(job, one)
                if not job.keep_images and one.images.exists():
                    _remove_images(one)
    except OSError as error:
        raise ErkGuidError(f"cannot write to {job.outdir}: {error}") from error
    except KeyboardInterrupt as error:
        raise StoppedError(
            number_of(error), f"the same command goes on with what is missing in {job.outdir}"
        ) from None


def _remove_images(one: Plan) -> None:
    """Delete the images of a row, and say what stays."""
    left = [path for path in ImageFolder(one.images, subdirs=True).remove() if path.is_file()]
    if left:
        print(
            f"Note: {one.images} stays: {len(left)} files in it are none of this row's, such as "
            f"{printable(left[0].relative_to(one.images), 100)}",
            file=sys.stderr,
        )


def _mend(outdir: Path) -> None:
    """Move or end the line that a killed run left unfinished, before the next is added.

    What is moved is told on stderr.
    """
    path = outdir / RESULTS
    results = read_results(outdir)  # raises if more than the last line is damaged
    if path.exists():
        lines = path.read_text().splitlines()
        if len(lines) > len(results) or not path.read_bytes().endswith(b"\n"):
            whole, dropped = lines[: len(results)], lines[len(results) :]
            for line in dropped:
                print(
                    f"Note: the last line of {path} is no whole result; it is moved to {DROPPED}, "
                    f"and its row is made again: {printable(line, 160)}",
                    file=sys.stderr,
                )
                _append(outdir / DROPPED, line)
            write_bytes(path, "".join(f"{line}\n" for line in whole).encode())


def _append(path: Path, line: str) -> None:
    """Add a line to a file, on a line of its own also where a killed run left half of one."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())


def _run_row(job: Reproduction, one: Plan) -> None:
    whole = not one.images.exists()
    begun = time.monotonic()
    _call(one.row, one.generate)
    seconds = time.monotonic() - begun
    seeds = job.chosen_seeds
    made = _images_of(one)
    if len(made) != len(seeds):
        raise ErkGuidError(
            f"{one.images} holds {len(made)} images, not the {len(seeds)} of this row; remove the "
            "folder and run again"
        )
    _call(one.row, one.score)
    scored = json.loads(one.scores.read_text())
    quality: dict[str, Any] = {}
    failure: ErkGuidError | None = None
    if one.quality:
        try:
            quality = _quality_of_row(job, one)
        except ErkGuidError as error:
            failure = error  # raised below, after the scores are recorded
    counted = {scored["images"]["available"], quality.get("num_generated", len(seeds))}
    if counted != {len(seeds)} or _images_of(one) != made:
        raise ErkGuidError(
            f"{one.images}: images were added, removed or replaced while they were scored; remove "
            "the folder and run again"
        )
    _keep_grid(one, seeds)
    result = {
        "key": one.key,
        "scores": scored["scores"],
        "standard_errors": scored.get("standard_errors", {}),
        "quality": quality,
        "num": scored["num"],
        # For a continued run this would be the time of the rest only.
        "seconds_generating": round(seconds, 1) if whole else None,
        "commands": list(one.lines(job.keep_images)),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": scored["device"],
        "processes": scored["processes"],
        "reference": scored["reference"],
        "detectors": scored["detectors"],
        "versions": scored["versions"],
    }
    values = {**scored["scores"], **quality.get("scores", {})}
    text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    precision = one.key.get("precision")
    title = f"{one.row.title}, {precision}" if precision else one.row.title
    _append(job.outdir / RESULTS, json.dumps(result))
    _append(
        job.outdir / LINES,
        f"{result['finished']}  {one.row.id}: {' '.join(one.key['model'])}, steps "
        f"{one.row.steps}, {title}, {scored['num']} images, seeds {_shortened(one)}: {text}",
    )
    print(f"  {text}", flush=True)
    if failure is not None:
        raise failure


def _shortened(one: Plan) -> str:
    seeds: str = one.key["seeds"]
    return seeds if len(seeds) < 60 else f"{seeds[:57]}..."


def _quality_of_row(job: Reproduction, one: Plan) -> dict[str, Any]:
    real, detector = quality_of(job, one.row)
    hashed = _hash_of_real(real)
    _call(one.row, one.quality)
    found = json.loads(one.qualities.read_text())
    return {
        "asked": {"real": real, "detector": detector},
        "real_sha256": hashed,
        "scores": {name: found[name] for name in QUALITY_SCORES},
        "num_real": found["num_real"],
        "num_generated": found["num_generated"],
    }


def _images_of(one: Plan) -> dict[str, tuple[int, int, int]]:
    """Return a row's images, each with what changes when the file is replaced or written."""
    found = {}
    for name in open_images(one.images).names:
        with suppress(FileNotFoundError):  # removed this moment
            about = os.stat(one.images / name)
            found[name] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def _call(row: Row, command: Sequence[str]) -> None:
    real = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[command[0]]
    die = _die_with_parent if sys.platform == "linux" else None
    done = subprocess.run([*real, *command[1:]], check=False, preexec_fn=die)
    if done.returncode:
        raise ErkGuidError(
            f"row {row.id}: '{command[0]} ... {' '.join(command[1:])[:60]}...' ended with exit "
            f"code {done.returncode}, for the reason above; run again to continue"
        )


def _die_with_parent() -> None:
    """Make this child end when its parent is killed, so that two runs never write one folder."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _keep_grid(one: Plan, seeds: Sequence[int]) -> None:
    """Save the first images, small, for the report."""
    pictures = []
    for seed in seeds[:GRID_IMAGES]:
        with Image.open(image_path(one.images, seed, subdirs=True)) as image:
            picture = image.convert("RGB")
        if max(picture.size) > GRID_SIDE:
            picture.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
        pictures.append(picture)
    scale = max(1, 64 // pictures[0].width)
    check_writable(one.grid)
    save_picture(one.grid, tile(pictures, GRID_COLUMNS, scale))
