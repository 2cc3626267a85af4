"""What to reproduce, and the commands of each row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from erk_guid.common.datasets import open_images
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import sha256_of, user_path
from erk_guid.common.programs import files_of_plugin, together
from erk_guid.generation.config import sampling_rules
from erk_guid.generation.devices import choose_device
from erk_guid.generation.fits import shipped_fit
from erk_guid.generation.settings import read_settings
from erk_guid.guidance import FORMS
from erk_guid.metrics.comparison import MANIFOLD_DETECTOR, REAL, SCORE_DETECTOR, SPLITS
from erk_guid.metrics.detectors import check_detector_name
from erk_guid.metrics.statistics.references import PUBLISHED, SHIPPED
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.models.encoders import PIXELS
from erk_guid.studies.reproduce.tables import FIRST_SEED, PAPER_BATCH, PAPER_NUM, Row

RESAMPLES = 200
"""For standard errors by default, where features are small enough to make them cheap."""

SCORE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,79}")
"""Names of scores that a report can show and make file names of."""


def slug(text: str) -> str:
    """Return `text` as a part of a file name: letters, digits and ``_.+-`` alone."""
    return re.sub(r"[^\w.+-]+", "-", text)


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Settings of a run: which rows, and where. Field names are those of reproduce.sh."""

    rows: Sequence[Row]
    outdir: Path = Path("output")
    num: int | None = None
    seeds: Sequence[int] | None = None
    batch: int = PAPER_BATCH
    gpus: int | None = None
    device: str | None = None
    precision: str | None = None
    compile: bool = False
    model: str | None = None
    gnet: str | None = None
    metrics: Sequence[str] | None = None
    ref: str | None = None
    bootstrap: int | None = None
    detector_weights: Mapping[str, str] = field(default_factory=dict)
    plugin: Sequence[str] = ()
    w_stiff: float | None = None
    w_con: float | None = None
    skip_quality: bool = False
    real: str | None = None
    keep_images: bool = False

    def check(self) -> None:
        """Refuse options that no run can follow.

        Raises:
            ErkGuidError: options that cannot be followed, or contradict each other.
        """
        if self.gnet is not None and self.model is None:
            raise ErkGuidError(f"--gnet {self.gnet} goes with --model; the paper's are presets")
        if self.seeds is not None and self.num is not None and len(self.seeds) != self.num:
            raise ErkGuidError(
                f"--seeds lists {len(self.seeds)} seeds, --num asks for {self.num} images; leave "
                "one of them out"
            )
        if len(self.chosen_seeds) < 2:
            raise ErkGuidError(
                f"{len(self.chosen_seeds)} images are too few; scores need at least 2"
            )
        if self.bootstrap == 1:
            raise ErkGuidError("--bootstrap 1: a standard error needs at least 2 resamples")
        if self.skip_quality and self.real is not None:
            raise ErkGuidError(f"--real {self.real} has no use with --skip-quality")
        for row in self.rows:
            if row.settings is not None and not _is_plain(row.settings):
                raise ErkGuidError(
                    f"--settings {printable(row.settings)}: its name has characters that cannot "
                    "be shown; rename it"
                )
            for name, value in row.options.items():
                if isinstance(value, str) and not _is_plain(value):
                    raise ErkGuidError(
                        f"row {printable(row.id, 60)}: {name} cannot be {printable(value, 60)}"
                    )

    @property
    def chosen_seeds(self) -> list[int]:
        """`seeds`, or `num` of them (by default the paper's 50,000) from 100000."""
        if self.seeds is not None:
            return list(self.seeds)
        return list(range(FIRST_SEED, FIRST_SEED + (self.num or PAPER_NUM)))

    @property
    def processes(self) -> int:
        """Number of processes: one for each GPU, or one without a GPU."""
        if self.gpus is not None:
            return self.gpus
        return max(torch.cuda.device_count(), 1) if self.device in (None, "cuda") else 1


def _is_plain(text: str) -> bool:
    """Return whether a terminal shows `text` on one line; spaces of all widths are allowed."""
    return all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)


