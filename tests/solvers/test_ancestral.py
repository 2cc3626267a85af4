"""Noise in the steps (eta): other people's samplers, exact variances, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import oracle
from integrations.test_k_diffusion import published
from torch import Tensor

import erk_guid
from erk_guid.mixtures import GaussianMixture
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import Euler, Modal, NoisyStep, Solver, make_solver
from erk_guid.solvers.ancestral import Descent
from erk_guid.solvers.dpmpp import DPMpp

NOISY = {"euler": Euler, "dpmpp": DPMpp, "modal": Modal}


class Stored:
    """Noise by the number of the draw; serves k-diffusion's `noise_sampler`, too."""

    def __init__(self, shape: torch.Size, count: int = 40, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        self.drawn = 0

    def __call__(self, *_: Any) -> Tensor:
        self.drawn += 1
        return self.noise[self.drawn - 1]


@pytest.mark.parametrize("ends_at_0", [True, False])
@pytest.mark.parametrize(
    ("name", "solver", "options"),
    [
        ("sample_euler_ancestral", Euler(0.5), {"eta": 0.5}),
        ("sample_euler_ancestral", Euler(1.0), {"eta": 1.0}),
        ("sample_dpmpp_2m_sde", DPMpp(2, lower_order_final=False, eta=1.0), {"eta": 1.0}),
    ],
)
def test_k_diffusions_own_samplers(
    name: str,
    solver: Solver,
    options: dict[str, Any],
    ends_at_0: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At eta 1 its SDE form and ours are the same equation. With the weights of the step to
    # sigma_down (twice the extrapolation) the second one is off by 0.1.
    denoise, x, _ = oracle("tree80")
    sigmas = erk_guid.karras_sigmas(9)[: None if ends_at_0 else -1]
    model: Callable[..., Tensor] = lambda x, sigma: denoise(x, sigma[0])  # noqa: E731
    theirs = getattr(published(monkeypatch), name)
    expected = theirs(model, x, sigmas, disable=True, noise_sampler=Stored(x.shape), **options)
    draws = Stored(x.shape)
    found = erk_guid.sample(denoise, x, sigmas, solver=solver, randn_like=draws)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert draws.drawn == 8


def test_diffusers_own_sde() -> None:
    from diffusers import DPMSolverMultistepScheduler

    denoise, x, _ = oracle("tree5")
    sigmas = make_sigmas("polynomial", 9, 0.002, 5.0, 7)[:-1]
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, lower_order_final=False,
        final_sigmas_type="sigma_min", prediction_type="sample",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    scheduler.sigmas = sigmas
    noise = Stored(x.shape)
    y = x / (1 + sigmas[0] ** 2).sqrt()
    for sigma, time in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        output = denoise(y * (1 + sigma**2).sqrt(), sigma)
        y = scheduler.step(output, time, y, variance_noise=noise()).prev_sample
    expected = y * (1 + sigmas[-1] ** 2).sqrt()
    found = erk_guid.sample(
        denoise, x, sigmas, solver=DPMpp(2, lower_order_final=False, eta=1.0),
        randn_like=Stored(x.shape),
    )  # fmt: skip
    # Its noise levels and x are float32.
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", NOISY)
def test_no_noise_is_the_ode_bit_for_bit(name: str) -> None:
    denoise, x, _ = oracle("tree80")
    sigmas = erk_guid.karras_sigmas(9)

    def never(x: Tensor) -> Tensor:
        raise AssertionError("noise was drawn")

    plain = erk_guid.sample(denoise, x, sigmas, solver=name, randn_like=never)
    none = erk_guid.sample(denoise, x, sigmas, solver=make_solver(name, eta=0.0), randn_like=never)
    assert torch.equal(plain, none)
    # From the other side: as eta goes to 0, so does the difference.
    little = erk_guid.sample(
        denoise, x, sigmas, solver=make_solver(name, eta=1e-7), randn_like=Stored(x.shape)
    )
    torch.testing.assert_close(little, plain, rtol=1e-4, atol=1e-5)


def spread_of(solver: Solver, size: float, steps: int) -> float:
    """Return the standard deviation that a solver gives data of standard deviation `size`."""
    return spread_over(solver, size, make_sigmas("logsnr", steps + 1, 0.05, 20.0, 7)[:-1])


def spread_over(solver: Solver, size: float, sigmas: Tensor) -> float:
    """Return the same over noise levels of one's own.

    The run is linear, so it is computed from what each of the independent draws comes to: one
    column for the start, and one for the noise of each step. There is nothing random in it.
    """
    columns = torch.eye(len(sigmas) + 1, dtype=torch.float64)
    drawn = iter(columns[1:, None])
    start = columns[:1] * math.hypot(size, float(sigmas[0]))
    end = erk_guid.sample(
        lambda x, s: x * size**2 / (size**2 + s**2), start, sigmas,
        solver=solver, randn_like=lambda x: next(drawn),
    )  # fmt: skip
    return float(end.norm())


@pytest.mark.parametrize("eta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("make", "order"),
    [(Euler, 1), (lambda eta: DPMpp(2, eta=eta), 2), (lambda eta: Modal(3, eta=eta), 2)],
    ids=["euler", "dpmpp 2", "modal 3"],
)
def test_variances_of_gaussians_converge(
    make: Callable[..., Solver], order: int, eta: float
) -> None:
    # With the deterministic weights of the step to sigma_down the order is 1 for any eta above 0.
    for size in (0.2, 1.0):
        true = math.sqrt(size**2 + 0.05**2)
        errors = [abs(spread_of(make(eta=eta), size, n) - true) for n in (40, 80, 160)]
        assert errors[-1] < max(errors[0] / (0.8 * 2**order) ** 2, 1e-5), errors
        assert errors[-1] < (0.02 if order == 1 else 1e-3)


@pytest.mark.parametrize("name", NOISY)
def test_a_single_point_is_reached_with_the_right_noise(name: str) -> None:
    # D is exact and constant: x must be that point plus noise of the last level, whatever eta.
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.4, 0.1], dtype=torch.float64)
    x = 2 + 10 * torch.randn(1, 200_000, dtype=torch.float64)
    for eta in (0.5, 1.0):
        end = erk_guid.sample(
            lambda x, s: torch.full_like(x, 2.0), x, sigmas, solver=make_solver(name, eta=eta)
        )
        assert float(end.mean()) == pytest.approx(2, abs=2e-3)
        assert float(end.std()) == pytest.approx(0.1, rel=0.01)


