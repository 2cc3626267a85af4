"""Noise levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erk_guid
from erk_guid.schedules import make_sigmas, vp_sigma, vp_sigma_slope, vp_time


def test_golden_schedules(golden_solvers: dict[str, Any]) -> None:
    for name, rho, tolerance in (
        ("polynomial_7", 7, 1e-6), ("logsnr_7", 7, 1e-6),
        ("time_uniform_1", 1, 2e-4), ("time_uniform_2", 2, 2e-4),
    ):  # fmt: skip
        expected = golden_solvers[f"schedule_{name}"].double()
        found = make_sigmas(name.rpartition("_")[0], len(expected), 0.002, 80, rho)
        assert found[-1] == 0
        # In time_uniform the published last point is off by float32's ln(sigma_min^2 + 1).
        kept = slice(None, -1) if name.startswith("time") else slice(None)
        apart = (found[:-1] - expected).abs()[kept] / expected[kept]
        assert apart.max() < tolerance
        assert found[-2] == 0.002


def test_vp_time_inverts_and_its_slope_is_the_derivative() -> None:
    for sigma in (1e-4, 0.002, 0.1, 1, 10, 80):
        time = vp_time(sigma)
        assert vp_sigma(time) == pytest.approx(sigma, rel=1e-10)
        h = 1e-6 * time
        slope = (vp_sigma(time + h) - vp_sigma(time - h)) / (2 * h)
        assert vp_sigma_slope(time) == pytest.approx(slope, rel=1e-6)
    assert (vp_time(0.002), vp_time(80)) == pytest.approx((1e-3, 1))


def test_schedules_refuse_what_they_cannot_do() -> None:
    for name in ("logsnr", "time_uniform"):
        with pytest.raises(ValueError, match="must be below sigma_max"):
            make_sigmas(name, 5, 3, 2, 7)
        with pytest.raises(ValueError, match="num_steps must be"):
            make_sigmas(name, 0, 0.002, 80, 7)
    with pytest.raises(ValueError, match="unknown schedule 'cosine'; known: polynomial"):
        make_sigmas("cosine", 5, 0.002, 80, 7)
    with pytest.raises(ValueError, match="rho must be"):
        make_sigmas("time_uniform", 5, 0.002, 80, -1)


def test_karras_sigmas() -> None:
    sigmas = erk_guid.karras_sigmas(32)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 33
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (80, 0.002, 0)
    k = 13
    by_hand = (80 ** (1 / 7) + k / 31 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(sigmas[k]) == pytest.approx(by_hand, rel=1e-13)
    assert erk_guid.karras_sigmas(1).tolist() == [80, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_steps": 2.5}, "got 2.5"),
        ({"num_steps": 4, "sigma_min": 0}, "sigma_min must be a positive, finite number, got 0"),
        ({"num_steps": 4, "sigma_max": float("inf")}, "sigma_max must be a positive, finite"),
        ({"num_steps": 4, "rho": -1}, "rho must be a positive, finite number, got -1"),
        ({"num_steps": 4, "sigma_min": 90}, "sigma_min 90 must be below sigma_max 80"),
    ],
)
def test_karras_sigmas_names_bad_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        erk_guid.karras_sigmas(**arguments)
