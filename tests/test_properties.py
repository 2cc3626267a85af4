"""What holds for every solver and every form of guidance, at any scale, dtype and memory layout.

The examples are drawn by hypothesis, the same ones each time. That a denoiser may reuse its output,
and that one which edits its x is refused, is held for every solver in test_sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.problems import reusing
from torch import Tensor

import erk_guid
from erk_guid.guidance import erk
from erk_guid.norms import inner, norm, projection, scaled
from erk_guid.solvers import DEIS, SOLVERS, Pair, Solver, make_solver
from erk_guid.solvers.multistep import trust_in_past

Denoise = Callable[[Tensor, Tensor], Tensor]

checked = settings(
    derandomize=True, deadline=None, max_examples=8, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip

LEVELS = [8.0, 5.0, 3.0, 1.5, 0.7, 0.3]

AUTO = erk_guid.ParameterFreeGuidance()
FORMS: list[erk_guid.Guidance] = [
    erk_guid.ERKGuidance(0.0),
    erk_guid.ERKGuidance(0.5, 0.0),
    erk_guid.ERKGuidance(2.5, 0.0, bound=0.2),
    erk_guid.ERKGuidance(0.5, 0.1, gate="step"),
    AUTO,
]

# 'tab' knows the noise levels of EDM alone, so DEIS is here with 'rhoab' beside its default.
SOLVERS_HERE: list[Solver] = [*(make_solver(name) for name in SOLVERS), DEIS(deis_mode="rhoab")]


def goes(solver: Solver, guidance: erk_guid.Guidance) -> bool:
    try:
        guidance.check(solver)
    except ValueError:
        return False
    return True


PAIRS = [(s, g) for s in SOLVERS_HERE for g in FORMS if goes(s, g)]
every_pair = pytest.mark.parametrize(
    ("solver", "guidance"), PAIRS, ids=[f"{s}-{g}".replace(" ", "") for s, g in PAIRS]
)


def curved(scale: float) -> Denoise:
    """A denoiser that is no Gaussian's: data of about `scale`, nonlinear in x."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        y, level = x / scale, sigma / scale
        return torch.tanh(y / (1 + level)) / (1 + level) * scale

    return denoise


def draw(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)


def levels(scale: float, last: list[float] | None = None) -> Tensor:
    return torch.tensor([*LEVELS, *(last or [])], dtype=torch.float64) * scale


@every_pair
@checked
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    exponent=st.integers(-30, 30),
    moves=st.sampled_from(["data", "x"]),
    denoiser=st.sampled_from(["curved", "zero", "identity"]),
    count=st.integers(0, 2),
)
@example(torch.float32, 30, "data", "curved", 2)
@example(torch.bfloat16, 30, "x", "curved", 2)
@example(torch.float32, -30, "data", "identity", 2)
def test_finite_in_finite_out_or_an_error_that_says_why(
    solver: Solver,
    guidance: erk_guid.Guidance,
    dtype: torch.dtype,
    exponent: int,
    moves: str,
    denoiser: str,
    count: int,
) -> None:
    # Catches: squares that overflow (NaN from x of 1e19 on, in the parameter-free form), 0 over 0
    # where the pair's drifts are equal ("identity": all 0) or its points are, a batch of none, and
    # an overflow that ends in another error than a ValueError.
    scale = 10.0**exponent
    sigmas = levels(scale if moves == "data" else 1.0, [0.0])
    problems: dict[str, Denoise] = {
        "curved": curved(scale), "zero": lambda x, s: 0 * x, "identity": lambda x, s: x.clone(),
    }  # fmt: skip
    x = draw((count, 2, 3, 3), 8 * scale, dtype)
    fits = bool(x.isfinite().all())
    try:
        found = erk_guid.sample(problems[denoiser], x, sigmas, solver=solver, guidance=guidance)
    except erk_guid.NonFiniteError:
        # Only where the dtype itself is too small for the numbers in between.
        assert not fits or dtype == torch.float16
        return
    except ValueError as error:
        said = str(error)
    else:
        assert found.isfinite().all()
        assert found.dtype == dtype
        assert found.shape == x.shape
        return
    small_dtype = dtype == torch.float16 and "does not hold the noise level" in said
    assert small_dtype or "deis_mode 'tab' cannot tell noise levels below" in said


def scales_with_the_data(
    solver: Solver, guidance: erk_guid.Guidance, exponent: int, dtype: torch.dtype, base: float
) -> None:
    c, x = 2.0**exponent, draw((2, 3, 4), 8 * base, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erk, "EPS", 0.0)  # the published constant, which does not scale
        one, many = (
            erk_guid.sample(
                curved(base * k), x * k, levels(base * k), solver=solver, guidance=guidance
            )
            for k in (1.0, c)
        )
    # The weights come from logarithms of the levels, rounded at another place.
    limit = 1e-9 if dtype == torch.float64 else 2e-5
    assert float((many / c - one).abs().max()) <= limit * float(one.abs().max())


