"""``calculate_precision_recall_is.py`` and ``erk-guid precision-recall``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from erk_guid.cli.common import Names, PathType, refuse_inputs, reporting_errors
from erk_guid.cli.metrics import DEVICE, JSON, PLUGIN, WEIGHTS, WORKERS, options
from erk_guid.common.datasets import refuse_overwriting
from erk_guid.common.files import JSON_START, check_writable
from erk_guid.metrics.comparison import (
    MANIFOLD_DETECTOR,
    METRICS,
    SCORE_DETECTOR,
    Comparison,
    compare,
    warn_unequal,
)
from erk_guid.metrics.detectors import detector_names
from erk_guid.metrics.scoring import tell_replaced, write_json


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("generated", metavar="GEN_DIR", type=PathType(path_type=Path))
@click.option(
    "--real",
    metavar="DIR",
    default=Comparison.real,
    show_default=True,
    help="Real images: a folder, zip or .npz, an .npz of features, or 'digits' (shipped).",
)
@click.option(
    "--metrics",
    metavar="LIST",
    type=Names(METRICS),
    default=",".join(Comparison.metrics),
    show_default=True,
    help="What to compute.",
)
@click.option(
    "--detector",
    metavar="STR",
    help=f"Whose features to use ({', '.join(detector_names())}, or a plugin's).  [default: "
    f"{MANIFOLD_DETECTOR} for precision and recall, {SCORE_DETECTOR} for the inception score]",
)
@click.option(
    "--k",
    metavar="INT",
    type=click.IntRange(min=1),
    default=Comparison.k,
    show_default=True,
    help="A point's radius is the distance to its k-th nearest neighbour.",
)
@click.option(
    "--batch",
    metavar="INT",
    type=click.IntRange(min=1),
    default=Comparison.batch,
    show_default=True,
    help="Images at a time.",
)
@options(WORKERS, DEVICE, WEIGHTS, PLUGIN, JSON)
@reporting_errors
def precision_recall_command(json_path: Path | None, **fields: Any) -> None:
    """Compute precision, recall and inception score of the images in GEN_DIR.

    GEN_DIR is a folder (searched recursively), a zip or an .npz. Values are those of
    torch-fidelity >= 0.4.0. Memory does not grow with the square of the number of images.

    \b
    Examples:
      python calculate_precision_recall_is.py out --real=imagenet-val-512
    \b
      # The shipped model's digits, offline
      python calculate_precision_recall_is.py out --real=digits --detector=fd_digits
    """
    job = Comparison(**fields)
    refuse_inputs(json=json_path)
    refuse_overwriting(
        {"--json": json_path}, (job.generated, job.real, *job.detector_weights.values())
    )
    if json_path is not None:
        check_writable(json_path, JSON_START)
        tell_replaced({"--json": json_path})
    result = compare(job)
    if json_path is not None:
        write_json(json_path, result)
    for name in ("precision", "recall"):
        if name in result:
            click.echo(f"{name}: {result[name]:.3f}")
    if "inception_score_mean" in result:
        click.echo(
            f"inception score: {result['inception_score_mean']:.3f} "
            f"(deviation over {result['splits']} splits {result['inception_score_std']:.3f}, "
            f"rng_seed {result['rng_seed']})"
        )
    warn_unequal(result)
