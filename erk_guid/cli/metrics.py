"""``calculate_metrics.py`` and ``erk-guid metrics``: EDM2's command line for Frechet distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from erk_guid.cli.common import (
    Names,
    PathType,
    load_plugins,
    name_and_path,
    refuse_inputs,
    reporting_errors,
)
from erk_guid.cli.options import sampler_options
from erk_guid.cli.sampler import config_fields
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.peers import launched_rank
from erk_guid.metrics.scoring import Scoring, calc, gen, make_reference

F = TypeVar("F", bound=Callable[..., Any])

METRICS = click.option(
    "--metrics",
    metavar="LIST",
    type=Names(),
    default=",".join(Scoring.metrics),
    show_default=True,
    help="Metrics: a detector's name means the Frechet distance of its features (fid, fd_dinov2, "
    "fd_digits, a plugin's); kid, pr and is are other scores, with the detector after a colon: "
    "kid:fd_dinov2.",
)
REF = click.option(
    "--ref",
    metavar="PKL|NPZ|URL",
    required=True,
    help="Reference statistics: a file, a URL, or digits (shipped), img512, img64 (EDM2's).",
)
NUM = click.option(
    "--num",
    metavar="INT",
    type=click.IntRange(min=2, max=10_000_000),
    default=Scoring.num,
    show_default=True,
    help="How many images to score.",
)
SEED = click.option(
    "--seed",
    metavar="INT",
    type=click.IntRange(min=0, max=1 << 48),
    default=Scoring.seed,
    show_default=True,
)
BATCH = click.option(
    "--batch",
    metavar="INT",
    type=click.IntRange(min=1),
    default=Scoring.batch,
    show_default=True,
    help="Images at a time, per process.",
)
WORKERS = click.option(
    "--workers",
    metavar="INT",
    type=click.IntRange(min=0),
    default=Scoring.workers,
    show_default=True,
    help="Threads that read images ahead, per process.",
)
DEVICE = click.option(
    "--device", metavar="STR", help="cuda, mps or cpu.  [default: the best present]"
)
WEIGHTS = click.option(
    "--detector-weights",
    metavar="NAME=FILE",
    multiple=True,
    callback=name_and_path,
    help="Local weights of a detector, in place of the cached or downloaded ones.",
)
PLUGIN = click.option(
    "--plugin",
    metavar="MODULE|FILE.py",
    multiple=True,
    callback=load_plugins,
    expose_value=False,
    is_eager=True,
    help="Python code to run first, to register your own detectors.",
)
JSON = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=PathType(dir_okay=False, path_type=Path),
    help="Write the scores, and all that is needed to repeat them, to FILE.",
)
FEATURES = click.option(
    "--features",
    metavar="FILE",
    type=PathType(dir_okay=False, path_type=Path),
    help="Write every image's features and their statistics to FILE (.npz).",
)
BOOTSTRAP = click.option(
    "--bootstrap",
    metavar="INT",
    type=click.IntRange(min=0, max=1_000_000),
    default=Scoring.bootstrap,
    show_default=True,
    help="Resamples for a standard error beside each distance; 0 for none.",
)


REFRESH = click.option(
    "--refresh",
    is_flag=True,
    help="Download the reference and the networks again, though they are in the cache.",
)


def options(*chosen: Callable[[F], F]) -> Callable[[F], F]:
    """Add several options at once, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def metrics_command() -> None:
    """Compute Frechet distances between images and a reference data set (FID, FD-DINOv2, ...).

    \b
    Examples:
      # Score a folder of the shipped model's digits, offline
      python calculate_metrics.py calc --images=out --ref=digits --metrics=fd_digits --num=500
    \b
      # FID and FD-DINOv2 of 50,000 ImageNet images, on 8 GPUs
      # (behind '--', or torchrun takes --num for an option of its own)
      torchrun --standalone --nproc_per_node=8 -- calculate_metrics.py calc \\
          --images=out --ref=img512 --num=50000 --json=scores.json
    \b
      # Generate and score without writing images
      python calculate_metrics.py gen --preset=digits --ref=digits --metrics=fd_digits \\
          --num=500 --steps=8 --w_stiff=0.5 --w_con=0.1
    \b
      # Statistics of a data set of your own
      python calculate_metrics.py ref --data=my-images.zip --dest=dataset-refs/mine.npz
    """


