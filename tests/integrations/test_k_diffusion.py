"""k-diffusion's signature, against that package's own samplers."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import oracle

import erk_guid
from erk_guid.guidance import make_guidance
from erk_guid.integrations.k_diffusion import sample_erk_dpm_2, sample_erk_heun, sample_modal

FUNCTIONS = {"heun": sample_erk_heun, "dpm2": sample_erk_dpm_2}


class Wrapped:
    """A model in k-diffusion's manner; checks how it is called, and counts."""

    def __init__(self) -> None:
        self.denoiser, self.start, _ = oracle("tree80")
        self.calls = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        assert sigma.shape == x.shape[:1]
        assert sigma.dtype == x.dtype
        assert extra == {"cond": 3}
        self.calls += 1
        return self.denoiser(x, sigma[0])


def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """k_diffusion.sampling itself, without the packages that its other modules want."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("k-diffusion is missing: pip install --no-deps k-diffusion (make test does)")
    folder = Path(spec.submodule_search_locations[0])
    for name in ("torchdiffeq", "torchsde"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(odeint=None))
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    return importlib.import_module("k_diffusion.sampling")


@pytest.mark.parametrize("name", ["heun", "dpm2"])
@pytest.mark.parametrize("end", [None, -1])
def test_without_guidance_they_are_the_packages_own(
    name: str, end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = getattr(published(monkeypatch), {"heun": "sample_heun", "dpm2": "sample_dpm_2"}[name])
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(7)[:end]
    heard: dict[str, list[Any]] = {"ours": [], "theirs": []}
    options = {"extra_args": {"cond": 3}, "disable": True}
    ours = FUNCTIONS[name](
        model, model.start, sigmas, w_stiff=0, callback=heard["ours"].append, **options
    )
    calls = model.calls
    expected = theirs(model, model.start, sigmas, callback=heard["theirs"].append, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert model.calls == 2 * calls
    assert len(heard["ours"]) == len(heard["theirs"])
    for a, b in zip(heard["ours"], heard["theirs"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["heun", "dpm2"])
def test_by_an_independent_loop(name: str) -> None:
    # Written from the formulas: an error that we and the package shared would show here.
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(6)
    x = model.start
    for s, t in pairwise(sigmas):
        d = (x - model.denoiser(x, s)) / s
        if t == 0:
            x = x + d * (t - s)
            continue
        middle = t if name == "heun" else (s * t).sqrt()
        y = x + d * (middle - s)
        other = (y - model.denoiser(y, middle)) / middle
        x = x + (t - s) * ((d + other) / 2 if name == "heun" else other)
    options = {"extra_args": {"cond": 3}, "disable": True}
    found = FUNCTIONS[name](model, model.start, sigmas, w_stiff=0, **options)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["heun", "dpm2"])
@pytest.mark.parametrize("settings", [{"w_stiff": "auto"}, {"w_stiff": 0.5, "w_con": 0.2}, {}])
def test_guided_they_are_our_sampler(name: str, settings: dict[str, Any]) -> None:
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(6)
    options = {"extra_args": {"cond": 3}, "disable": True}
    found = FUNCTIONS[name](model, model.start, sigmas, **options, **settings)
    assert model.calls == 11
    guidance = make_guidance(**{"w_stiff": "auto", **settings})
    expected = erk_guid.sample(model.denoiser, model.start, sigmas, solver=name, guidance=guidance)
    assert torch.equal(found, expected)


def test_schedules_may_be_split() -> None:
    # As ComfyUI's SplitSigmas does: the modal solver and the pair begin anew at the seam.
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(9)
    options = {"extra_args": {"cond": 3}, "disable": True}
    for function in (sample_erk_heun, sample_erk_dpm_2, sample_modal):
        half = function(model, model.start, sigmas[:5], **options)
        end = function(model, half, sigmas[4:], **options)
        assert (end - function(model, model.start, sigmas, **options)).norm(dim=1).median() < 0.1
        assert torch.equal(function(model, model.start, sigmas[:1], **options), model.start)


TREE = oracle("tree5")[0]


def flow_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The 2-D tree, for x = (1 - t) clean + t noise."""
    time = t[0].double()
    rest = (1 - time).clamp_min(1e-9)
    return TREE(x.double() / rest, time / rest).to(x.dtype)


TIMES = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.02], dtype=torch.float64)


