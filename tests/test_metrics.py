"""Frechet distance, running statistics, precision and recall, bootstrap: the numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DATA
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from erk_guid.metrics import (
    Moments,
    bootstrap_distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from erk_guid.metrics.scores import neighbours
from erk_guid.metrics.statistics import Statistics


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


@pytest.fixture(scope="module")
def golden_features() -> dict[str, np.ndarray]:
    with np.load(DATA / "frechet.npz") as data:
        return dict(data)


# --- Frechet distance -----------------------------------------------------------------------


def test_golden_distances(golden_features: dict[str, np.ndarray]) -> None:
    # Catches: n instead of n - 1 in the covariance (1e-3), the mean term left out or not squared,
    # and in the second case a Cholesky factor of a singular matrix (fails, or is far off).
    a, b = golden_features["features_a"], golden_features["features_b"]
    whole = frechet_distance(*statistics(a), *statistics(b))
    assert whole == pytest.approx(golden_features["fd_ab"], rel=1e-8)
    few = frechet_distance(*statistics(a[:10]), *statistics(b))
    assert few == pytest.approx(golden_features["fd_a10_b"], rel=1e-4)
    swapped = frechet_distance(*statistics(b), *statistics(a[:10]))
    assert swapped == pytest.approx(few, rel=1e-9)


def test_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
    a, b = np.exp(rng.standard_normal((2, 40)) * 3)
    a[:15] = 0  # rank-deficient, in the same basis
    b[10:20] = 0
    for first, second in ((a + 1e-3, b + 1e-3), (a, b + 1e-3), (a + 1e-3, b), (a, b)):
        exact = ((first**0.5 - second**0.5) ** 2).sum()
        got = frechet_distance(
            np.zeros(40), (basis * first) @ basis.T, np.zeros(40), (basis * second) @ basis.T
        )
        assert got == pytest.approx(exact, rel=1e-6)


def test_distances_of_small_cases() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, eye, torch.ones(3), 4 * eye) == pytest.approx(6)
    # Two single points: only the means count.
    assert frechet_distance(zero, 0 * eye, torch.ones(3), 0 * eye) == pytest.approx(3)
    assert frechet_distance([0.0], [[4.0]], [1.0], [[9.0]]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "2 against 3 dimensions"),
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "sigma1"),
        ((np.zeros(2), np.full((2, 2), np.nan), np.zeros(2), np.eye(2)), "not finite"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, 2], [0, 1.0]])), "not symmetric"),
        ((np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "negative"),
        ((np.zeros(2), np.array([[1, 3], [3, 1.0]]), np.zeros(2), np.eye(2)), "negative"),
    ],
)
def test_what_is_no_covariance_is_refused(arguments: tuple[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


# --- running statistics ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_moments_are_numpys_whatever_the_batch(batch: int) -> None:
    # The mean is a million deviations away: sums of squares, subtracted at the end, would lose
    # twelve digits (and fail here), merged scatters lose none.
    features = np.random.default_rng(1).standard_normal((300, 5)) + 1e6
    moments = Moments(5)
    for start in range(0, 300, batch):
        moments.add(torch.from_numpy(features[start : start + batch]))
    found = moments.statistics()
    assert found.count == 300
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_refuse_what_they_cannot_use() -> None:
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"\[n, 3\], got \[2, 4\]"):
        moments.add(torch.zeros(2, 4))
    moments.add(torch.zeros(0, 3))
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.statistics()


# Not ru_maxrss: a child begins with the peak of the process that started it, here pytest's own.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEMORY = (
    PEAK
    + """
