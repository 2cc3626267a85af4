"""ERK guidance under k-diffusion's sampler signature, which ComfyUI, Forge and many others use.

    from erk_guid.integrations.k_diffusion import sample_erk_heun

    x = sample_erk_heun(model, x, sigmas, extra_args={...}, w_stiff="auto")

``model(x, sigma, **extra_args)`` returns the denoised x for sigma [N]. `x` must already be scaled
by ``sigmas[0]``. The step to a trailing 0 is an Euler step. The lists of noise levels may begin or
end anywhere. Flow-matching models work too if the wrapped model returns the denoised x, as in
ComfyUI: pass ``flow=True``. Methods that assume Gaussian modes (Heun's parameter-free form and the
modal solver) then go through `erk_guid.RectifiedFlow`. The others are integrated in t, as ComfyUI
does (`erk_guid.integrations.flow`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from erk_guid.churn import Churn
from erk_guid.guidance import ERKGuidance, Gate, Guidance, make_guidance
from erk_guid.integrations.flow import flow_process
from erk_guid.sampling import StepInfo, sample
from erk_guid.solvers import DPM2, Heun, Modal, Solver

__all__ = ["sample_erk_dpm_2", "sample_erk_heun", "sample_modal"]

Model = Callable[..., Tensor]
StepCallback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def _run(
    solver: Solver,
    guidance: Guidance | None,
    flow: bool,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: StepCallback | None,
    disable: bool | None,
    churn: Churn | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    from tqdm.auto import tqdm

    if len(sigmas) < 2:
        return x  # as other samplers do where nothing is left to denoise
    extra = dict(extra_args or {})
    ones = x.new_ones([x.shape[0]])

    def denoiser(x: Tensor, sigma: Tensor, /) -> Tensor:
        return model(x, sigma * ones, **extra)

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def note(info: StepInfo) -> None:
            bar.update()
            if callback is not None:
                sigma = sigmas[info.step]
                callback({
                    "x": info.x_before, "i": info.step, "sigma": sigma,
                    "sigma_hat": sigma * (info.sigma_hat / info.sigma), "denoised": info.denoised,
                })  # fmt: skip

        return sample(
            denoiser, x, sigmas, solver=solver, guidance=guidance, callback=note, churn=churn,
            process=flow_process(solver, guidance) if flow else None, randn_like=randn_like,
        )  # fmt: skip


def _churn(
    s_churn: float, s_tmin: float, s_tmax: float, s_noise: float, flow: bool
) -> Churn | None:
    """Return the noise to add, None for none; numbers may be tensors, as noise levels are.

    Raises:
        ValueError: a number out of range, or noise for a flow-matching model.
    """
    if float(s_churn) == 0:
        return None
    if flow:
        raise ValueError(
            f"S_churn must be 0 with flow=True, got {s_churn}: it adds noise to x that is clean + "
            "sigma noise, which a flow's x is not; erk_guid.sample with process=RectifiedFlow() "
            "can add noise"
        )
    return Churn(float(s_churn), float(s_tmin), float(s_tmax), float(s_noise), torch.randn_like)


@torch.no_grad()
def sample_erk_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    w_stiff: float | str = "auto",
    w_con: float = ERKGuidance.w_con,
    bound: float | None = None,
    gate: Gate = ERKGuidance.gate,
    flow: bool = False,
) -> Tensor:
    """Sample as k-diffusion's ``sample_heun``, with ERK guidance; two evaluations per step.

    Args:
        model: called as ``model(x, sigma, **extra_args)`` with sigma [N]; returns the denoised x.
        x: [N, ...], already scaled by ``sigmas[0]``.
        sigmas: falling noise levels [steps + 1], ending at 0 or above.
        extra_args: passed to the model.
        callback: called once per step with x (before the step), i, sigma, sigma_hat, denoised.
        disable: switches the progress bar off.
        s_churn, s_tmin, s_tmax, s_noise: noise added before steps at levels from s_tmin to s_tmax,
            only without guidance (w_stiff=0). `torch.randn_like` draws it where it is added, as in
            EDM2 (k-diffusion draws at the other steps too, and drops that noise).
        w_stiff, w_con, bound, gate: see `ERKGuidance`; "auto" is `ParameterFreeGuidance`, which
            takes none of the other three: leave them at their defaults.
        flow: whether the model is a flow-matching one: x is (1 - t) clean + t noise, and `sigmas`
            are times t. See `erk_guid.integrations.flow` for what that changes.

    Returns:
        x at ``sigmas[-1]``.

    Raises:
        ValueError: s_churn together with guidance, or a value out of range.
    """
    churn = _churn(s_churn, s_tmin, s_tmax, s_noise, flow)
    guidance = make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)
    return _run(Heun(), guidance, flow, model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_erk_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    w_stiff: float | str = "auto",
    w_con: float = ERKGuidance.w_con,
    bound: float | None = None,
    gate: Gate = ERKGuidance.gate,
    flow: bool = False,
) -> Tensor:
    """Sample as k-diffusion's ``sample_dpm_2``, with ERK guidance.

    Arguments as `sample_erk_heun`'s.
    """
    churn = _churn(s_churn, s_tmin, s_tmax, s_noise, flow)
    guidance = make_guidance(w_stiff, w_con=w_con, bound=bound, gate=gate)
    return _run(DPM2(), guidance, flow, model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_modal(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    order: int = Modal.order,
    response: Sequence[float] | None = None,
    flow: bool = False,
) -> Tensor:
    """Sample by the modal solver (`erk_guid.solvers.Modal`), one evaluation per step, no guidance.

    Other arguments as `sample_erk_heun`'s.

    Args:
        eta: noise in each step, from 0 (none, the ODE) to 1 (the reverse SDE).
        s_noise: standard deviation of that noise, as k-diffusion's ancestral samplers have it;
            without `eta` it and `noise_sampler` have no part, as there.
        noise_sampler: ``noise_sampler(sigma, sigma_next)`` returns standard normal noise like x;
            by default `torch.randn_like`.
        order, response: see `Modal`; `erk_guid.fit` finds them for a model.

    Raises:
        ValueError: a value out of range.
    """
    if not (math.isfinite(s_noise) and s_noise >= 0):
        raise ValueError(f"s_noise must be a finite number of 0 or more, got {s_noise}")
    intervals = pairwise(sigmas)  # each is asked for once, in order: only a last one, to 0, is not

    def randn_like(x: Tensor) -> Tensor:
        drawn = torch.randn_like(x) if noise_sampler is None else noise_sampler(*next(intervals))
        return s_noise * drawn.to(x)

    noise = float(eta) if isinstance(eta, Tensor) else eta  # as noise levels are
    solver = Modal(order, None if response is None else tuple(response), noise)
    return _run(
        solver, None, flow, model, x, sigmas, extra_args, callback, disable, randn_like=randn_like
    )