def energy(a: Tensor, b: Tensor) -> float:
    """Return the (unbiased) energy distance between two sets of points, times 1000."""
    within = torch.pdist(a).mean() + torch.pdist(b).mean()
    return 1000 * float(2 * torch.cdist(a, b).mean() - within)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_modal_is_near_to_the_distribution(eta: float) -> None:
    # A part of benchmarks/stochastic.py. With the weights of the step to sigma_down modal is at
    # 100 for eta 1, and DPM-Solver++ 2M SDE at 6.7.
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    deviations = torch.logspace(-0.3, -1.7, 4, dtype=torch.float64)
    mixture = GaussianMixture(torch.ones(5), means, deviations.square().diag().expand(5, 4, 4))
    clean, start = mixture.sample(2000, generator), mixture.sample(2000, generator)
    x = start + 80 * torch.randn(start.shape, dtype=torch.float64, generator=generator)
    sigmas = erk_guid.karras_sigmas(13)[:-1]

    def distance(solver: Solver) -> float:
        noise = Stored(x.shape, 12)
        return energy(erk_guid.sample(mixture, x, sigmas, solver=solver, randn_like=noise), clean)

    found = distance(Modal(eta=eta))
    assert found < 12
    if eta == 0.5:
        assert found < 0.6 * distance(DPMpp(2, eta=eta))
    assert found < 0.3 * distance(Euler(eta))


@pytest.mark.parametrize("name", NOISY)
def test_other_processes_add_the_same_noise(name: str) -> None:
    # Divided by 1 - t, a flow is our own problem, noise included.
    denoise, x, _ = oracle("tree5")
    times = torch.tensor([0.8, 0.6, 0.3, 0.1, 0.02], dtype=torch.float64)
    solver = make_solver(name, eta=0.7)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x / (1 - t), t / (1 - t))

    found = erk_guid.sample(
        flow, x * (1 - times[0]), times, solver=solver, process=erk_guid.RectifiedFlow(),
        randn_like=Stored(x.shape),
    )  # fmt: skip
    expected = erk_guid.sample(
        denoise, x, times / (1 - times), solver=solver, randn_like=Stored(x.shape)
    )
    torch.testing.assert_close(found, expected * (1 - times[-1]), rtol=1e-9, atol=1e-9)


