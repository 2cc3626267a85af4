"""Compare our Frechet distance at 2048 dimensions with that by SciPy's matrix square root.

python benchmarks/frechet.py --rounds 3
"""

from __future__ import annotations

import click
import numpy as np
from common import in_turn, machine, report_ratio
from scipy.linalg import sqrtm

from erk_guid.metrics import Statistics, frechet_distance


def statistics(dim: int, images: int, seed: int) -> Statistics:
    """Make statistics of randomly mixed features; variances fall as a power, as a detector's do."""
    rng = np.random.default_rng(seed)
    mixing, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    x = rng.standard_normal((images, dim)) * np.arange(1, dim + 1) ** -0.5 @ mixing
    return Statistics(x.mean(0), np.cov(x, rowvar=False), images)


def by_square_root(a: Statistics, b: Statistics) -> float:
    """Compute the distance as textbooks do."""
    root = sqrtm(a.sigma @ b.sigma)
    apart = a.mu - b.mu
    return float(apart @ apart + np.trace(a.sigma + b.sigma - 2 * root.real))


@click.command()
@click.option("--dim", default=2048, show_default=True)
@click.option("--images", default=8000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(dim: int, images: int, rounds: int) -> None:
    """Time both in turn, and compare what they find."""
    a, b = statistics(dim, images, 1), statistics(dim, images, 2)
    print(f"Frechet distance, {dim} dimensions, statistics of {images} images; {machine()}")
    ours = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    theirs = by_square_root(a, b)
    print(f"  ours {ours:.9f}, square root {theirs:.9f}, apart {abs(ours / theirs - 1):.1e} of it")
    times = in_turn(
        lambda: by_square_root(a, b),
        lambda: frechet_distance(a.mu, a.sigma, b.mu, b.sigma),
        rounds,
    )
    report_ratio(("scipy.linalg.sqrtm", "erk_guid.metrics.frechet_distance"), times)


if __name__ == "__main__":
    main()
