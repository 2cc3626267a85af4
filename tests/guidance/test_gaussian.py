"""The parameter-free form: Gaussian modes, bounds, the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import oracle
from PIL import Image
from support.problems import BEGIN, END, carried, denoise

import erk_guid
from erk_guid.cli.generate import generate_command
from erk_guid.guidance import (
    ERKGuidance,
    Guidance,
    ParameterFreeGuidance,
    make_guidance,
)
from erk_guid.guidance.gaussian import LARGEST_RESPONSE, blend_weight, response_in_step
from erk_guid.mixtures import tree_mixture
from erk_guid.quadrature import modal_weights
from erk_guid.schedules import logsnr_sigmas
from erk_guid.solvers import Evaluation, Pair, StepResult, make_solver

AUTO = ParameterFreeGuidance()


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
    weight = blend_weight(torch.tensor([mu]).double(), r)
    assert float(weight) == pytest.approx((exact - euler) / (heun - euler), rel=1e-6)


def test_the_weight_rises_from_the_ratio_to_one() -> None:
    # So the blend lies between the two solutions: it cannot run away, whatever mu was measured.
    mu = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for r in (0.001, 0.03, 0.5, 0.99):
        weight = blend_weight(mu, r)
        assert weight[0] == pytest.approx(r)
        assert weight[-1] == pytest.approx(1)
        assert (weight.diff() > 0).all()
        middle = blend_weight(mu, r, r**0.5, 1.0)
        assert (middle > 0).all()
        assert (middle <= 1 + 1e-12).all()


@pytest.mark.parametrize("options", [{}, {"r": 0.8}])
@pytest.mark.parametrize("std", [0.003, 0.05, 0.5, 3.0, 200.0])
def test_dpm2_samples_a_gaussian_exactly(options: dict[str, Any], std: float) -> None:
    # One mode, off centre, in five steps from 80: the plain solver is far off. Catches any slip in
    # the factors and in the response.
    error, before = errors_on_a_gaussian("dpm2", std, **options)
    assert error < 1e-6
    assert error < 1e-2 * before


@pytest.mark.parametrize("std", [0.003, 0.05, 0.5, 3.0])
def test_heun_comes_nearer_on_a_gaussian(std: float) -> None:
    # Not exact: its weights serve modes of all sizes at once.
    error, before = errors_on_a_gaussian("heun", std)
    assert error < 0.45 * before


def errors_on_a_gaussian(solver: str, std: float, **options: Any) -> tuple[float, float]:
    centre = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return centre + (x - centre) * std**2 / (std**2 + sigma**2)

    generator = torch.Generator().manual_seed(0)
    x = centre + 80 * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    sigmas = erk_guid.karras_sigmas(5)[:-1]
    exact = centre + (x - centre) * math.sqrt((std**2 + 0.002**2) / (std**2 + 80**2))
    found = [
        erk_guid.sample(
            gaussian, x, sigmas, solver=make_solver(solver, **options), guidance=guidance
        )
        for guidance in (AUTO, None)
    ]
    error, before = (float((y - exact).norm() / (x - centre).norm()) for y in found)
    return error, before


def test_the_response_inside_a_step_is_that_of_the_mode() -> None:
    std, node = 0.3, 0.4
    mu = std**2 / (std**2 + 0.8**2)
    x = torch.randn(5, 7, dtype=torch.float64)

    def drift(x: torch.Tensor, s: float) -> torch.Tensor:
        return x * s / (std**2 + s**2)

    f = drift(x, 0.8)
    at_node = drift(x + (0.32 - 0.8) * f, 0.32)
    torch.testing.assert_close(response_in_step(f, at_node, node), torch.full([5], mu).double())
    # Nothing to measure: the plain step.
    assert response_in_step(0 * f, 0 * f, node).isfinite().all()
    # Drifts that no mode has: the nearest end, not what the formula's pole would give.
    assert (response_in_step(f, 3 * f, node) == 0).all()
    for wild in (0.01, -1):
        assert response_in_step(f, wild * f, node) == pytest.approx(1)


def an_answer(generator: torch.Generator, dd: torch.Tensor | None = None) -> tuple[Any, ...]:
    """A Heun step with made-up drifts, and a pair with the given answer of the denoiser."""
    x, f, f_low, dx = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator)
    sigma, sigma_next = 0.9, 0.4
    dd = 0.7 * dx if dd is None else dd
    pair = Pair(x, x - dx, f, f - (dx - dd) / sigma, 0.5)
    x_low = x + (sigma_next - sigma) * f
    w = modal_weights([sigma_next, sigma], sigma, sigma_next)[0]
    return heun_result(x, f, x_low, f_low, sigma, sigma_next, pair), dx, dd, w


def heun_result(
    x: torch.Tensor,
    f: torch.Tensor,
    x_low: torch.Tensor,
    f_low: torch.Tensor,
    sigma: float,
    sigma_next: float,
    pair: Pair | None,
) -> StepResult:
    stages = (
        Evaluation(x, sigma, x - sigma * f, f),
        Evaluation(x_low, sigma_next, x_low - sigma_next * f_low, f_low),
    )
    high = x + (sigma_next - sigma) * (f + f_low) / 2
    return StepResult(high, sigma, sigma_next, stages, 2, (0.5, 0.5), pair)


def test_the_answer_is_the_series_of_its_jacobian() -> None:
    # The same solution from a Jacobian written out as a matrix, sample by sample. Catches a sign,
    # a term of the series that is missing, and a transport of the wrong ratio.
    generator = torch.Generator().manual_seed(3)
    wanted = 0.8 * torch.randn(3, 6, dtype=torch.float64, generator=generator)
    answer, dx, dd, w = an_answer(generator, wanted)
    found = AUTO(answer).x
    for n in range(3):
        measured = float(dd[n].norm() / dx[n].norm())
        mu, r = min(measured, 1.0), 0.4 / 0.9
        mu_next = mu / (mu + (1 - mu) * r**2)
        gain = min(mu_next / mu, LARGEST_RESPONSE / measured)
        jacobian = mu_next * torch.eye(6).double() + torch.outer(
            gain * dd[n] - mu_next * dx[n], dx[n]
        ) / dx[n].dot(dx[n])
        first, second = answer.stages
        change = w * 0.4 * (first.drift - second.drift)[n]
        series = torch.eye(6).double() + w * jacobian + w**2 * jacobian @ jacobian
        torch.testing.assert_close(found[n], second.x[n] + series @ change)


def test_an_answer_cannot_run_away() -> None:
    # Whatever the pair says, the solution stays within a fixed multiple of the pair's own change:
    # |J| is at most 2 + 2 LARGEST_RESPONSE / 2. Published guidance has no such bound.
    generator = torch.Generator().manual_seed(4)
    for size in (0.0, 1e-200, 1e-8, 1.0, 1e8, 1e100):
        for answered in (0.0, 1.0, 1e10):
            wanted = torch.randn(3, 6, dtype=torch.float64, generator=generator)
            answer, dx, _, w = an_answer(generator)
            dd = answered * size * wanted
            first, second = answer.stages
            f_low = first.drift - (size * dx - dd) / answer.sigma
            pair = Pair(first.x, first.x - size * dx, first.drift, f_low, 0.5)
            moved = AUTO(replace(answer, pair=pair)).x - second.x
            change = w * 0.4 * (first.drift - second.drift)
            largest = w * (2 + LARGEST_RESPONSE)
            assert moved.isfinite().all(), (size, answered)
            bound = (1 + largest + largest**2) * change.norm(dim=1)
            assert (moved.norm(dim=1) <= bound * (1 + 1e-9)).all(), (size, answered)


def test_what_is_rounding_is_not_taken_for_an_answer() -> None:
    # Where the denoiser does not answer, dD is what is left of a difference of large numbers, and
    # would be magnified by up to (sigma / sigma')^2. Float32 must do as float64 does.
    start = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for levels in (3, 4, 6):
        sigmas = erk_guid.karras_sigmas(levels)[:-1]
        ends = [
            erk_guid.sample(
                lambda x, s: x * 1e-6 / (1e-6 + s**2), (80 * start).to(dtype), sigmas,
                guidance=AUTO,
            )
            for dtype in (torch.float64, torch.float32)
        ]  # fmt: skip
        errors = [float((end - start.to(end) * 5e-6**0.5).norm(dim=1).mean()) for end in ends]
        assert errors[1] < 1.5 * errors[0], (levels, errors)


def test_gradients_pass() -> None:
    for answer in (0.0, 0.3):
        x = (5 * torch.randn(3, 4)).requires_grad_()
        sigmas = torch.tensor([5.0, 2, 1, 0.5, 0.2])
        erk_guid.sample(lambda x, s, a=answer: x * a, x, sigmas, guidance=AUTO).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("solver", ["heun", "dpm2"])
def test_the_order_stays_two(solver: str) -> None:
    x0 = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    errors = []
    for steps in (64, 128):
        sigmas = logsnr_sigmas(steps + 1, END, BEGIN)[:-1]
        found = erk_guid.sample(denoise, x0, sigmas, solver=solver, guidance=AUTO)
        errors.append(float((found - carried(x0, BEGIN, END)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


# The method's text has two tables; 400 and 150 points there, so the comparison is to within
# three standard errors of both, by bootstrap over the points.
TABLE_ONE = {  # steps: w_stiff / w_con of 0.408 / 0, 0.5 / 0.5, 1 / 0.5, 2 / 0.5, to 0
    6: (0.57, 0.67, 3.5, 3.0), 8: (0.52, 0.48, 2.9, 9.4), 12: (0.52, 0.37, 3.4, 14),
    16: (0.70, 0.59, 5.9, 24), 32: (0.79, 0.67, 5.9, 29),
}  # fmt: skip


TABLE_TWO = {  # noise levels: 0.5 / 0.5, the blend; not to 0
    "tree5": {4: (0.80, 0.37), 6: (0.66, 0.26), 8: (0.42, 0.21), 11: (0.56, 0.20),
              16: (0.59, 0.25), 32: (0.72, 0.20)},
    "tree80": {4: (0.79, 0.16), 6: (0.76, 0.31), 8: (0.58, 0.41), 11: (0.48, 0.26),
               16: (0.62, 0.20), 32: (0.50, 0.13)},
    "gauss": {4: (0.98, 0.09), 6: (0.86, 0.21), 8: (0.79, 0.21), 11: (0.79, 0.20),
              16: (0.76, 0.19), 32: (0.65, 0.17)},
}  # fmt: skip


def assert_ratio(better: torch.Tensor, worse: torch.Tensor, expected: float, points: int) -> None:
    """Whether mean(better) / mean(worse) is `expected`, which was measured on `points` points."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(worse), (1000, len(worse)), generator=generator)
    spread = (better[chosen].mean(1) / worse[chosen].mean(1)).std()
    error = float(spread * (1 + len(worse) / points) ** 0.5)
    ratio = float(better.mean() / worse.mean())
    assert abs(ratio - expected) < 3 * error + 0.01, (ratio, expected, error)


