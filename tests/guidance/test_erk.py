"""The estimators and the correction, on problems whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ROOT
from torch import Tensor

import erk_guid
from erk_guid import ERKGuidance, Pair


def random_pair(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(4))
    return a, b, c, d


def symmetric(n: int, dominant: float) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with one eigenvalue far above the others, and its eigenvector."""
    g = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    values = torch.linspace(0.01, 0.1, n, dtype=torch.float64)
    values[0] = dominant
    return q @ torch.diag(values) @ q.T, q[:, 0]


@pytest.mark.parametrize("dominant", [-30.0, 0.7, 4.0])
def test_estimators_on_a_linear_system(dominant: float) -> None:
    # Catches: a swapped quotient, a norm over the batch, a squared norm.
    matrix, v = symmetric(6, dominant)
    x_low = torch.randn(5, 6, dtype=torch.float64)
    x_high = x_low + torch.linspace(1e3, 5e3, 5, dtype=torch.float64)[:, None] * v
    f_high, f_low = x_high @ matrix, x_low @ matrix
    rho = erk_guid.stiffness(x_high, x_low, f_high, f_low)
    torch.testing.assert_close(rho, torch.full_like(rho, abs(dominant)), rtol=1e-10, atol=0)
    estimate = erk_guid.dominant_eigenvector(f_high, f_low)
    sign = math.copysign(1, dominant)
    torch.testing.assert_close(estimate, (sign * v).expand(5, 6), rtol=0, atol=1e-9)


def test_power_iteration_like_behaviour() -> None:
    # A pair that is not an eigenvector: rho lies below |lambda| and v leans towards it.
    matrix, v = symmetric(6, 4.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    zero = torch.zeros_like(x)
    rho = erk_guid.stiffness(x, zero, x @ matrix, zero)
    assert (rho <= 4.0 + 1e-9).all()
    before = (x @ v).abs() / x.norm(dim=1)
    after = (erk_guid.dominant_eigenvector(x @ matrix, zero) @ v).abs()
    assert (after > before).all()


def written_out(
    x_high: Tensor, x_low: Tensor, f_high: Tensor, f_low: Tensor, h: Tensor, g: ERKGuidance
) -> Tensor:
    """The paper's formula a second time, sample by sample, with v as a vector.

    That it is the published one, the end points of the published programs say: edm2_sampler in
    test_sampling.py, diff_sampler_solvers in test_solvers.py.
    """
    out = []
    for xh, xl, fh, fl, step in zip(x_high, x_low, f_high, f_low, h, strict=True):
        dx, df = (xh - xl).reshape(-1), (fh - fl).reshape(-1)
        rho = math.sqrt(float((df * df).sum())) / (math.sqrt(float((dx * dx).sum())) + 1e-8)
        v = df / (math.sqrt(float((df * df).sum())) + 1e-8)
        scale = (g.w_stiff * float(step) * rho) ** 2 if rho > g.w_con else 0.0
        out.append((-float(step) * scale * float(v @ fh.reshape(-1)) * v).reshape(xh.shape))
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(7, 2), (4, 3, 8, 8), (2, 5, 3, 4, 4)])
def test_correction_is_the_papers_formula(shape: tuple[int, ...]) -> None:
    # Catches: the sign, h to the wrong power, w_stiff not squared, f_low in place of f_high.
    x_high, x_low, f_high, f_low = random_pair(*shape)
    h = torch.linspace(0.1, 2, shape[0], dtype=torch.float64)
    guidance = ERKGuidance(0.8, 0.99)  # a threshold inside the range of rho: some gates shut
    rho = erk_guid.stiffness(x_high, x_low, f_high, f_low)
    ours = guidance.correction(Pair(x_high, x_low, f_high, f_low, h))
    expected = written_out(x_high, x_low, f_high, f_low, h, guidance)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    shut = rho <= 0.99
    assert shut.any()
    assert not shut.all()
    assert (ours[shut] == 0).all()


