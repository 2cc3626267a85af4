"""Make dataset-refs/digits.npz: statistics of the training digits, features of held-out ones.

python scripts/digits_reference.py --data digits32.npz
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from erk_guid.cli.common import reporting_errors
from erk_guid.metrics import Scoring, make_reference, read_reference, write_reference

ROOT = Path(__file__).parents[1]
PLACES = (ROOT / "dataset-refs" / "digits.npz", ROOT / "erk_guid" / "data" / "digits-refs.npz")
"""The same file twice: where users look, and where an installed package finds it."""

METRIC = "fd_digits"


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="digits32.npz")
@click.option("--training", default=8000, show_default=True, help="The first so many digits.")
@reporting_errors
def main(data: Path, training: int) -> None:
    """Write statistics of the first digits (the training set) and features of all that follow."""
    scoring = Scoring(metrics=[METRIC], device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        first, rest = Path(folder) / "first.npz", Path(folder) / "rest.npz"
        make_reference(data, first, scoring, last=training)
        make_reference(data, rest, scoring, first=training, keep=1 << 30)
        statistics, features = read_reference(first), read_reference(rest)
    about = {**statistics.about, "features": f"of {len(features.features[METRIC])} held-out digits"}
    write_reference(PLACES[0], statistics.statistics, features.features, about)
    shutil.copyfile(*PLACES)
    click.echo(f"{PLACES[0]}: {PLACES[0].stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