def test_from_pure_noise_a_flow_keeps_its_variance() -> None:
    size = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64).repeat_interleave(50_000)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1 - t) * size**2 / ((1 - t) ** 2 * size**2 + t**2) * x

    times = torch.linspace(1, 0.01, 40, dtype=torch.float64)
    x = torch.randn(1, len(size), dtype=torch.float64)
    for eta in (0.5, 1.0):
        end = erk_guid.sample(
            model, x, times, solver=Modal(eta=eta), process=erk_guid.RectifiedFlow()
        )
        found = end.reshape(3, -1).std(dim=1)
        exact = (((1 - times[-1]) * torch.tensor([1.0, 0.3, 0.1])) ** 2 + times[-1] ** 2).sqrt()
        assert (found / exact - 1).abs().max() < 0.03


def test_what_is_refused() -> None:
    denoise, x, _ = oracle("tree5")
    sigmas = torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64)
    for kind in NOISY.values():
        for eta in (-0.1, 1.1, math.nan, True, "1"):
            with pytest.raises(ValueError, match="eta must be a number from 0"):
                kind(eta=eta)  # type: ignore[arg-type]
        (step, _) = kind(eta=0.5).plan(sigmas)
        assert isinstance(step, NoisyStep)
        with pytest.raises(ValueError, match="this step adds noise"):
            step(denoise, x)
        with pytest.raises(ValueError, match=r"noise must be shaped like x \[200, 2\], got \[2\]"):
            step(denoise, x, None, torch.zeros(2))
        with pytest.raises(ValueError, match=r"has no (embedded )?pair"):
            erk_guid.sample(
                denoise, x, sigmas, solver=kind(eta=0.5), guidance=erk_guid.ERKGuidance(0.5)
            )
    with pytest.raises(ValueError, match=r"eta is 0\.5, but predict_x0 is False"):
        DPMpp(2, predict_x0=False, eta=0.5)
    with pytest.raises(ValueError, match=r"'heun' has no option 'eta'; .* euler, dpmpp, modal"):
        make_solver("heun", eta=0.5)
    with pytest.raises(ValueError, match="a solver that adds noise"):
        erk_guid.fit(denoise, x, evaluations=6, solver=Modal(eta=0.5))


def test_the_descent() -> None:
    # k-diffusion's get_ancestral_step(3, 1, 0.5): sigma_up = 0.5 sqrt(1 (9 - 1) / 9).
    descent = Descent.of(3.0, 1.0, 0.5)
    assert descent.spread == pytest.approx(0.5 * math.sqrt(8 / 9))
    assert descent.down**2 + descent.spread**2 == pytest.approx(1)
    assert Descent.of(3.0, 1.0, 0.0).weights_to((0.3, 0.1)) == (0.3, 0.1)
    assert sum(descent.weights_to((0.5, 1 / 6))) == pytest.approx(1 - descent.down / 3)


@pytest.mark.parametrize("eta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("steps", [20, 50])
def test_variances_where_the_last_step_is_long(steps: int, eta: float) -> None:
    # On Stable Diffusion's levels the last step above 0 divides sigma by 5 to 8, those before
    # by about 1.5 at most. Catches: past values, with their noise, extrapolated by order 4 (1.3
    # at eta 1).
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[torch.linspace(999, 0, steps).round().long()]
    sigmas = torch.cat([((1 - kept) / kept).sqrt(), torch.zeros(1, dtype=torch.float64)])
    for size in (0.3, 0.5, 1.0):
        assert spread_over(Modal(eta=eta), size, sigmas) / size == pytest.approx(1, abs=0.065)


def test_at_eta_1_order_4_is_order_3() -> None:
    levels = [10.0, 4.0, 1.5, 0.6, 0.2, 0.05]
    steps = zip(Modal(4, eta=1.0).steps(levels), Modal(3, eta=1.0).steps(levels), strict=True)
    for four, three in steps:
        assert four.predictor[:3] == pytest.approx(three.predictor)
        assert four.predictor[3:] in ((), (0.0,))