def test_h_as_a_number_keeps_float64() -> None:
    # Catches: h rounded to float32 on the way, which would show at 1e-8.
    pair = random_pair(3, 4)
    ours = ERKGuidance(1.0, 0.0).correction(Pair(*pair, 0.1))
    expected = written_out(*pair, torch.full([3], 0.1, dtype=torch.float64), ERKGuidance(1.0, 0.0))
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)


def test_strength_cancels_heuns_leading_error() -> None:
    # On f = lambda x the error of Heun is O(z^3); w = 1/sqrt(6) removes that term, exactly
    # (spec: alpha(z) = -z^2/6 + O(z^3)). Catches a wrong factor anywhere in the coefficient.
    errors: dict[float, list[float]] = {0.0: [], 1 / math.sqrt(6): []}
    zs = [0.2, 0.1, 0.05]
    lam = 1.3
    for z in zs:
        h = z / lam
        x = torch.full([1, 3], 2.0, dtype=torch.float64)
        x_low = x + 1e3  # any pair along the mode
        x_high = x * (1 - z + z * z / 2)
        for w in errors:
            add = ERKGuidance(w, 0.0).correction(Pair(x, x_low, lam * x, lam * x_low, h))
            exact = x * math.exp(-z)
            errors[w].append(float((x_high + add - exact).abs().max()))
    plain, guided = (math.log(e[0] / e[-1]) / math.log(zs[0] / zs[-1]) for e in errors.values())
    assert plain == pytest.approx(3, abs=0.1)
    assert guided == pytest.approx(4, abs=0.1)


def test_a_zero_pair_gives_exactly_zero() -> None:
    x, _, f, _ = random_pair(3, 5, dtype=torch.float32)
    assert (erk_guid.stiffness(x, x, f, f) == 0).all()
    assert (erk_guid.dominant_eigenvector(f, f) == 0).all()
    assert (ERKGuidance(2.0, 0.0).correction(Pair(x, x, f, f, 1.0)) == 0).all()


@pytest.mark.parametrize("small", ["drifts' difference", "points' distance"])
def test_the_page_says_where_the_published_form_becomes_weaker(small: str) -> None:
    # Catches: numbers of the page that are not the code's. By hand: d / (d + 1e-8) is 0.99 at
    # 99e-8; its square at 1e-8 s / (1 - s) with s the square root of 0.99.
    text = (ROOT / "docs" / "limits.md").read_text().replace("\\|", "")
    rows = [row for row in text.splitlines() if row.startswith("|")]
    (first,) = [i for i, row in enumerate(rows) if small in row]
    for row, power in zip(rows[first : first + 2], (1, 2), strict=True):
        for cell, left in zip(row.split("|")[-3:-1], (0.99, 0.5), strict=True):
            share = left ** (1 / power)
            exact = 1e-8 * share / (1 - share)
            assert float(cell) == pytest.approx(exact, rel=0.02), row
            f = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
            along = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
            weak = exact * along
            dx, df = (along, weak) if "drifts" in small else (weak, along)
            pair = Pair(f, f - dx, f, f - df, 1.0)
            if power == 2:
                # Without the constant: -(|df| / |dx|)^2 f, f lying along the difference.
                found = ERKGuidance(1.0, 0.0).correction(pair) / -f
                unweakened = float((df.norm() / dx.norm()) ** 2)
            elif "drifts" in small:
                found = erk_guid.dominant_eigenvector(f, f - df) / along
                unweakened = 1.0
            else:
                found = erk_guid.stiffness(f, f - dx, f, f - df)
                unweakened = float(df.norm() / dx.norm())
            assert (found / unweakened).numpy() == pytest.approx(left, rel=1e-7), row


