"""The sampling loop: noise levels x step x guidance; and EDM2's sampler as a front to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from erk_guid.auto import improve
from erk_guid.churn import Churn, refuse_in_flow
from erk_guid.denoisers import Denoiser, combined
from erk_guid.guidance import GATES, Guidance, guide, measure
from erk_guid.schedules import edm_sigmas, make_sigmas
from erk_guid.solvers import (
    Solver,
    check_guidance,
    check_solver,
    churned_solvers,
    make_solver,
)
from erk_guid.steps import AnalyticFirst, EulerStep, Step


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each step. Tensors are the sampler's own: do not edit.

    Attributes:
        step: number of the step, from 0.
        num_steps: how many there are.
        sigma, sigma_next: noise levels the step went from and to.
        sigma_hat: where the step itself began: sigma, or higher where churn added noise.
        x_before: x at sigma_hat, noise of churn included.
        x: x at sigma_next, guidance included.
        denoised: D(x_before; sigma_hat); of a predictor-corrector (unipc, modal) the value it keeps
            for x_before, which was made at the predicted point.
        stiffness: rho per sample, [N], unit 1/sigma; None at steps without an embedded pair.
        gate: per sample, [N] bool, whether rho (or h rho) exceeds w_con; None likewise.
        correction_size: Euclidean norm of the correction per sample, [N]; None at steps without
            one.
        evaluations: calls of the denoiser so far, this step's included.
    """

    step: int
    num_steps: int
    sigma: float
    sigma_next: float
    sigma_hat: float
    x_before: Tensor
    x: Tensor
    denoised: Tensor
    stiffness: Tensor | None
    gate: Tensor | None
    correction_size: Tensor | None
    evaluations: int


