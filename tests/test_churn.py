"""Noise levels and churn as EDM2's sampler has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import golden
from integrations.test_k_diffusion import published
from torch import Tensor

import erk_guid
from erk_guid.churn import Churn
from erk_guid.cli.generate import generate_command
from erk_guid.generation.trace import read_trace
from erk_guid.integrations import k_diffusion as ours
from erk_guid.schedules import edm_sigmas
from erk_guid.solvers import SOLVERS, make_solver


def mixture(mu: Tensor, std: Tensor) -> Callable[..., Tensor]:
    """The exact denoiser of Gaussians of equal weights, for x [N, d, 1, 1]."""

    def denoise(x: Tensor, sigma: Tensor, labels: None = None) -> Tensor:
        flat = x.flatten(1)
        variance = std**2 + sigma**2
        apart = flat[:, None] - mu
        logits = -apart.square().sum(-1) / (2 * variance) - mu.shape[1] / 2 * variance.log()
        means = mu + (std**2 / variance)[:, None] * apart
        return (logits.softmax(-1)[..., None] * means).sum(1).reshape(x.shape)

    return denoise


class Draws:
    """randn_like that returns what the published program drew, in order."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = list(draws)

    def __call__(self, x: Tensor) -> Tensor:
        return self.draws.pop(0).to(x)


def test_churn_is_edm2s() -> None:
    # Catches: gamma by other limits, the last Euler step from sigma instead of sigma_hat, noise
    # drawn where none is added, and noise times the wrong deviation.
    data = golden("edm2_churn")
    denoise = mixture(data["mu"], data["std"])
    for i, case in enumerate(data["cases"]):
        draws = Draws(data[f"draws{i}"])
        found = erk_guid.edm_sampler(
            denoise, data["noise"], dtype=torch.float64, randn_like=draws, **case
        )
        torch.testing.assert_close(found, data[f"case{i}"], rtol=1e-10, atol=1e-10)
        assert draws.draws == []


@pytest.mark.parametrize("num_steps", range(2, 65))
def test_levels_are_edm2s_in_float32(num_steps: int) -> None:
    # Catches: levels computed in float64 and rounded, which are off by 2.3e-7 and more. The golden
    # ones come from a processor with AVX-512; others round a few powers to the neighbouring number.
    data = golden("edm2_churn")
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor, labels: None) -> Tensor:
        seen.append(sigma)
        return x / 2

    erk_guid.edm_sampler(denoise, torch.ones(1, 1), num_steps=num_steps, solver="euler")
    levels = data[f"levels_f32_{num_steps}"]
    torch.testing.assert_close(torch.stack(seen), levels, rtol=1.2e-7, atol=0)
    assert seen[0].dtype == torch.float32