def test_permutation_and_rotation_equivariance() -> None:
    # Catches: statistics shared between samples, and anything that depends on the coordinates.
    pair = random_pair(6, 5)
    h, guidance = torch.linspace(0.5, 1, 6, dtype=torch.float64), ERKGuidance(0.7, 0.9)
    base = guidance.correction(Pair(*pair, h))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    a, b, c, d = (t[order] for t in pair)
    torch.testing.assert_close(
        guidance.correction(Pair(a, b, c, d, h[order])), base[order], rtol=1e-14, atol=0
    )
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    a, b, c, d = (t @ q for t in pair)
    torch.testing.assert_close(
        guidance.correction(Pair(a, b, c, d, h)), base @ q, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    # 65,536 differences of 8: the sum of squares, 4.2 million, is beyond float16.
    shape = (2, 4, 128, 128)
    x_low = torch.zeros(shape, dtype=dtype)
    x_high = torch.full(shape, 8.0, dtype=dtype)
    f_high = torch.full(shape, 16.0, dtype=dtype)
    rho = erk_guid.stiffness(x_high, x_low, f_high, x_low)
    assert rho.dtype == torch.float32
    torch.testing.assert_close(rho, torch.full([2], 2.0))
    add = ERKGuidance(1.0, 0.5).correction(Pair(x_high, x_low, f_high, x_low, 0.25))
    assert add.dtype == dtype
    # -h (w h rho)^2 f: 0.25 * 0.25 * 16
    torch.testing.assert_close(add, torch.full(shape, -1.0, dtype=dtype), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w_stiff": -0.5}, "w_stiff must not be negative, got -0.5"),
        ({"w_con": -1}, "w_con must not be negative, got -1"),
        ({"w_stiff": float("nan")}, "w_stiff must be a finite number, got nan"),
        ({"w_con": float("inf")}, "w_con must be a finite number, got inf"),
        ({"w_stiff": "1"}, "w_stiff must be a finite number, got '1'"),
        ({"w_stiff": True}, "w_stiff must be a finite number, got True"),
    ],
)
def test_guidance_names_bad_values(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ERKGuidance(**arguments)


def test_guidance_is_frozen_and_has_one_home_for_defaults() -> None:
    with pytest.raises(AttributeError):
        ERKGuidance().w_stiff = 1.0  # type: ignore[misc]
    assert (ERKGuidance().w_stiff, ERKGuidance().w_con) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, (0.5, 0.1)), (8, (0.5, 0.1)), (12, (0.5, 0.1)), (13, (0.75, 0.3)), (16, (0.75, 0.3)),
     (25, (1.0, 0.5)), (32, (1.0, 0.5)), (256, (1.0, 0.5))],
)  # fmt: skip
def test_paper_settings_are_the_nearest(steps: int, expected: tuple[float, float]) -> None:
    guidance = ERKGuidance.paper(steps)
    assert (guidance.w_stiff, guidance.w_con) == expected


def test_shapes_are_checked() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\[2, 3\], \[2, 4\]"):
        erk_guid.stiffness(x, torch.zeros(2, 4), x, x)
    with pytest.raises(ValueError, match=r"h must be a number or \[2\], got shape \[3\]"):
        ERKGuidance(1.0).correction(Pair(x, x, x, x, torch.ones(3)))


def test_a_gate_without_a_unit() -> None:
    # In other units of noise the same problem has another rho, and the same h rho.
    x, dx, f, df = random_pair(6, 4, seed=5)
    h = 0.3
    rho = erk_guid.stiffness(x, x - dx, f, f - df)
    threshold = 1.001 * float(rho.median()) * h
    for unit in (1.0, 80.0, 0.01):
        pair = (x * unit, (x - dx) * unit, f, f - df, h * unit)
        step = ERKGuidance(0.5, threshold, gate="step")
        moved = (step.correction(Pair(*pair)) != 0).any(dim=1)
        assert torch.equal(moved, rho * h > threshold)
        published = ERKGuidance(0.5, threshold)
        moved = (published.correction(Pair(*pair)) != 0).any(dim=1)
        assert torch.equal(moved, rho / unit > threshold)
    # Where the published program adds the correction (DEIS), it is the same with the other sign.
    step = ERKGuidance(0.5, threshold, gate="step")
    there, back = (step.correction(Pair(x, x - dx, f, f - df, h, sign)) for sign in (1, -1))
    assert (back != 0).any()
    assert torch.equal(back, -there)
    with pytest.raises(ValueError, match="gate must be 'stiffness' or 'step', got 'h'"):
        ERKGuidance(gate="h")