Callback = Callable[[StepInfo], None]


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str | Solver | Step = "heun",
    guidance: Guidance | None = None,
    callback: Callback | None = None,
    churn: Churn | None = None,
    afs: bool = False,
    order: int | None = None,
    r: float | None = None,
    deis_mode: str | None = None,
    predict_x0: bool | None = None,
    variant: str | None = None,
    lower_order_final: bool | None = None,
    threshold: bool | None = None,
    flow: bool | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, see `Denoiser`.
        x: where to start, [N, ...] of any floating dtype, already scaled: a draw from the
            prior is ``sigmas[0] * torch.randn(...)``. The loop runs in its dtype and on its
            device.
        sigmas: noise levels, [M >= 2], strictly decreasing. A trailing 0 is reached by an
            Euler step; without one the sampler stops at the last level.
        solver: "heun", "euler", "dpm2", "deis", "ipndm", "ipndm_v", "dpmpp", "unipc", "res" or
            "modal"; or a solver with its options (`erk_guid.solvers`), or one step
            (`erk_guid.Step`) that is taken again and again.
        guidance: ERK guidance, or None for the plain solver. With ``w_stiff=0`` the result is
            that of the plain solver, bit for bit. Costs no evaluation of the denoiser.
        callback: called with a `StepInfo` after each step.
        churn: noise to add before steps (euler, heun and dpm2 without guidance), see `Churn`.
        afs: analytical first step: at the first noise level the drift is taken to be
            x / sqrt(1 + sigma^2), which saves an evaluation.
        order: evaluations combined in a step (deis, ipndm, ipndm_v, unipc, res, modal: 1 to 4,
            dpmpp: 1 to 3), known elsewhere as max_order.
        r: where dpm2 puts its midpoint, sigma_next^r sigma^(1 - r).
        deis_mode: "tab", "rhoab" or "log".
        predict_x0: whether dpmpp and unipc combine denoised images, or noise.
        variant: unipc's "bh1" or "bh2".
        lower_order_final: whether dpmpp and unipc lower the order near the end.
        threshold: whether dpmpp and unipc limit denoised images to the range of most pixels.
        flow: heun and modal: whether the denoiser is a flow-matching one, x being (1 - t) clean
            + t noise, and `sigmas` the times t from 1 down; see `erk_guid.flow`.
            An option that is None is left at the solver's own default; the solver's class in
            `erk_guid.solvers` says which that is.

    Returns:
        x at ``sigmas[-1]``. A Heun run over N levels and a trailing 0 takes 2 N - 1 evaluations.

    Gradients are recorded as usual: wrap the call in ``torch.no_grad()`` unless they are wanted
    (networks from `erk_guid.load` do not ask for any).

    Raises:
        ValueError: unusable sigmas, an unknown solver, an option that it does not have, guidance
            for a solver without a pair, churn with guidance or for a solver with a memory, a
            denoiser that returns another shape or edits its x.
        TypeError: `guidance` is not a `Guidance`, or `solver` lacks a part of its protocol.
    """
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(
            f"guidance must be an erk_guid.Guidance, e.g. Guidance(w_stiff=0.5), got "
            f"{guidance!r}; for classifier-free guidance or autoguidance with a strength, wrap "
            "the denoisers: ModelGuidance(main, guide, strength)"
        )
    options = {
        "order": order, "r": r, "deis_mode": deis_mode, "predict_x0": predict_x0,
        "variant": variant, "lower_order_final": lower_order_final, "threshold": threshold,
        "flow": flow,
    }  # fmt: skip
    if isinstance(solver, str):
        solver = make_solver(solver, **options)
    elif given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{given[0]} is set where the solver is made, not beside a solver object")
    check_solver(solver)
    if guidance is not None:
        check_guidance(guidance, solver, type(solver).__name__)
    if churn is not None and churn.active:
        check_churn(churn, solver, guidance)
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x must be a floating tensor [N, ...], got {x.dtype} {list(x.shape)}")
    # One look at the noise levels from the host; after this the loop never waits for the device.
    levels = check_levels(sigmas)
    sigmas = sigmas.to(device=x.device, dtype=x.dtype, copy=True)
    guidance = guidance or Guidance()

    state: Any = None
    evaluations = 0
    steps = plan_steps(solver, levels)
    for i, (level, level_next) in enumerate(pairwise(levels)):
        sigma, sigma_next, step, level_hat = sigmas[i], sigmas[i + 1], steps[i], level
        gamma = churn.gamma(level, len(steps), x.dtype) if churn is not None else None
        if churn is not None and gamma is not None:
            x, sigma = churn.add(x, sigma, gamma)
            level_hat = level + gamma * level
            step = plan_steps(solver, [level_hat, level_next])[0]
        analytic = afs and i == 0
        where = AnalyticFirst(denoiser, sigma) if analytic else denoiser
        result, state = step(where, x, sigma, sigma_next, state)
        evaluations += result.evaluations - analytic
        x_before, x, measured = x, result.x, None
        size: Tensor | None = None
        if guidance.blends and result.embedded is not None:
            x, size = improve(x, result.embedded)
        elif result.pair is not None and guidance.active:
            limit = result.spread() if guidance.bound is not None and result.spread else None
            x, measured = guide(x, result.pair, guidance, limit)
        if callback is not None:
            if result.pair is not None and measured is None:
                measured = measure(result.pair, replace(guidance, bound=None))
            if size is None and measured is not None:
                size = measured.size
            callback(
                StepInfo(
                    step=i,
                    num_steps=len(levels) - 1,
                    sigma=level,
                    sigma_next=level_next,
                    sigma_hat=level_hat,
                    x_before=x_before,
                    x=x,
                    denoised=result.denoised,
                    stiffness=measured.stiffness if measured else None,
                    gate=measured.gate if measured else None,
                    correction_size=size,
                    evaluations=evaluations,
                )
            )
        # What the next step needs is in its state; the rest should not live through it.
        del result, measured, size, x_before
    return x


def check_churn(churn: Churn, solver: Any, guidance: Guidance | None) -> None:
    """Refuse added noise where something remembers what was before it.

    Raises:
        ValueError: with guidance, or a solver with a memory.
    """
    if guidance is not None and guidance.active:
        raise ValueError(
            f"S_churn must be 0 with ERK guidance, got {churn.S_churn}: guidance compares two "
            "solutions at one noise level, and churn moves one of them to another; leave one of "
            "the two out (w_stiff=0 is the solver without guidance)"
        )
    if getattr(solver, "flow", False):
        refuse_in_flow(churn.S_churn)
    if not getattr(solver, "one_step", False):
        raise ValueError(
            f"S_churn must be 0 with {type(solver).__name__}, got {churn.S_churn}: it remembers "
            "evaluations at points that the added noise leaves; solvers that churn goes with: "
            f"{', '.join(churned_solvers())}"
        )


def plan_steps(solver: Solver | Step, levels: list[float]) -> list[Step]:
    """A step for each interval; the one to 0, if there is one, is Euler's."""
    positive = [level for level in levels if level > 0]
    again = len(positive) - 1
    steps = solver.plan(positive) if isinstance(solver, Solver) else [solver] * again
    return [*steps] if levels[-1] > 0 else [*steps, EulerStep()]