@pytest.mark.slow
@pytest.mark.parametrize("steps", list(TABLE_ONE))
def test_the_published_form_on_the_tree(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tree = tree_mixture()
    noise = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    start = tree.sample(400, generator) + 5 * noise
    end = erk_guid.sample(tree, start, erk_guid.karras_sigmas(200, sigma_max=5), solver="modal")

    def errors(guidance: Guidance) -> torch.Tensor:
        sigmas = erk_guid.karras_sigmas(steps, sigma_max=5)
        return (erk_guid.sample(tree, start, sigmas, guidance=guidance) - end).norm(dim=1)

    plain = errors(ERKGuidance())
    settings = ((0.408, 0.0), (0.5, 0.5), (1.0, 0.5), (2.0, 0.5))
    for (w_stiff, w_con), expected in zip(settings, TABLE_ONE[steps], strict=True):
        assert_ratio(errors(ERKGuidance(w_stiff, w_con)), plain, expected, 400)


def blended(denoiser: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun with its two solutions blended by the pair's response, as the method's text has it."""
    companion: Any = None
    for s, t in pairwise(sigmas):
        d = denoiser(x, s)
        f = (x - d) / s
        x_low = x + (t - s) * f
        d_low = denoiser(x_low, t)
        x_high = x + (t - s) * (f + (x_low - d_low) / t) / 2
        weight = torch.ones(len(x), dtype=x.dtype)
        if companion is not None:
            dx, dd = x - companion[0], d - companion[1]
            weight = blend_weight(((dd * dx).sum(1) / (dx * dx).sum(1)).clamp(0, 1), t / s)
        companion = x_low, d_low
        x = x_low + weight[:, None] * (x_high - x_low)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLE_TWO))
def test_the_blend_and_the_published_form_beside_it(name: str) -> None:
    denoiser, start, end = oracle(name)
    for levels, (published, ours) in TABLE_TWO[name].items():
        sigmas = erk_guid.karras_sigmas(levels, sigma_max=5 if name == "tree5" else 80)[:-1]
        plain, guided = (
            (erk_guid.sample(denoiser, start, sigmas, guidance=g) - end).norm(dim=1)
            for g in (None, ERKGuidance(0.5, 0.5))
        )
        assert_ratio(guided, plain, published, 150)
        found = (blended(denoiser, start, sigmas) - end).norm(dim=1)
        assert_ratio(found, plain, ours, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tree5", "tree80", "gauss"])
def test_errors_fall_to_less_than_half_on_the_oracle(name: str) -> None:
    denoiser, start, end = oracle(name)
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


@pytest.mark.slow
def test_errors_fall_on_the_shipped_model() -> None:
    net = erk_guid.load("digits").net
    noise = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(10)[torch.arange(40) % 10]

    def run(levels: int, solver: str, guidance: Guidance | None = None) -> torch.Tensor:
        sigmas = erk_guid.karras_sigmas(levels)[:-1]
        denoiser = lambda x, s: net(x, s, labels)  # noqa: E731
        return erk_guid.sample(denoiser, 80 * noise, sigmas, solver=solver, guidance=guidance)

    exact = run(65, "modal")
    for levels, gain in ((3, 1.0), (4, 0.7), (6, 0.7), (8, 0.7), (12, 0.7)):
        plain, better = (
            float((run(levels, "heun", g) - exact).flatten(1).norm(dim=1).mean())
            for g in (None, AUTO)
        )
        assert better < gain * plain, (levels, better / plain)


def test_it_costs_no_evaluation_and_runs_in_float32() -> None:
    infos: list[erk_guid.StepInfo] = []
    x = 80 * torch.randn(3, 2, 4, 4)
    erk_guid.sample(
        lambda x, s: torch.tanh(x / (1 + s * s)), x, erk_guid.karras_sigmas(6),
        guidance=AUTO, callback=infos.append,
    )  # fmt: skip
    assert infos[-1].nfe == 11
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
    for solver in ("euler", "deis", "ipndm", "ipndm_v", "dpmpp", "unipc", "modal"):
        with pytest.raises(ValueError, match=r"no parameter-free form; .* have one: dpm2, heun"):
            erk_guid.sample(lambda x, s: x, x, sigmas, solver=solver, guidance=AUTO)
    with pytest.raises(ValueError, match="w_stiff must be a number or 'auto', got 'much'"):
        make_guidance("much", w_con=0.5)


@pytest.mark.parametrize("sigma", [2.0, 300.0])
def test_a_pair_that_says_nothing_leaves_the_prior(sigma: float) -> None:
    # Catches: one prior in the step without a pair, another in the pair's formula.
    x, x_low, f, f_low = torch.randn(4, 3, 5, dtype=torch.float64)
    without, empty = (
        AUTO(heun_result(x, f, x_low, f_low, sigma, 0.9 * sigma, pair)).x
        for pair in (None, Pair(x, x, f, f, 0.1 * sigma))
    )
    torch.testing.assert_close(empty, without, rtol=1e-14, atol=0)


def test_a_step_that_is_not_of_two_stages_is_left_alone() -> None:
    # The last step, Euler's to 0; and the paper's form where there is no pair.
    x = torch.randn(3, 4)
    (step,) = make_solver("euler").plan([1.0, 0.0])
    result, _ = step(lambda x, s: x / 2, x)
    for guidance in (AUTO, ERKGuidance(1.0, 0.0)):
        guided = guidance(result)
        assert guided.x is result.x
        assert guided.size is None


def test_on_the_command_line(tmp_path: Path) -> None:
    args = ["--preset", "digits", "--seeds", "0-3", "--steps", "4", "--device", "cpu"]
    for name, more in (("auto", ["--w_stiff", "auto"]), ("plain", [])):
        out = ["--outdir", str(tmp_path / name), "--trace", str(tmp_path / f"{name}.csv")]
        done = CliRunner().invoke(generate_command, [*args, *out, *more])
        assert done.exit_code == 0, done.output
    assert '"w_stiff": "auto"' in (tmp_path / "auto" / "run.json").read_text()
    pixels = []
    for name in ("auto", "plain"):
        with Image.open(tmp_path / name / "000001.png") as image:
            assert f"w_stiff {'auto' if name == 'auto' else '0.0'}" in image.text["parameters"]
            pixels.append(np.asarray(image).astype(int))
    # Not the files: those differ by the line about their settings, whatever the pixels.
    assert np.abs(pixels[0] - pixels[1]).max() > 10
