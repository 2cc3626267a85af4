"""The parameter-free form: exact on Gaussian modes, never beyond its pair, better on the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import golden
from test_solvers import BEGIN, END, carried, denoise

import erk_guid
from erk_guid.cli.generate import generate_command
from erk_guid.guidance import Pair, blend_weight, response_in_step, response_of_pair
from erk_guid.mixtures import tree_mixture
from erk_guid.schedules import logsnr_sigmas

AUTO = erk_guid.Guidance.auto()


def factors(mu: float, r: float) -> tuple[float, float, float]:
    """Of one step on a mode, as the method's text has them: exact, Euler's, Heun's."""
    exact = math.sqrt(mu + (1 - mu) * r**2)
    euler = 1 - (1 - r) * (1 - mu)
    heun = 1 - (1 - r) / 2 * ((1 - mu) + (1 - mu / exact**2) * euler / r)
    return exact, euler, heun


@pytest.mark.parametrize("r", [0.001, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("mu", [0.05, 0.3, 0.7, 0.95])
def test_the_weight_is_the_textbooks_quotient_without_its_cancellation(mu: float, r: float) -> None:
    exact, euler, heun = factors(mu, r)
    weight = blend_weight(torch.tensor([mu]).double(), torch.tensor(r).double())
    assert float(weight) == pytest.approx((exact - euler) / (heun - euler), rel=1e-6)


def test_the_weight_rises_from_the_ratio_to_one() -> None:
    # So the blend lies between the two solutions: it cannot run away, whatever mu was measured.
    mu = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for r in (0.001, 0.03, 0.5, 0.99):
        weight = blend_weight(mu, torch.tensor(r).double())
        assert weight[0] == pytest.approx(r)
        assert weight[-1] == pytest.approx(1)
        assert (weight.diff() > 0).all()
        middle = blend_weight(mu, torch.tensor(r).double(), torch.tensor(r**0.5).double(), 1.0)
        assert (middle > 0).all()
        assert (middle <= 1 + 1e-12).all()


@pytest.mark.parametrize(("solver", "options"), [("heun", {}), ("dpm2", {}), ("dpm2", {"r": 0.8})])
@pytest.mark.parametrize("std", [0.003, 0.05, 0.5, 3.0, 200.0])
def test_a_gaussian_is_sampled_exactly(solver: str, options: dict[str, Any], std: float) -> None:
    # One mode, off centre, in five steps from 80: plain Heun is far off. Catches any slip in the
    # factors, the response from the pair (later steps), and that from one step (the first).
    centre = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return centre + (x - centre) * std**2 / (std**2 + sigma**2)

    x = centre + 80 * torch.randn(4, 3, dtype=torch.float64)
    sigmas = erk_guid.karras_sigmas(5)[:-1]
    found = erk_guid.sample(gaussian, x, sigmas, solver=solver, guidance=AUTO, **options)
    exact = centre + (x - centre) * math.sqrt((std**2 + 0.002**2) / (std**2 + 80**2))
    plain = erk_guid.sample(gaussian, x, sigmas, solver=solver, **options)
    error, before = (float((y - exact).norm()) for y in (found, plain))
    assert error < 1e-6 * float((x - centre).norm())
    assert error < 1e-2 * before


def test_responses_are_those_of_the_mode() -> None:
    std, sigma, node = 0.3, torch.tensor(0.8).double(), torch.tensor(0.4).double()
    mu = std**2 / (std**2 + 0.8**2)
    x = torch.randn(5, 7, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)

    def drift(x: torch.Tensor, s: float) -> torch.Tensor:
        return x * s / (std**2 + s**2)

    pair = Pair(x, y, drift(x, 0.8), drift(y, 0.8), 0.1)
    torch.testing.assert_close(response_of_pair(pair, sigma), torch.full([5], mu).double())
    f = drift(x, 0.8)
    at_node = drift(x + (0.32 - 0.8) * f, 0.32)
    torch.testing.assert_close(response_in_step(f, at_node, node), torch.full([5], mu).double())
    # Nothing to measure: the plain step.
    same = Pair(x, x, f, f, 0.1)
    assert (response_of_pair(same, sigma) == 1).all()
    assert response_in_step(0 * f, 0 * f, node).isfinite().all()
    # Drifts that no mode has: the nearest end, not what the formula's pole would give.
    assert (response_in_step(f, 3 * f, node) == 0).all()
    for wild in (0.01, -1):
        assert response_in_step(f, wild * f, node) == pytest.approx(1)


@pytest.mark.parametrize("solver", ["heun", "dpm2"])
def test_the_order_stays_two(solver: str) -> None:
    x0 = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (64, 128):
        sigmas = logsnr_sigmas(steps + 1, END, BEGIN)[:-1]
        found = erk_guid.sample(denoise, x0, sigmas, solver=solver, guidance=AUTO)
        errors.append(float((found - carried(x0, BEGIN, END)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def gauss_problem() -> tuple[Any, torch.Tensor, torch.Tensor]:
    stds = torch.tensor([1, 0.5, 0.2, 0.05, 0.01], dtype=torch.float64)
    noise = torch.randn(150, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = noise * (stds**2 + 80**2).sqrt()
    end = noise * (stds**2 + 0.002**2).sqrt()
    return (lambda x, s: x * stds**2 / (stds**2 + s**2)), start, end


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tree5", "tree80", "gauss"])
def test_errors_fall_to_less_than_half_on_the_oracle(name: str) -> None:
    data = golden("tree")
    if name == "gauss":
        denoiser, start, end = gauss_problem()
    else:
        denoiser, start, end = tree_mixture(), data[f"{name}_start"], data[f"{name}_end"]
    for levels in (3, 4, 6, 8, 11, 16, 32, 64):
        sigmas = erk_guid.karras_sigmas(levels, sigma_max=5 if name == "tree5" else 80)[:-1]
        errors = [
            (erk_guid.sample(denoiser, start, sigmas, solver=solver, guidance=guidance) - end)
            .norm(dim=1).mean()
            for solver in ("heun", "dpm2")
            for guidance in (None, AUTO)
        ]  # fmt: skip
        assert errors[1] < 0.45 * errors[0], levels
        assert errors[3] < 0.55 * errors[2], levels


def test_it_costs_no_evaluation_and_runs_in_float32() -> None:
    infos: list[erk_guid.StepInfo] = []
    x = 80 * torch.randn(3, 2, 4, 4)
    erk_guid.sample(
        lambda x, s: torch.tanh(x / (1 + s * s)), x, erk_guid.karras_sigmas(6),
        guidance=AUTO, callback=infos.append,
    )  # fmt: skip
    assert infos[-1].evaluations == 11
    # Every step but the Euler step to 0 is blended, the first one too.
    sizes = [info.correction_size for info in infos]
    assert all(s is not None and s.shape == (3,) and (s > 0).all() for s in sizes[:-1])
    assert sizes[-1] is None


def test_samples_do_not_depend_on_their_neighbours() -> None:
    x = 80 * torch.randn(4, 3, dtype=torch.float64)
    sigmas = erk_guid.karras_sigmas(6)
    tree = lambda x, s: torch.tanh(x / (1 + s * s))  # noqa: E731
    whole = erk_guid.sample(tree, x, sigmas, guidance=AUTO)
    parts = [erk_guid.sample(tree, x[i : i + 1], sigmas, guidance=AUTO) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=1e-12)


def test_who_has_no_such_form_says_so() -> None:
    x, sigmas = torch.zeros(1, 2), erk_guid.karras_sigmas(3)
    for solver in ("euler", "deis", "ipndm", "ipndm_v", "dpmpp", "unipc"):
        with pytest.raises(ValueError, match=r"no parameter-free form; .* have one: dpm2, heun"):
            erk_guid.sample(lambda x, s: x, x, sigmas, solver=solver, guidance=AUTO)
    with pytest.raises(ValueError, match="form must be 'published' or 'auto'"):
        erk_guid.Guidance(form="best")
    with pytest.raises(ValueError, match="w_stiff must be a number or 'auto', got 'much'"):
        erk_guid.Guidance.of("much", 0.5)


def test_on_the_command_line(tmp_path: Path) -> None:
    args = ["--preset", "digits", "--seeds", "0-3", "--steps", "4", "--device", "cpu"]
    for name, more in (("auto", ["--w_stiff", "auto"]), ("plain", [])):
        out = ["--outdir", str(tmp_path / name), "--trace", str(tmp_path / f"{name}.csv")]
        done = CliRunner().invoke(generate_command, [*args, *out, *more])
        assert done.exit_code == 0, done.output
    assert '"w_stiff": "auto"' in (tmp_path / "auto" / "run.json").read_text()
    images = [(tmp_path / name / "000001.png").read_bytes() for name in ("auto", "plain")]
    assert images[0] != images[1]
    assert b"w_stiff auto" in images[0]
