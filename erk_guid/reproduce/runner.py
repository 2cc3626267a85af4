"""Running rows: generate, score, write down, delete the images; continued where it was."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image

from erk_guid.checkpoints.presets import PRESETS
from erk_guid.errors import ErkGuidError
from erk_guid.files import write_bytes
from erk_guid.jobs import image_path
from erk_guid.metrics.detectors import check_detector_name
from erk_guid.pictures import save_picture, tile
from erk_guid.reproduce.tables import FIRST_SEED, PAPER_BATCH, PAPER_NUM, Row

RESULTS, LINES = "results.jsonl", "result.txt"
GRID_IMAGES, GRID_COLUMNS, GRID_SIDE = 24, 8, 128
RESAMPLES = 200
"""For standard errors, where features are small enough that they cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What to run, and where. Field names are those of reproduce.sh."""

    rows: Sequence[Row]
    outdir: Path = Path("output")
    num: int = PAPER_NUM
    seeds: Sequence[int] | None = None
    batch: int = PAPER_BATCH
    gpus: int | None = None
    device: str | None = None
    model: str | None = None
    gnet: str | None = None
    metrics: Sequence[str] | None = None
    ref: str | None = None
    bootstrap: int | None = None
    detector_weights: Mapping[str, str] = field(default_factory=dict)
    keep_images: bool = False

    @property
    def chosen_seeds(self) -> list[int]:
        """The first `num` of `seeds`, by default counted from 100000."""
        if self.seeds is None:
            return list(range(FIRST_SEED, FIRST_SEED + self.num))
        return list(self.seeds)[: self.num]

    @property
    def processes(self) -> int:
        """One for each GPU, one without."""
        if self.gpus is not None:
            return self.gpus
        return max(torch.cuda.device_count(), 1) if self.device in (None, "cuda") else 1


@dataclass(frozen=True)
class Plan:
    """A row made concrete: its commands, and what identifies its result.

    Attributes:
        generate, score: command lines; 'python' and 'torchrun' stand for this interpreter's.
        key: a result with the same key need not be made again.
    """

    row: Row
    generate: list[str]
    score: list[str]
    key: dict[str, Any]
    images: Path
    scores: Path

    def lines(self, keep_images: bool) -> Iterator[str]:
        """The commands as a shell would take them."""
        yield shlex.join(self.generate)
        yield shlex.join(self.score)
        if not keep_images:
            yield shlex.join(["rm", "-r", str(self.images)])


def plan(job: Reproduction, row: Row) -> Plan:
    """The commands of one row.

    Raises:
        ErkGuidError: this version cannot run it, or something is left to choose.
    """
    if row.refusal:
        raise ErkGuidError(f"row {row.id} {row.refusal}")
    model = _model_options(job, row)
    metrics, ref = _scoring(job, row)
    resamples = _resamples(job, metrics)
    seeds = _spell(job.chosen_seeds)
    images = job.outdir / "images" / row.id
    scores = job.outdir / "scores" / f"{row.id}.json"
    launcher = ["python", "-m", "erk_guid"]
    if job.processes > 1:
        # Behind '--' torchrun does not take --num for an abbreviation of an option of its own.
        nproc = f"--nproc_per_node={job.processes}"
        launcher = ["torchrun", "--standalone", nproc, "-m", "--", "erk_guid"]
    device = [f"--device={job.device}"] if job.device else []
    erk = [f"--w_stiff={row.w_stiff:g}", f"--w_con={row.w_con:g}"] if row.guided else []
    generate = [
        *launcher, "generate", *model, f"--outdir={images}", "--subdirs", f"--seeds={seeds}",
        f"--batch={job.batch}", f"--steps={row.steps}", *erk, *device, "--resume",
    ]  # fmt: skip
    score = [
        *launcher, "metrics", "calc", f"--images={images}", f"--ref={ref}",
        f"--metrics={','.join(metrics)}", f"--num={len(job.chosen_seeds)}", *device,
        *(f"--detector-weights={name}={path}" for name, path in job.detector_weights.items()),
        f"--json={scores}",
    ]  # fmt: skip
    if resamples:
        score += [f"--bootstrap={resamples}", f"--features={features_path(job, row.id)}"]
    key = {
        "row": row.id,
        "model": model,
        "steps": row.steps,
        "w_stiff": row.w_stiff,
        "w_con": row.w_con,
        "seeds": seeds,
        "metrics": list(metrics),
        "ref": ref,
    }
    return Plan(row, generate, score, key, images, scores)


def features_path(job: Reproduction, row_id: str) -> Path:
    """Where the features of a row are kept, if they are."""
    return job.outdir / "features" / f"{row_id}.npz"


def _model_options(job: Reproduction, row: Row) -> list[str]:
    """The paper's preset for a row, or what takes its place with --model."""
    strength = [] if row.guidance is None else [f"--guidance={row.guidance:g}"]
    if job.model is None:
        return [f"--preset={row.model}", *strength]
    preset = job.model if row.family == "plain" else f"{job.model}-{row.family}"
    if preset in PRESETS:
        return [f"--preset={preset}", *strength]
    net = [f"--preset={job.model}" if job.model in PRESETS else f"--net={job.model}"]
    if row.family == "plain":
        return net
    gnet = job.gnet or (f"uncond:{job.model}" if row.family == "guid" else None)
    if gnet is None:
        raise ErkGuidError(
            f"row {row.id} guides {job.model} by a weaker network: name one with --gnet, or leave "
            "the row out with --table or --row"
        )
    own = PRESETS[row.model].guidance if row.guidance is None else row.guidance
    return [*net, f"--gnet={gnet}", f"--guidance={own:g}"]