@metrics_command.command("calc")
@click.option(
    "--images",
    metavar="PATH|ZIP",
    required=True,
    type=PathType(path_type=Path),
    help="Folder (searched recursively), zip, or .npz of images.",
)
@options(REF, METRICS, NUM, SEED, BATCH, WORKERS, DEVICE, WEIGHTS)
@options(PLUGIN, JSON, FEATURES, BOOTSTRAP, REFRESH)
@reporting_errors
def calc_command(images: Path, ref: str, json_path: Path | None, **fields: Any) -> None:
    """Score existing images: a folder, a zip or an .npz.

    If there are more than --num, a random --num of them are scored, the same for the same
    --seed.
    """
    refuse_inputs(json=json_path, features=fields["features"])
    _report(calc(images, ref, Scoring(json=json_path, **fields)))


@metrics_command.command("gen")
@options(REF, METRICS, NUM, SEED)
@sampler_options
@options(WEIGHTS, PLUGIN, JSON, FEATURES, BOOTSTRAP, REFRESH)
@reporting_errors
def gen_command(
    ref: str,
    metrics: list[str],
    num: int,
    seed: int,
    detector_weights: dict[str, str],
    json_path: Path | None,
    features: Path | None,
    bootstrap: int,
    refresh: bool,
    **fields: Any,
) -> None:
    """Generate the images of seeds SEED to SEED+NUM-1 and score them, without writing them.

    Seeds that differ by a multiple of 2^32 are one image, as in EDM2's programs.
    """
    config = GenerationConfig(**config_fields(**fields))
    scoring = Scoring(
        metrics=metrics,
        num=num,
        seed=seed,
        batch=config.batch,
        device=config.device,
        detector_weights=detector_weights,
        json=json_path,
        features=features,
        bootstrap=bootstrap,
        refresh=refresh,
    )
    refuse_inputs(json=json_path, features=features)
    _report(gen(config, ref, scoring))


@metrics_command.command("ref")
@click.option(
    "--data",
    metavar="PATH|ZIP",
    required=True,
    type=PathType(path_type=Path),
    help="Folder (searched recursively), zip, or .npz with an array of images.",
)
@click.option(
    "--dest",
    metavar="FILE",
    required=True,
    type=PathType(dir_okay=False, path_type=Path),
    help="File to write: .npz, or .pkl as EDM2's programs read it.",
)
@click.option(
    "--first",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Begin with this image, in the order of the names.",
)
@click.option(
    "--last",
    metavar="INT",
    type=click.IntRange(min=1),
    help="End before this image.  [default: take all]",
)
@click.option(
    "--keep-features",
    "keep",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also keep the features (as float16, if that keeps them apart) of this many images, or of "
    "all if there are fewer, for precision and recall.",
)
@options(METRICS, BATCH, WORKERS, DEVICE, WEIGHTS, PLUGIN)
@reporting_errors
def ref_command(
    data: Path, dest: Path, first: int, last: int | None, keep: int, **fields: Any
) -> None:
    """Make reference statistics of a data set."""
    refuse_inputs(dest=dest)
    counts = make_reference(data, dest, Scoring(**fields), first=first, last=last, keep=keep)
    for name, count in counts.items():
        click.echo(f"{dest}: {name} of {count} images")


def _report(result: dict[str, Any]) -> None:
    if launched_rank() != 0:
        return
    errors = result.get("standard_errors", {})
    for name, score in result["scores"].items():
        error = f"  (standard error {errors[name]:.4g})" if name in errors else ""
        click.echo(f"{name:<10} {score:.6g}{error}")