EQUIVARIANT = [(s, g) for s, g in PAIRS if s != DEIS()]


@pytest.mark.parametrize(
    ("solver", "guidance"), EQUIVARIANT, ids=[f"{s}-{g}".replace(" ", "") for s, g in EQUIVARIANT]
)
@checked
@given(
    exponent=st.integers(-100, 0) | st.sampled_from([-100, -85, -64]),
    upwards=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_results_scale_with_the_data(
    solver: Solver,
    guidance: erk_guid.Guidance,
    exponent: int,
    upwards: bool,
    dtype: torch.dtype,
) -> None:
    # Catches: squares that vanish (x of 1e-25 was guided as if the pair said nothing) or overflow,
    # and any constant with a unit. Two are meant: what modes suppose about data of size 1 changes
    # at noise levels of 10 and 100, so a run stays on one side of them.
    if upwards:
        scales_with_the_data(solver, guidance, -exponent, dtype, 2.0**10)
    else:
        scales_with_the_data(solver, guidance, exponent, dtype, 1.0)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """The same numbers, every second of a larger tensor, with two dimensions exchanged."""
    wide = x.new_zeros(len(x), x.shape[1], x.shape[3], 2 * x.shape[2])
    wide[..., ::2] = x.transpose(2, 3)
    return wide[..., ::2].transpose(2, 3)


@every_pair
@pytest.mark.parametrize("layout", [channels_last, strided])
def test_the_memory_layout_does_not_matter(
    solver: Solver, guidance: erk_guid.Guidance, layout: Callable[[Tensor], Tensor]
) -> None:
    # Catches: dimensions that are joined by a view, and results that come out in another order.
    x = draw((3, 2, 4, 5), 8.0)

    def run(x: Tensor, denoiser: Denoise) -> Tensor:
        return erk_guid.sample(denoiser, x, levels(1.0, [0.0]), solver=solver, guidance=guidance)

    plain = run(x, curved(1.0))
    laid = run(layout(x), lambda x, s: layout(curved(1.0)(x, s)))
    torch.testing.assert_close(laid, plain, rtol=1e-10, atol=1e-12)


@every_pair
def test_an_expanded_x_is_as_good_as_a_copy(solver: Solver, guidance: erk_guid.Guidance) -> None:
    # Catches: a write into x, whose samples share one memory here.
    one = draw((1, 2, 4, 5), 8.0)
    expanded = one.expand(3, -1, -1, -1)
    before = one.clone()
    ends = [
        erk_guid.sample(curved(1.0), x, levels(1.0, [0.0]), solver=solver, guidance=guidance)
        for x in (expanded, expanded.clone())
    ]
    assert torch.equal(*ends)
    assert torch.equal(one, before)


@every_pair
def test_a_denoiser_that_reuses_its_output_can_be_guided(
    solver: Solver, guidance: erk_guid.Guidance
) -> None:
    # Catches: a pair that refers to the denoiser's own tensor, which the next call fills anew.
    x = draw((3, 4), 8.0)
    ends = [
        erk_guid.sample(denoiser, x, levels(1.0, [0.0]), solver=solver, guidance=guidance)
        for denoiser in (curved(1.0), reusing(curved(1.0)))
    ]
    assert torch.equal(*ends)


@checked
@given(
    exponent=st.integers(-100, 100),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size=st.integers(1, 700),
)
def test_norms_are_those_of_the_plain_formula_at_any_scale(
    exponent: int, dtype: torch.dtype, size: int
) -> None:
    # Catches: a scale that rounds. Expected from torch's own norm of the same numbers near 1, which
    # a power of two multiplies exactly.
    c, a, b = 2.0**exponent, draw((3, size), 1, dtype), draw((3, size), 1, dtype, seed=1)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(norm(a * c), torch.linalg.vector_norm(a.to(wide), dim=1) * c)
    share = torch.linalg.vecdot(a.to(wide), b.to(wide)) / b.to(wide).square().sum(1)
    torch.testing.assert_close(projection(a * c, b * c), share, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trust_in_past(b * 0, b * c, a * c), share.clamp(0, 1))


def test_numbers_at_the_ends_of_the_dtype_have_norms() -> None:
    # Catches: a power of two or its reciprocal beyond the dtype, and 0 over 0.
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        limits = torch.finfo(dtype)
        ends = [limits.tiny * limits.eps, limits.tiny, 1.0, limits.max / 2, limits.max, 0.0]
        x = torch.zeros(len(ends), 3, dtype=dtype)
        x[:, 1] = torch.tensor(ends, dtype=torch.float64).to(dtype)
        assert torch.equal(norm(x), x[:, 1].to(norm(x).dtype)), dtype
        values, unit = scaled(x)
        assert torch.equal((values.to(unit.dtype) * unit[:, None]).to(dtype), x), dtype
        assert projection(x[1:4], x[1:4]).tolist() == [1.0] * 3, dtype
    broken = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [-float("inf"), 1.0]])
    assert not norm(broken).isfinite().any()
    assert norm(torch.zeros(0, 4)).shape == norm(torch.zeros(0, 4, 2, 2)).shape == (0,)
    assert norm(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    assert inner(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_norms_have_the_gradients_of_the_plain_formula() -> None:
    # Catches: a gradient through the power of two, which is no function of x to differentiate.
    x = draw((3, 5), 3.0).requires_grad_()
    y = draw((3, 5), 3.0, seed=1)
    found = torch.autograd.grad((norm(x) * projection(y, x)).sum(), x)
    wanted = torch.autograd.grad(((x * y).sum(1) / x.norm(dim=1)).sum(), x)
    torch.testing.assert_close(found, wanted)


@checked
@given(exponent=st.integers(-100, 100), sign=st.sampled_from([1, -1]))
def test_the_published_correction_of_two_numbers(exponent: int, sign: int) -> None:
    # By hand: rho = 1/2, v = (1, 0), so -h (w h rho)^2 f along the first axis: -(1/4) f. From
    # 1e-3 on the published 1e-8 is less than what is asked for.
    c = 2.0**exponent
    x, f = torch.tensor([[4.0, 1.0]]) * c, torch.tensor([[3.0, 5.0]]) * c
    pair = Pair(x, x - torch.tensor([[2.0, 0.0]]) * c, f, f - torch.tensor([[1.0, 0.0]]) * c, 1.0)
    add = erk_guid.ERKGuidance(1.0, 0.0).correction(pair._replace(sign=sign)) / c
    assert add.isfinite().all()
    if exponent > -10:
        torch.testing.assert_close(add, sign * torch.tensor([[-0.75, 0.0]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda x: None, TypeError, r"returned None for an x of \[4, 2, 3\]; is its 'return'"),
        (lambda x: (x, x), TypeError, r"returned a tuple of 2 for an x .* the denoised x alone"),
        (lambda x: {"sample": x}, TypeError, "returned a dict for"),
        (lambda x: 0.5, TypeError, "returned a float for"),
        (lambda x: x.long(), TypeError, r"returned torch\.int64 \[4, 2, 3\], but .*\.float"),
        (lambda x: x > 0, TypeError, r"returned torch\.bool"),
        (lambda x: x + 1j, TypeError, r"returned torch\.complex64 .*\.real"),
        (lambda x: x[:1], ValueError, r"returned \[1, 2, 3\] for an x of \[4, 2, 3\]"),
        (lambda x: x.mean((1, 2), keepdim=True), ValueError, r"returned \[4, 1, 1\]"),
        (lambda x: x.mean(), ValueError, r"returned \[\] for"),
    ],
)  # fmt: skip
def test_what_is_no_denoised_x_is_named(made: Any, error: type[Exception], message: str) -> None:
    # Catches: numbers that are cast or broadcast in silence, and errors that name the solver's own
    # arithmetic ("'NoneType' object has no attribute 'shape'").
    x = torch.randn(4, 2, 3)
    for solver in SOLVERS_HERE:
        with pytest.raises(error, match=message):
            erk_guid.sample(lambda x, s: made(x), x, levels(1.0), solver=solver)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_an_x_without_noise_levels_is_refused(dtype: torch.dtype) -> None:
    # Catches: noise levels rounded to whole numbers, and complex drifts. In a loop of one's own,
    # too, where no `sample` looks at x.
    x = torch.ones(2, 3, dtype=dtype)
    for solver in SOLVERS_HERE:
        with pytest.raises(ValueError, match=f"floating tensor .* got {dtype}"):
            erk_guid.sample(curved(1.0), x, levels(1.0), solver=solver)
        with pytest.raises(ValueError, match=f"floating tensor .* got {dtype}"):
            solver.plan([2.0, 1.0])[0](curved(1.0), x)


def test_noise_levels_that_the_dtype_does_not_hold_are_named() -> None:
    # Catches: torch's own "value cannot be converted to type at::Half without overflow".
    x = torch.ones(2, 3, dtype=torch.float16)
    for sigmas in ([1e5, 1.0], [1.0, 1e-9, 1e-10]):
        with pytest.raises(ValueError, match=r"torch\.float16 does not hold the noise level 1"):
            erk_guid.sample(lambda x, s: 0 * x, x, torch.tensor(sigmas))
    with pytest.raises(ValueError, match=r"below 1e-07 apart, got 1e-10; take deis_mode 'rhoab'"):
        DEIS().plan([1.0, 1e-10])


def test_the_analytical_first_step_at_any_noise_level() -> None:
    # By hand: at noise this high the drift is x / sigma, and x falls as sigma does. Catches: sigma
    # squared in the dtype of x, which left x where it was from 1.8e19 on.
    x = torch.tensor([[3e25, -1e25]])
    found = erk_guid.sample(
        lambda x, s: 0 * x, x, torch.tensor([1e25, 1e24]), solver="euler", afs=True
    )
    torch.testing.assert_close(found, x / 10)