@dataclass(frozen=True)
class Plan:
    """A row made concrete: its commands, and what identifies its result.

    Attributes:
        generate, score: command lines; 'python' and 'torchrun' stand for this interpreter's.
        quality: likewise, for precision, recall and inception score; empty if they are left out.
        key: all that the scores depend on; a result with the same key need not be made again.
        name: name of the row's files: its id, and a few digits that stand for the key.
        papers: whether model, reference and detectors are the paper's, so that its numbers can
            be compared.
    """

    row: Row
    outdir: Path
    generate: list[str]
    score: list[str]
    key: dict[str, Any]
    name: str
    papers: bool
    quality: list[str] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.outdir / "images" / self.name

    @property
    def scores(self) -> Path:
        return self.outdir / "scores" / f"{self.name}.json"

    @property
    def qualities(self) -> Path:
        return self.outdir / "scores" / f"{self.name}-quality.json"

    @property
    def features(self) -> Path:
        return self.outdir / "features" / f"{self.name}.npz"

    @property
    def grid(self) -> Path:
        return self.outdir / "grids" / f"{self.name}.png"

    def lines(self, keep_images: bool) -> Iterator[str]:
        """Yield the commands as a shell would take them."""
        yield shlex.join(self.generate)
        yield shlex.join(self.score)
        if self.quality:
            yield shlex.join(self.quality)
        if not keep_images:
            yield shlex.join(["rm", "-r", str(self.images)])