def flow_noise(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("name", ["heun", "modal"])
def test_flow_models_are_seen_as_data_plus_noise(name: str) -> None:
    # Divided by 1 - t it is our own problem; the start, where sigma is infinite, is left out.
    times, x = TIMES[1:], flow_noise()
    heard: list[dict[str, Any]] = []
    function = {"heun": sample_erk_heun, "modal": sample_modal}[name]
    found = function(flow_model, x, times, flow=True, disable=True, callback=heard.append)
    guidance = erk_guid.ParameterFreeGuidance() if name == "heun" else None
    expected = erk_guid.sample(
        TREE, x / (1 - times[0]), times / (1 - times), solver=name, guidance=guidance
    )
    torch.testing.assert_close(found, expected * (1 - times[-1]), rtol=1e-9, atol=1e-9)
    # The callback is told of x and times as the caller knows them.
    assert [float(note["sigma"]) for note in heard] == times[:-1].tolist()
    torch.testing.assert_close(heard[0]["x"], x)
    torch.testing.assert_close(heard[2]["denoised"], flow_model(heard[2]["x"], times[2:3]),
                               rtol=0.05, atol=0.05)  # fmt: skip


@pytest.mark.slow
def test_from_pure_noise_and_in_half_precision() -> None:
    fine = sample_erk_heun(
        flow_model, flow_noise(), torch.linspace(1, 0.02, 800).double(), w_stiff=0, disable=True
    )

    def error(found: torch.Tensor) -> float:
        return float((found.double() - fine).norm(dim=1).mean())

    plain = error(sample_erk_heun(flow_model, flow_noise(), TIMES, w_stiff=0, disable=True))
    for function in (sample_erk_heun, sample_modal):
        for dtype, factor in ((torch.float64, 0.8), (torch.float32, 0.8), (torch.float16, 1.0)):
            found = function(flow_model, flow_noise(dtype), TIMES, flow=True, disable=True)
            assert found.dtype == dtype
            assert error(found) < factor * plain


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_gaussians_of_many_sizes_from_pure_noise(shift: float) -> None:
    # At t = 1 sigma is infinite, and weights fitted to modes of all sizes would be those of modes
    # that no data has: ten times as far as plain Heun at 16 steps.
    size = torch.tensor([8, 5, 3, 2, 1, 0.5, 0.2, 0.1, 0.05], dtype=torch.float64)
    noise = torch.randn(
        100, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (1 - t[0]) * size**2 / ((1 - t[0]) ** 2 * size**2 + t[0] ** 2) * x

    def error(function: Any, steps: int, **options: Any) -> float:
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        times = torch.cat([shift * even / (1 + (shift - 1) * even), even.new_zeros(1)])
        found = function(model, noise, times, disable=True, **options)
        return float((found - size * noise).norm(dim=1).mean())

    for steps in (4, 6, 10, 16, 28):
        plain = error(sample_erk_heun, steps, w_stiff=0)
        assert error(sample_erk_heun, steps, flow=True) < plain, steps
        assert error(sample_modal, 2 * steps - 1, flow=True) < plain, steps


@pytest.mark.parametrize("settings", [{"w_stiff": 0}, {"w_stiff": 0.5, "w_con": 0.1}])
def test_the_published_form_needs_not_know(settings: dict[str, Any]) -> None:
    for function in FUNCTIONS.values():
        told, not_told = (
            function(flow_model, flow_noise(), TIMES, flow=flow, disable=True, **settings)
            for flow in (True, False)
        )
        assert torch.equal(told, not_told)


def test_noise_in_the_modal_sampler() -> None:
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(7)
    stored = torch.randn(6, *model.start.shape, dtype=torch.float64)
    asked: list[tuple[float, float]] = []

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return stored[len(asked) - 1]

    options = {"extra_args": {"cond": 3}, "disable": True}
    found = sample_modal(
        model, model.start, sigmas, eta=0.6, s_noise=0.9, noise_sampler=noise_sampler, **options
    )
    # As k-diffusion's samplers ask: each interval once, the last one, to 0, not at all.
    assert asked == list(pairwise(sigmas.tolist()))[:-1]
    rows = iter(0.9 * stored)
    expected = erk_guid.sample(
        model.denoiser, model.start, sigmas, solver=erk_guid.solvers.Modal(eta=0.6),
        randn_like=lambda x: next(rows),
    )  # fmt: skip
    assert torch.equal(found, expected)
    answers = (0.1, 0.7, 0.3, 0.6, 0.2)
    found = sample_modal(model, model.start, sigmas, order=2, response=answers, **options)
    expected = erk_guid.sample(
        model.denoiser, model.start, sigmas, solver=erk_guid.solvers.Modal(2, answers)
    )
    assert torch.equal(found, expected)
    torch.manual_seed(4)
    global_noise = sample_modal(model, model.start, sigmas, eta=0.6, **options)
    torch.manual_seed(4)
    assert torch.equal(global_noise, sample_modal(model, model.start, sigmas, eta=0.6, **options))
    for bad in ({"eta": 2.0}, {"eta": 0.5, "s_noise": -1.0}, {"eta": 0.5, "s_noise": math.nan}):
        with pytest.raises(ValueError, match=next(reversed(bad))):
            sample_modal(model, model.start, sigmas, **options, **bad)


def test_what_does_not_go_is_refused() -> None:
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(4)
    for function in FUNCTIONS.values():
        with pytest.raises(ValueError, match=r"S_churn must be 0 with ERK guidance, got 0\.5"):
            function(model, model.start, sigmas, s_churn=0.5, disable=True)
        with pytest.raises(TypeError, match="w_stif"):
            function(model, model.start, sigmas, w_stif=0.5)
    mixed = torch.tensor([10.0, 3.0, 5.0, 1.0])
    with pytest.raises(ValueError, match="must fall strictly"):
        sample_erk_heun(model, model.start, mixed, extra_args={"cond": 3}, disable=True)


UPWARDS = torch.tensor([0.05, 0.2, 0.9, 3.0, 12.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["heun", "dpm2"])
def test_plain_one_step_methods_go_upwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # From data to noise, as FlipSigmas asks for: refused before. k-diffusion's own functions are
    # the judge; a step with the wrong sign, or the wrong interval, differs.
    theirs = getattr(published(monkeypatch), {"heun": "sample_heun", "dpm2": "sample_dpm_2"}[name])
    model, heard = Wrapped(), []
    x = model.start / 100
    expected = theirs(model, x, UPWARDS, extra_args={"cond": 3}, disable=True)
    found = FUNCTIONS[name](
        model, x, UPWARDS, extra_args={"cond": 3}, disable=True, w_stiff=0, callback=heard.append
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # The callback hears of each step, with its level.
    assert [(note["i"], float(note["sigma"])) for note in heard] == [
        (i, sigma) for i, sigma in enumerate(UPWARDS[:-1].tolist())
    ]


def test_what_only_goes_down_names_flip_sigmas() -> None:
    # A user of ComfyUI sees this message: it names the node that made the list, and the remedy.
    model = Wrapped()
    options: dict[str, Any] = {"extra_args": {"cond": 3}, "disable": True}
    for function, settings, what in (
        (sample_erk_heun, {}, "ERK guidance"),
        (sample_erk_heun, {"w_stiff": 0.5}, "ERK guidance"),
        (sample_erk_heun, {"w_stiff": 0, "s_churn": 3.0}, "added noise"),
        (sample_modal, {}, "'modal'"),
    ):
        with pytest.raises(ValueError, match=rf"rise from 0\.05 to 12, .*FlipSigmas.* {what} only"):
            function(model, model.start, UPWARDS, **options, **settings)
    with pytest.raises(ValueError, match="rise strictly"):
        sample_erk_heun(model, model.start, UPWARDS[[0, 3, 2, 4]], w_stiff=0, **options)
    assert model.calls == 0


def test_repeated_levels_are_left_out() -> None:
    # Some schedules of ComfyUI repeat levels at many steps: refused before. A step of length 0
    # changes nothing, so the result is that of the levels without repeats, eta's noise included.
    model, sigmas = Wrapped(), erk_guid.karras_sigmas(6)
    twice = sigmas.repeat_interleave(2)
    for function, settings in (
        (sample_erk_heun, {}), (sample_erk_dpm_2, {"w_stiff": 0.5}), (sample_modal, {}),
        (sample_modal, {"eta": 0.5, "noise_sampler": lambda s, t: (s - t) * torch.ones_like(
            model.start)}),
    ):  # fmt: skip
        options: dict[str, Any] = {"extra_args": {"cond": 3}, "disable": True, **settings}
        found = function(model, model.start, twice, **options)
        assert torch.equal(found, function(model, model.start, sigmas, **options))
    assert torch.equal(
        sample_erk_heun(model, model.start, sigmas[:1].repeat(3), disable=True), model.start
    )


def test_no_gradients_and_half_precision() -> None:
    net = torch.nn.Linear(4, 4)
    sigmas = torch.tensor([10.0, 3, 1, 0.3, 0])
    x = sample_erk_heun(lambda x, sigma: net(x), 10 * torch.randn(2, 4), sigmas, disable=True)
    assert not x.requires_grad
    for dtype in (torch.float16, torch.bfloat16):
        small = sample_erk_heun(
            lambda x, sigma: x / (1 + sigma[:, None] ** 2), torch.ones(2, 4, dtype=dtype), sigmas,
            disable=True,
        )  # fmt: skip
        assert small.dtype == dtype
        assert small.isfinite().all()


@pytest.mark.parametrize("sampler", [sample_erk_heun, sample_erk_dpm_2, sample_modal])
def test_levels_that_are_none(sampler: Any) -> None:
    # Catches: noise given back as the sample, for levels with a batch dimension; noise levels taken
    # for the times of a flow-matching model.
    x, levels = torch.ones(2, 3), torch.tensor([80.0, 5.0, 1.0, 0.0])
    for given, what in ((levels[None], r"\[1, 4\]"), (levels.tolist(), "list")):
        with pytest.raises(ValueError, match=rf"must be a 1-D tensor, \[steps \+ 1\], got {what}"):
            sampler(lambda x, sigma: x, x, given, disable=True)
    with pytest.raises(ValueError, match="times from 1 to 0, got 80 to 0"):
        sampler(lambda x, sigma: x, x, levels, disable=True, flow=True)