def check_levels(sigmas: Tensor) -> list[float]:
    """The noise levels as numbers.

    Raises:
        ValueError: they are not falling, finite and 0 or more.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        shape = list(sigmas.shape) if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas must be a 1-D tensor of at least two noise levels, got {shape}")
    levels: list[float] = sigmas.tolist()
    for i, level in enumerate(levels):
        if not math.isfinite(level) or level < 0:
            raise ValueError(f"sigmas[{i}] is {level}; noise levels are finite and not negative")
        if i and level >= levels[i - 1]:
            raise ValueError(
                f"sigmas must fall strictly, but sigmas[{i}] = {level} follows {levels[i - 1]}"
            )
    return levels


def edm_sampler(
    net: Callable[..., Tensor],
    noise: Tensor,
    labels: Tensor | None = None,
    gnet: Callable[..., Tensor] | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    guidance: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    w_stiff: float | str = 0.0,
    w_con: float = 0.0,
    *,
    solver: str | Solver | Step = "heun",
    callback: Callback | None = None,
    schedule: str | Sequence[float] = "polynomial",
    denoise_to_zero: bool = True,
    afs: bool = False,
    order: int | None = None,
    r: float | None = None,
    deis_mode: str | None = None,
    predict_x0: bool | None = None,
    variant: str | None = None,
    lower_order_final: bool | None = None,
    threshold: bool | None = None,
    bound: float | None = None,
    gate: str = GATES[0],
) -> Tensor:
    """EDM2's sampler with ERK guidance, under EDM2's own signature.

    Drops into an EDM2 checkout as its ``sampler_fn``. A thin front to `sample`: the keyword-only
    arguments are the ones EDM2 does not know, besides `w_stiff` and `w_con`.

    Args:
        net: called as ``net(x, sigma, labels)``.
        noise: unit-variance noise [N, C, H, W].
        labels: one-hot rows [N, label_dim], or None.
        gnet: guiding network, called likewise; needed when `guidance` is not 1.
        num_steps, sigma_min, sigma_max, rho: see `karras_sigmas`.
        guidance: strength of *model* guidance (CFG, autoguidance), see `ModelGuidance`; with 1
            the guiding network is not run.
        S_churn, S_min, S_max, S_noise, randn_like: noise added before steps, see `Churn`; only
            where nothing guides (w_stiff 0), and with a solver of one step (heun, euler, dpm2).
        dtype: the loop runs in it, and the noise levels are computed in it (`edm_sigmas`), so that
            results are EDM2's own; the networks' output is cast to it.
        w_stiff: strength of ERK guidance, or "auto" for the parameter-free form. As in the
            published function only the square counts, so a sign changes nothing.
        w_con: stiffness above which it acts. The published function's default is 0, that of the
            command lines, here and there, 0.5. A negative value opens the gate, as 0 does.
        bound, gate: see `Guidance`.
        schedule: how the noise levels are spaced, see `make_sigmas`; or the levels themselves,
            falling to above 0, which then `num_steps` and the range have no part in.
        denoise_to_zero: end with an Euler step to sigma = 0; False stops at the last level.

    The other arguments are those of `sample`.

    Returns:
        The samples, like noise, in `dtype`.

    Raises:
        ValueError: a value out of range, or model guidance without `gnet`.
    """
    churn = Churn(S_churn, S_min, S_max, S_noise, randn_like)
    if isinstance(w_stiff, str):
        erk = Guidance.of(w_stiff, w_con or None, bound, gate)
    else:
        erk = Guidance(abs(w_stiff), max(w_con, 0.0), bound=bound, gate=gate)
    denoise = combined(net, gnet, guidance)
    if isinstance(schedule, str) and schedule == "polynomial":
        sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho, dtype=dtype, device=noise.device)
    elif isinstance(schedule, str):
        sigmas = make_sigmas(schedule, num_steps, sigma_min, sigma_max, rho)
    else:
        sigmas = torch.tensor([*schedule, 0.0], dtype=torch.float64)
    return sample(
        lambda x, sigma: denoise(x, sigma, labels),
        noise.to(dtype) * sigmas[0].to(device=noise.device, dtype=dtype),
        sigmas if denoise_to_zero else sigmas[:-1],
        solver=solver,
        guidance=erk,
        callback=callback,
        churn=churn,
        afs=afs,
        order=order,
        r=r,
        deis_mode=deis_mode,
        predict_x0=predict_x0,
        variant=variant,
        lower_order_final=lower_order_final,
        threshold=threshold,
    )