def plan(job: Reproduction, row: Row) -> Plan:
    """Return the plan of one row.

    Raises:
        ErkGuidError: a setting is still to be chosen.
    """
    row = settled(job, row)
    if not row.settled:
        raise ErkGuidError(
            f"row {row.id}: the paper's w_stiff and w_con are not known here; choose them with "
            "--w_stiff and --w_con"
        )
    fitted_in = row.options.get("precision", job.precision)
    if job.precision not in (None, fitted_in):
        raise ErkGuidError(
            f"row {row.id}: its settings were measured with --precision {fitted_in}; leave "
            f"--precision {job.precision} out"
        )
    model = _model_options(job, row)
    metrics, ref = _scoring(job, row)
    seeds = spell(job.chosen_seeds)
    device = job.device.partition(":")[0] if job.device else choose_device().type
    key = {
        "row": row.id,
        "model": model,
        "steps": row.steps,
        "w_stiff": row.w_stiff,
        "w_con": row.w_con,
        "solver": row.solver,
        "denoise_to_zero": row.denoise_to_zero,
        **({"options": dict(row.options)} if row.options else {}),
        **({"settings": row.settings} if row.settings else {}),
        **({"precision": job.precision} if job.precision else {}),
        **({"compile": True} if job.compile else {}),
        **({"pixels": PIXELS} if _may_have_a_vae(job, row) else {}),
        **sampling_rules(
            modal=row.solver == "modal", parameter_free=row.w_stiff in FORMS, noisy=_is_noisy(row)
        ),
        "seeds": seeds,
        "metrics": metrics,
        "ref": ref,
        "detector_weights": dict(job.detector_weights),
        "device": device,  # each kind has its own random numbers
        "files": _fingerprints(
            [option for option in (*model, ref) if not _is_name(option)]
            + [*job.detector_weights.values(), *job.plugin, _levels(row)]
        )
        | _programs(job.plugin),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    standard = _known_scoring(row.model)
    made = Plan(
        row, job.outdir, [], [], key, f"{_stem(row)}-{digest[:8]}",
        papers=model[0] == f"--preset={row.model}"
        and standard is not None
        and ref == standard[1]
        and not job.detector_weights
        and job.precision is None,
    )  # fmt: skip
    made.generate.extend(_generate_command(job, made, model, seeds))
    made.score.extend(_score_command(job, made, metrics, ref))
    made.quality.extend(_precision_recall_command(job, made))
    return made


def _is_noisy(row: Row) -> bool:
    """Return whether a row's solver adds noise, which only a file of settings may ask for."""
    return row.settings is not None and read_settings(Path(row.settings)).solver().noisy


def _levels(row: Row) -> str:
    """Return the file that says a row's noise levels; empty where a spacing does."""
    if row.fitted:
        return str(shipped_fit(row.model, row.steps))
    return row.settings or ""


def _stem(row: Row) -> str:
    """Return the beginning of the names of a row's files, short enough for any file system."""
    return slug(row.id)[:40]


def _may_have_a_vae(job: Reproduction, row: Row) -> bool:
    """Return whether images depend on how a VAE's pixels are taken, which has changed once."""
    model = job.model or row.model
    return model not in PRESETS or model.startswith("edm2-img512")


def settled(job: Reproduction, row: Row) -> Row:
    """Return the row, with the user's settings where the paper's are not known."""
    if row.w_stiff is not None:
        return row
    return replace(row, w_stiff=job.w_stiff, w_con=job.w_con)


def commands(job: Reproduction, row: Row) -> list[str]:
    """Return the row's commands for a shell, with '?' for settings still to be chosen."""
    one = settled(job, row)
    if one.settled:
        return list(plan(job, row).lines(job.keep_images))
    # Any numbers serve to make the commands: they are replaced below.
    lines = plan(replace(job, w_stiff=1.0, w_con=1.0), row).lines(job.keep_images)
    marked = [re.sub(r"--(w_stiff|w_con)=1\b", r"--\1=?", line) for line in lines]
    stem = _stem(row)
    return [re.sub(rf"{re.escape(stem)}-[0-9a-f]{{8}}", f"{stem}-?", line) for line in marked]


def _launcher(job: Reproduction) -> list[str]:
    if job.processes == 1:
        return ["python", "-m", "erk_guid"]
    # After '--' torchrun does not take --num for an abbreviation of its own options.
    nproc = f"--nproc_per_node={job.processes}"
    return ["torchrun", "--standalone", nproc, "-m", "--", "erk_guid"]


def _generate_command(job: Reproduction, one: Plan, model: list[str], seeds: str) -> list[str]:
    row = one.row
    erk = [
        f"--{name}={value:g}" if isinstance(value, float | int) else f"--{name}={value}"
        for name, value in (("w_stiff", row.w_stiff), ("w_con", row.w_con))
        if row.guided and value is not None
    ]
    sampler = [
        f"--steps={row.steps}", *erk, *([] if row.solver == "heun" else [f"--solver={row.solver}"]),
        *([] if row.denoise_to_zero else ["--no-denoise-to-zero"]),
    ]  # fmt: skip
    if row.settings is not None:
        sampler = [f"--settings={row.settings}"]
    return [
        *_launcher(job), "generate", *model, f"--outdir={one.images}", "--subdirs",
        f"--seeds={seeds}", f"--batch={job.batch}", *sampler,
        *(f"--{k}={v:g}" if isinstance(v, float | int) else f"--{k}={v}"
          for k, v in row.options.items()),
        *([f"--precision={job.precision}"]
          if job.precision and "precision" not in row.options else []),
        *(["--compile"] if job.compile else []), *_device(job), "--resume",
    ]  # fmt: skip


def _score_command(job: Reproduction, one: Plan, metrics: list[str], ref: str) -> list[str]:
    command = [
        *_launcher(job), "metrics", "calc", f"--images={one.images}", f"--ref={ref}",
        f"--metrics={','.join(metrics)}", f"--num={len(job.chosen_seeds)}", *_device(job),
        *_weights(job, metrics), *(f"--plugin={plugin}" for plugin in job.plugin),
        f"--json={one.scores}",
    ]  # fmt: skip
    resamples = resamples_of(job, metrics)
    if resamples:
        command += [f"--bootstrap={resamples}", f"--features={one.features}"]
    return command


def _precision_recall_command(job: Reproduction, one: Plan) -> list[str]:
    """Return the command of precision, recall and inception score, as in the published script.

    That script computes them for every row.
    """
    if job.skip_quality:
        return []
    real, detector = quality_of(job, one.row)
    if real is None:
        return []
    used = [detector] if detector else [MANIFOLD_DETECTOR, SCORE_DETECTOR]
    return [
        "python", "-m", "erk_guid", "precision-recall", str(one.images), f"--real={real}",
        *([f"--detector={detector}"] if detector else []), *_device(job), *_weights(job, used),
        *(f"--plugin={plugin}" for plugin in job.plugin), f"--json={one.qualities}",
    ]  # fmt: skip


def quality_of(job: Reproduction, row: Row) -> tuple[str | None, str | None]:
    """Return the real images to compare a row with, and the detector if not the usual ones.

    The real images are None if none are known for the model and none were named.
    """
    model = job.model or row.model
    if model in PRESETS:
        for start, (real, detector) in _KNOWN_REAL.items():
            if model.startswith(start):
                return job.real or real, detector
    return job.real, None


_KNOWN_REAL: dict[str, tuple[str, str | None]] = {
    "digits": ("digits", "fd_digits"),
    "edm2-img512": (REAL, None),
}
"""Real images and detector, by the beginning of a preset's name."""


def check_real_images(job: Reproduction, plans: Sequence[Plan]) -> None:
    """Refuse missing images before hours of work; print a note if no real ones are known.

    Raises:
        ErkGuidError: the seeds are too few, or there are no real images where they should be.
    """
    if any(one.quality for one in plans) and len(job.chosen_seeds) < SPLITS:
        raise ErkGuidError(
            f"{len(job.chosen_seeds)} images are too few for an inception score, which needs "
            f"{SPLITS}; take more, or leave out precision, recall and inception score with "
            "--skip-quality"
        )
    for one in plans:
        real, _ = quality_of(job, one.row)
        if job.skip_quality:
            continue
        if real is None:
            print(
                f"{one.row.id}: no precision, recall and inception score, for no real images are "
                "known for its model (--real names some)",
                file=sys.stderr,
            )
        elif real != SHIPPED:
            _check_real(one.row, real)


def _check_real(row: Row, real: str) -> None:
    path = user_path(real)
    hint = "name a folder, zip or .npz with --real, or leave these scores out with --skip-quality"
    if not path.exists():
        raise ErkGuidError(
            f"row {row.id}: precision and recall need real images, and there is no {real}; {hint}"
        )
    try:
        if path.suffix != ".npz":  # an .npz may hold features
            open_images(path)
    except ErkGuidError as error:
        raise ErkGuidError(f"row {row.id}: {error}; {hint}") from error


def _weights(job: Reproduction, detectors: Sequence[str]) -> list[str]:
    """Return the options for the user's files of weights for these detectors."""
    return [
        f"--detector-weights={name}={path}"
        for name, path in job.detector_weights.items()
        if name in detectors
    ]


def _device(job: Reproduction) -> list[str]:
    return [f"--device={job.device}"] if job.device else []


def _is_name(option: str) -> bool:
    """Return whether an option names a preset or a reference, which no file here takes away."""
    name = option.partition("=")[2] if option.startswith("--") else option
    return name.removeprefix("uncond:") in PRESETS or name in (SHIPPED, *PUBLISHED)


def _fingerprints(options: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the local files among the options' values, and of models in folders."""
    found = {}
    for option in options:
        value = option.partition("=")[2] if option.startswith("--") else option
        name = value.removeprefix("uncond:")
        path = user_path(name) if name else None
        if path is not None and os.path.isfile(path):
            found[value] = sha256_of(path)
        elif path is not None and os.path.isdir(path):
            found[value] = together(
                each for suffix in ("json", "safetensors") for each in path.rglob(f"*.{suffix}")
            )
    return found


def _programs(plugins: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of plugins: of their files together, and of what these import."""
    return {plugin: together(files_of_plugin(plugin)) for plugin in plugins}


def _model_options(job: Reproduction, row: Row) -> list[str]:
    """Return the options of a row's preset, or of what replaces it with --model."""
    strength = [] if row.guidance is None else [f"--guidance={row.guidance:g}"]
    if job.model is None:
        return [f"--preset={row.model}", *strength]
    given = PRESETS.get(job.model)
    net = [f"--preset={job.model}" if given else f"--net={job.model}"]
    if row.family == "plain":
        # A preset may include model guidance, which these rows do not have.
        return [*net, "--guidance=1"] if given and given.gnet else net
    gnet = job.gnet if row.family == "autog" else None
    if gnet is None:
        preset = f"{job.model}-{row.family}"
        if preset in PRESETS:
            return [f"--preset={preset}", *strength]
        if row.family == "autog":
            raise ErkGuidError(
                f"row {row.id} guides {job.model} by a weaker network: name one with --gnet, or "
                "leave the row out with --table or --row"
            )
        gnet = f"uncond:{job.model}"
    own = PRESETS[row.model].guidance if row.guidance is None else row.guidance
    return [*net, f"--gnet={gnet}", f"--guidance={own:g}"]


_KNOWN_SCORING = {
    "digits": (["fd_digits"], "digits"),
    "edm2-img512": (["fid", "fd_dinov2"], "img512"),
    "edm2-img64": (["fid", "fd_dinov2"], "img64"),
    "edm-imagenet-64x64": (
        ["fid"],
        "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz",
    ),
}
"""Metrics and reference, by the beginning of a preset's name."""


def _known_scoring(model: str) -> tuple[list[str], str] | None:
    if model not in PRESETS:
        return None
    return next((v for k, v in _KNOWN_SCORING.items() if model.startswith(k)), None)


def _scoring(job: Reproduction, row: Row) -> tuple[list[str], str]:
    model = job.model or row.model
    known = _known_scoring(model)
    if known is None and (job.metrics is None or job.ref is None):
        raise ErkGuidError(
            f"which data set does --model {model} belong to? Give --metrics and --ref"
        )
    metrics, ref = known or ([], "")
    metrics = list(job.metrics or metrics)
    for name in metrics:
        check_detector_name(name)
        if not SCORE_NAME.fullmatch(name):
            raise ErkGuidError(
                f"--metrics {printable(name, 80)}: a report shows names of English letters, digits "
                "and _.:+- alone, at most 80 of them; register the detector under another name"
            )
    return metrics, job.ref or ref


def resamples_of(job: Reproduction, metrics: Sequence[str]) -> int:
    if job.bootstrap is not None:
        return job.bootstrap
    return RESAMPLES if list(metrics) == ["fd_digits"] else 0


def spell(seeds: Sequence[int]) -> str:
    """Return '100000-100499', or the list itself if it is not a range."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))