_KNOWN_SCORING = {
    "digits": (["fd_digits"], "digits"),
    "edm2-img512": (["fid", "fd_dinov2"], "img512"),
    "edm2-img64": (["fid", "fd_dinov2"], "img64"),
}
"""Beginning of a model's name to metrics and reference."""


def _scoring(job: Reproduction, row: Row) -> tuple[list[str], str]:
    model = job.model or row.model
    known = next((v for k, v in _KNOWN_SCORING.items() if model.startswith(k)), None)
    if known is None and (job.metrics is None or job.ref is None):
        raise ErkGuidError(
            f"which data set does --model {model} belong to? Give --metrics and --ref"
        )
    metrics, ref = known or ([], "")
    metrics = list(job.metrics or metrics)
    for name in metrics:
        check_detector_name(name)
    return metrics, job.ref or ref


def _resamples(job: Reproduction, metrics: Sequence[str]) -> int:
    if job.bootstrap is not None:
        return job.bootstrap
    return RESAMPLES if list(metrics) == ["fd_digits"] else 0


def _spell(seeds: Sequence[int]) -> str:
    """'100000-100499', or the list itself where it is no range."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def read_results(outdir: Path) -> list[dict[str, Any]]:
    """What `results.jsonl` says, oldest first; a line that a killed run cut short is left out."""
    path = outdir / RESULTS
    results = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ErkGuidError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            result["key"]["row"], result["scores"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise ErkGuidError(f"{path}, line {number} is no result; mend or remove it") from error
        results.append(result)
    return results


def result_of(results: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Any:
    """The latest result with that key, or None."""
    return next((r for r in reversed(results) if r["key"] == key), None)


def run(job: Reproduction) -> None:
    """Run the rows that `results.jsonl` does not have yet.

    Raises:
        ErkGuidError: a row cannot be run, a command failed, or another run is at work there.
    """
    if len(job.chosen_seeds) < 2:
        raise ErkGuidError(f"{len(job.chosen_seeds)} images are too few; scores need at least 2")
    plans = [plan(job, row) for row in job.rows]
    try:
        job.outdir.mkdir(parents=True, exist_ok=True)
        with FileLock(job.outdir / ".lock", timeout=0):
            _mend(job.outdir / RESULTS)
            for number, one in enumerate(plans, 1):
                heading = f"[{number}/{len(plans)}] {one.row.id}"
                if result_of(read_results(job.outdir), one.key):
                    print(f"{heading}: already in {job.outdir / RESULTS}", flush=True)
                    continue
                print(f"{heading}: {one.row.steps} steps, {one.row.title}", flush=True)
                _run_row(job, one)
    except Timeout as error:
        raise ErkGuidError(f"another run is at work in {job.outdir}; choose --outdir") from error
    except OSError as error:
        raise ErkGuidError(f"cannot write to {job.outdir}: {error}") from error


def _mend(path: Path) -> None:
    """Settle the line that a killed run left unfinished, so that the next begins a new one."""
    if not path.exists() or path.read_bytes().endswith(b"\n"):
        return
    *lines, last = path.read_text().split("\n")
    try:
        json.loads(last)
        lines.append(last)
    except ValueError:
        pass
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _run_row(job: Reproduction, one: Plan) -> None:
    whole = not one.images.exists()
    begun = time.monotonic()
    _call(one.row, one.generate)
    seconds = time.monotonic() - begun
    _call(one.row, one.score)
    _keep_grid(job, one)
    scored = json.loads(one.scores.read_text())
    result = {
        "key": one.key,
        "scores": scored["scores"],
        "standard_errors": scored.get("standard_errors", {}),
        "num": scored["num"],
        # Of a run that was continued, the time would be that of the rest.
        "seconds_generating": round(seconds, 1) if whole else None,
        "commands": list(one.lines(job.keep_images)),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": scored["device"],
        "processes": scored["processes"],
        "reference": scored["reference"],
        "detectors": scored["detectors"],
        "versions": scored["versions"],
    }
    text = ", ".join(f"{name} {value:.4g}" for name, value in scored["scores"].items())
    with open(job.outdir / LINES, "a") as file:
        file.write(
            f"{result['finished']}  {one.row.id}: {' '.join(one.key['model'])}, steps "
            f"{one.row.steps}, {one.row.title}, {scored['num']} images: {text}\n"
        )
    with open(job.outdir / RESULTS, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"  {text}", flush=True)
    if not job.keep_images:
        shutil.rmtree(one.images, ignore_errors=True)


def _call(row: Row, command: Sequence[str]) -> None:
    real = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }[command[0]]
    done = subprocess.run([*real, *command[1:]], check=False)
    if done.returncode:
        raise ErkGuidError(
            f"row {row.id}: '{command[0]} ... {' '.join(command[1:])[:60]}...' ended with exit "
            f"code {done.returncode}, for the reason above; run again to continue"
        )


def grid_path(outdir: Path, row: Row) -> Path:
    """Where the sample pictures of a row are kept."""
    return outdir / "grids" / f"{row.id}.png"


def _keep_grid(job: Reproduction, one: Plan) -> None:
    """The first images, small, for the report."""
    pictures = []
    for seed in job.chosen_seeds[:GRID_IMAGES]:
        with Image.open(image_path(one.images, seed, subdirs=True)) as image:
            picture = image.convert("RGB")
        if max(picture.size) > GRID_SIDE:
            picture.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS)
        pictures.append(picture)
    scale = max(1, 64 // pictures[0].width)
    save_picture(grid_path(job.outdir, one.row), tile(pictures, GRID_COLUMNS, scale))