def test_levels_of_one_step_and_of_too_many() -> None:
    assert edm_sigmas(1).tolist() == [80, 0]
    for odd in ({"rho": 1, "sigma_min": 1e-6, "num_steps": 4}, {"rho": 0.05, "num_steps": 4}):
        with pytest.raises(ValueError, match="cannot be told apart in float32"):
            edm_sigmas(**odd)
    with pytest.raises(ValueError, match="cannot be told apart in float16; take fewer"):
        edm_sigmas(5000, dtype=torch.float16)
    wide = edm_sigmas(64, dtype=torch.float64)
    torch.testing.assert_close(wide, erk_guid.karras_sigmas(64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["sample_heun", "sample_dpm_2"])
@pytest.mark.parametrize("churn", [
    {"s_churn": 20}, {"s_churn": 3, "s_noise": 1.01},
    {"s_churn": 100, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
])  # fmt: skip
@pytest.mark.parametrize("ends_at_0", [True, False])
def test_churn_of_k_diffusions_functions(
    name: str, churn: dict[str, float], ends_at_0: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = golden("edm2_churn")
    denoise = mixture(data["mu"], data["std"])
    levels = erk_guid.karras_sigmas(9)[: None if ends_at_0 else -1]
    x = 80 * data["noise"]

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1]
        return denoise(x, sigma[0])

    def run(function: Callable[..., Tensor], draw: Any, **more: Any) -> tuple[Tensor, list[Any]]:
        told: list[Any] = []
        monkeypatch.setattr(torch, "randn_like", draw)
        found = function(model, x, levels, callback=told.append, disable=True, **churn, **more)
        return found, told

    # It draws at every step; where nothing is added, ours does not. The step's number decides.
    noise = torch.randn(len(levels), *x.shape, dtype=x.dtype)
    inside = [
        i for i, level in enumerate(levels[:-1])
        if churn.get("s_tmin", 0) <= level <= churn.get("s_tmax", float("inf"))
    ]  # fmt: skip
    theirs, told = run(getattr(published(monkeypatch), name), Draws(noise))
    draws = Draws(noise[inside])
    found, said = run(getattr(ours, name.replace("sample_", "sample_erk_")), draws, w_stiff=0)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-9)
    assert draws.draws == []
    for a, b in zip(said, told, strict=True):
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(
                torch.as_tensor(a[key]), torch.as_tensor(b[key]), rtol=1e-6, atol=1e-9
            )
    with pytest.raises(ValueError, match="S_churn must be 0 with ERK guidance"):
        run(getattr(ours, name.replace("sample_", "sample_erk_")), draws)


def test_what_churn_goes_with() -> None:
    x, sigmas = torch.randn(2, 3), erk_guid.karras_sigmas(5)
    churn = Churn(S_churn=10)
    for name in SOLVERS:

        def run(name: str = name) -> Tensor:
            return erk_guid.sample(lambda x, s: x / 2, x, sigmas, solver=name, churn=churn)

        if name in ("euler", "heun", "dpm2"):
            assert not torch.equal(run(), run())
        else:
            with pytest.raises(ValueError, match=r"churn goes with: dpm2, euler, heun"):
                run()
    noise = torch.Generator().manual_seed(0)
    seeded = Churn(10, randn_like=lambda x: torch.randn(x.shape, generator=noise))
    one = erk_guid.sample(lambda x, s: x / 2, x, sigmas, solver="heun", churn=seeded)
    noise.manual_seed(0)
    named = erk_guid.sample(lambda x, s: x / 2, x, sigmas, solver=make_solver("heun"), churn=seeded)
    assert torch.equal(one, named)
    for bad in (lambda x: torch.ones(1), lambda x: None):  # one number would be broadcast
        with pytest.raises(ValueError, match="noise"):
            erk_guid.sample(
                lambda x, s: x / 2, x, sigmas, solver="heun", churn=Churn(10, randn_like=bad)
            )
    double = Churn(10, randn_like=lambda x: torch.randn(x.shape, dtype=torch.float64))
    found = erk_guid.sample(lambda x, s: x / 2, x, sigmas, solver="heun", churn=double)
    assert found.dtype == x.dtype
    off = Churn(0, randn_like=lambda x: pytest.fail("asked for noise"))
    erk_guid.sample(lambda x, s: x / 2, x, sigmas, solver="modal", churn=off)


def test_the_range_includes_its_ends() -> None:
    # EDM's rule: S_min <= sigma <= S_max.
    churn = Churn(10, S_min=1.0, S_max=5.0)
    found = [churn.gamma(sigma, 100) for sigma in (0.999, 1.0, 3.0, 5.0, 5.001)]
    assert found == [None, 0.1, 0.1, 0.1, None]
    # Compared as torch compares a float32 level with a number.
    level = torch.tensor(0.1)
    assert level <= 0.1
    assert level.item() > 0.1
    assert Churn(10, S_max=0.1).gamma(level.item(), 100, torch.float32) == 0.1
    assert Churn(10, S_max=0.1).gamma(level.item(), 100) is None


def test_churn_is_not_for_flows() -> None:
    # A flow's x is not clean + sigma noise: with noise added so, the variance grows eightfold.
    times = torch.linspace(0.9, 0.1, 5)
    model, x = (lambda x, t: x / 2), torch.randn(2, 3)
    for function in (ours.sample_erk_heun, ours.sample_erk_dpm_2):
        with pytest.raises(ValueError, match="S_churn must be 0 with flow=True"):
            function(model, x, times, s_churn=1, flow=True, w_stiff=0, disable=True)
        # Numbers may come as tensors, as noise levels do; without churn they are not looked at.
        function(model, x, times, s_tmax=torch.tensor(3.0), w_stiff=0, disable=True)
        function(model, x, times, s_churn=torch.tensor(1.0), s_tmax=torch.tensor(3.0), w_stiff=0,
                 disable=True)  # fmt: skip
    assert Churn(np.float32(3)).active


def test_the_trace_takes_the_step_from_where_it_began(tmp_path: Path) -> None:
    # Catches: h from sigma, where churn has moved the step's beginning to sigma_hat.
    trace = tmp_path / "t.csv"
    done = CliRunner().invoke(generate_command, [
        "--preset=digits", "--seeds=0", "--steps=4", "--device=cpu", "--S_churn=30",
        f"--outdir={tmp_path / 'o'}", f"--trace={trace}",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read_trace(trace)
    stiff, scaled, sigma, after = (
        rows[name] for name in ("stiffness", "h_stiffness", "sigma", "sigma_next")
    )
    known = np.isfinite(stiff) & (stiff > 0)
    assert known.any()
    gamma = np.sqrt(2) - 1
    expected = (sigma * (1 + gamma) - after) * stiff
    np.testing.assert_allclose(scaled[known], expected[known], rtol=1e-3)


@pytest.mark.parametrize(("name", "value"), [
    ("S_churn", -1), ("S_churn", float("nan")), ("S_churn", float("inf")), ("S_min", -0.1),
    ("S_noise", float("inf")), ("S_max", float("nan")), ("S_noise", "1"), ("S_churn", True),
])  # fmt: skip
def test_churn_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        Churn(**{name: value})


def test_an_images_noise_does_not_depend_on_its_batch() -> None:
    net = erk_guid.load("digits").net

    def latents(batch_size: int) -> Tensor:
        batches = erk_guid.generate(
            net, range(5), batch_size=batch_size, num_steps=4, S_churn=30, S_noise=1.01
        )
        return torch.cat([batch.latents for batch in batches])

    together, plain = (
        latents(5),
        torch.cat([batch.latents for batch in erk_guid.generate(net, range(5), num_steps=4)]),
    )
    # Convolutions round differently in other batches; other noise would differ by 1.
    torch.testing.assert_close(together, latents(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(together, latents(2), rtol=0, atol=1e-3)
    assert (together - plain).abs().max() > 0.1


def test_churn_on_the_command_line(tmp_path: Path) -> None:
    args = ["--preset=digits", "--seeds=0-2", "--steps=4", "--device=cpu", "--S_churn=30"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(generate_command, [*args, *more])

    done = run(f"--outdir={tmp_path / 'a'}", "--S_noise=1.01", "--s_max=50", "--batch=1")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in ("S_churn", "S_min", "S_max", "S_noise")} == {
        "S_churn": 30, "S_min": 0, "S_max": 50, "S_noise": 1.01,
    }  # fmt: skip
    again = run(f"--outdir={tmp_path / 'a'}", "--resume")
    assert again.exit_code == 1
    assert "S_noise was 1.01, now 1.0" in again.output
    net = erk_guid.load("digits").net
    batches = erk_guid.generate(
        net, range(3), batch_size=1, num_steps=4, S_churn=30, S_noise=1.01, S_max=50
    )
    from PIL import Image

    for seed, batch in enumerate(batches):
        with Image.open(tmp_path / "a" / f"{seed:06d}.png") as image:
            assert np.array_equal(np.asarray(image), batch.images[0, 0].numpy())
            assert "S_churn 30, S_min 0, S_max 50, S_noise 1.01" in image.info["parameters"]