import sys, torch
from erk_guid.metrics import Moments
torch.manual_seed(0)
dim, rows = 2048, int(sys.argv[1])
moments = Moments(dim)
for _ in range(rows // 64):
    moments.add(torch.randn(64, dim))
print(peak())
"""
)


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    # 6,400 rows of 2048 features are 105 MB in float64, more than is allowed here.
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEMORY, str(n)], text=True))
        for n in (640, 7040)
    ]
    assert peaks[1] - peaks[0] < 40_000  # in KB


# --- precision and recall -------------------------------------------------------------------


def data_sets() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    real = rng.standard_normal((400, 16))
    return {
        "alike": (real, rng.standard_normal((350, 16))),
        "shifted": (real, rng.standard_normal((500, 16)) * 0.7 + 0.5),
        "clusters": (
            rng.standard_normal((300, 64)) + 4 * rng.integers(0, 3, (300, 1)),
            rng.standard_normal((300, 64)) + 4 * rng.integers(0, 2, (300, 1)),
        ),
    }


@pytest.mark.parametrize("name", ["alike", "shifted", "clusters"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(
    name: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, generated = (torch.from_numpy(a).float() for a in data_sets()[name])
    expected = calculate_precision_recall_full(generated, real, neighborhood=k)
    assert precision_recall(real=real, generated=generated, k=k) == pytest.approx(expected)
    assert min(expected) > 0
    # In small tiles, too, with a remainder.
    monkeypatch.setattr(neighbours, "TILE", 7 * 400)
    assert precision_recall(real=real, generated=generated, k=k) == pytest.approx(expected)


def test_what_precision_and_recall_mean() -> None:
    # Catches real and generated exchanged, as torch-fidelity had them before 0.4.0.
    rng = np.random.default_rng(3)
    real = rng.standard_normal((500, 8))
    collapsed = real[7] + 1e-3 * rng.standard_normal((500, 8))
    precision, recall = precision_recall(real=real, generated=collapsed)
    assert precision == 1
    assert recall <= 0.01
    dispersed = 6 * rng.standard_normal((500, 8))
    precision, recall = precision_recall(real=real, generated=dispersed)
    assert precision < 0.05
    assert recall > 0.95
    assert precision_recall(real=real, generated=real.copy()) == (1, 1)
    far = precision_recall(real=real, generated=real + 100)
    assert far == (0, 0)


def test_precision_and_recall_refuse_what_they_cannot_use() -> None:
    points = np.zeros((5, 3))
    with pytest.raises(ValueError, match="real features have 3 dimensions, generated ones 2"):
        precision_recall(real=points, generated=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="at least 6 generated images, got 5"):
        precision_recall(real=np.zeros((9, 3)), generated=points, k=5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        precision_recall(real=points, generated=points, k=0)
    with pytest.raises(ValueError, match="floating-point"):
        precision_recall(real=points.astype(int), generated=points)
    with pytest.raises(ValueError, match="real features have values that are not finite"):
        precision_recall(real=points + np.nan, generated=points)


TILES = (
    PEAK
    + """
import sys, torch
from erk_guid.metrics.scores import neighbours
torch.manual_seed(0)
n = int(sys.argv[1])
real, generated = torch.randn(n, 2048), torch.randn(n, 2048)
# One tile of each pass: the memory of the whole, a fraction of the time.
def first(rows, columns, whole=neighbours._tiles):
    return whole(rows, columns)[:1]
neighbours._tiles = first
radii = neighbours._radii(real, 3, lambda rows: None)
neighbours._share_inside(generated, real, torch.ones(n), lambda rows: None)
print(peak())
"""
)


@linux
@pytest.mark.slow
def test_50000_by_50000_features_fit_in_four_gigabytes() -> None:
    # The whole matrix of distances alone would be 10 GB.
    peak = int(subprocess.check_output([sys.executable, "-c", TILES, "50000"], text=True))
    assert peak < 4_000_000
    assert peak > 800_000  # the features themselves were there


# --- inception score ------------------------------------------------------------------------


def test_inception_score_of_certain_and_uncertain_classifiers() -> None:
    rng = np.random.default_rng(4)
    classes = rng.integers(0, 10, 2000)
    certain = 50 * np.eye(10)[classes]
    mean, deviation = inception_score(certain)
    # Ten classes, each surely known; in splits of 200 their frequencies are uneven, which costs
    # (10 - 1) / (2 * 200) of entropy.
    assert mean == pytest.approx(10 * np.exp(-9 / 400), rel=0.01)
    assert 0 < deviation < 0.2
    assert inception_score(np.zeros((100, 10)))[0] == pytest.approx(1)
    logits = torch.from_numpy(rng.standard_normal((105, 10)))
    expected = isc_features_to_metric(logits, 10, True, 2020)
    assert inception_score(logits)[0] == pytest.approx(expected["inception_score_mean"])
    with pytest.raises(ValueError, match="10 splits need at least as many images, got 9"):
        inception_score(np.zeros((9, 10)))


# --- bootstrap ------------------------------------------------------------------------------


def test_bootstrap_errors_are_those_of_new_samples() -> None:
    # The true scatter is had by drawing anew; the bootstrap sees one sample only.
    rng = np.random.default_rng(5)
    reference = Statistics(np.zeros(4), np.eye(4))
    fresh = []
    for _ in range(300):
        x = 1.5 * rng.standard_normal((400, 4))
        fresh.append(frechet_distance(*statistics(x), reference.mu, reference.sigma))
    estimate = bootstrap_distances([x], reference, 300)[:, 0].std(ddof=1)
    assert estimate == pytest.approx(np.std(fresh), rel=0.25)


def test_paired_differences_scatter_less() -> None:
    rng = np.random.default_rng(6)
    reference = Statistics(np.zeros(4), np.eye(4))
    x = rng.standard_normal((300, 4)) + 0.3
    y = x + 0.02
    distances = bootstrap_distances([x, y], reference, 100)
    apart = (distances[:, 1] - distances[:, 0]).std()
    assert apart < 0.2 * distances[:, 0].std()
    assert np.array_equal(distances, bootstrap_distances([x, y], reference, 100))  # seeded
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_distances([x, y[1:]], reference, 100)
    with pytest.raises(ValueError, match="at least 2 resamples"):
        bootstrap_distances([x], reference, 1)


# --- kernel distance --------------------------------------------------------------------------


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the paper (Binkowski et al. 2018, eq. 4), pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_the_kernel_distance_is_the_papers() -> None:
    # One subset with all images: catches a biased estimate, another kernel, a swapped sign.
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (30, 5)), rng.normal(0.4, 1.3, (30, 5))
    mean, spread = kernel_distance(x, y, subsets=3, subset_size=30)
    assert mean == pytest.approx(mmd_by_loops(x, y), rel=1e-5)
    assert spread == pytest.approx(0, abs=1e-6)
    # Of sets of one kind it is 0 on the average, whatever their number.
    same = [
        kernel_distance(rng.normal(0, 1, (40, 5)), rng.normal(0, 1, (40, 5)), 1, 40)[0]
        for _ in range(300)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / 300**0.5


def test_the_kernel_distance_names_what_is_wrong() -> None:
    x = np.zeros((20, 3))
    for real, made, message in (
        (x, np.zeros((20, 4)), "real features have 3 dimensions, generated ones 4"),
        (x, np.full((20, 3), np.nan), "generated features have values that are not finite"),
        (x[:5], x, "subsets of 10 images need at least as many real ones, got 5"),
        (x.astype(int), x, "must be floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(real, made, subset_size=10)
