"""ERK guidance under k-diffusion's sampler signature, which ComfyUI, Forge and many others use.

    from erk_guid.integrations.k_diffusion import sample_erk_heun

    x = sample_erk_heun(model, x, sigmas, extra_args={...}, w_stiff="auto")

``model(x, sigma, **extra_args)`` returns the denoised x for sigma [N]. `x` must already be scaled
by ``sigmas[0]``. The step to a trailing 0 is an Euler step. The lists of noise levels may begin or
end anywhere, and repeat levels. Heun and DPM-Solver-2 without guidance also take rising lists.
Flow-matching models work too if the wrapped model returns the denoised x, as in ComfyUI: pass
``flow=True``. Methods that assume Gaussian modes (Heun's parameter-free form and the modal solver)
then go through `erk_guid.RectifiedFlow`. The others are integrated in t, as ComfyUI does
(`erk_guid.integrations.flow`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from erk_guid.churn import Churn
from erk_guid.denoisers import Denoiser
from erk_guid.guidance import ERKGuidance, Gate, Guidance, make_guidance
from erk_guid.integrations.flow import flow_process
from erk_guid.processes import Process
from erk_guid.sampling import Callback, StepInfo, checked, sample
from erk_guid.solvers import DPM2, Heun, Modal, Solver, name_of

__all__ = ["sample_erk_dpm_2", "sample_erk_heun", "sample_modal"]

Model = Callable[..., Tensor]
StepCallback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def run(
    solver: Solver,
    guidance: Guidance | None,
    process: Process | None,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    churn: Churn | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    trace: Callback | None = None,
) -> Tensor:
    """Sample by any solver of this package, with k-diffusion's model and callback.

    Args:
        solver, guidance, process, churn, randn_like: as of `erk_guid.sample`.
        model, x, sigmas, extra_args, callback, disable: as of `sample_erk_heun`.
        trace: called with the `StepInfo` of each step.

    Raises:
        ValueError: noise levels that rise, for a method that only goes down.
    """
    from tqdm.auto import tqdm

    sigmas = distinct(sigmas)
    if len(sigmas) < 2:
        return x  # as other samplers do where nothing is left to denoise
    denoiser = as_denoiser(model, extra_args)
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def note(info: StepInfo) -> None:
            bar.update()
            if callback is not None:
                sigma = sigmas[info.step]
                callback({
                    "x": info.x_before, "i": info.step, "sigma": sigma,
                    "sigma_hat": sigma * (info.sigma_hat / info.sigma), "denoised": info.denoised,
                })  # fmt: skip
            if trace is not None:
                trace(info)

        if sigmas[-1] > sigmas[0]:
            _check_upwards(solver, guidance, churn, sigmas.tolist())
            return checked(_upwards(solver, denoiser, x, sigmas.tolist(), note))
        return sample(
            denoiser, x, sigmas, solver=solver, guidance=guidance, callback=note, churn=churn,
            process=process, randn_like=randn_like,
        )  # fmt: skip


def as_denoiser(model: Model, extra_args: Mapping[str, Any] | None) -> Denoiser:
    """Return k-diffusion's model as a `Denoiser`."""
    extra = dict(extra_args or {})

    def denoiser(x: Tensor, sigma: Tensor, /) -> Tensor:
        return model(x, sigma * x.new_ones([x.shape[0]]), **extra)

    return denoiser


def distinct(sigmas: Tensor) -> Tensor:
    """Return noise levels without those that repeat the one before, which no step lies between.

    Raises:
        ValueError: they are no list of levels.
    """
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        what = list(sigmas.shape) if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas must be a 1-D tensor, [steps + 1], got {what}")
    levels = sigmas.tolist()
    kept = [i for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
    return sigmas if len(kept) == len(levels) else sigmas[kept]


def _check_upwards(
    solver: Solver, guidance: Guidance | None, churn: Churn | None, levels: list[float]
) -> None:
    """Refuse rising noise levels where the method only goes down.

    Raises:
        ValueError: naming the method, and what goes upwards.
    """
    guided = guidance is not None and guidance.active
    noisy = churn is not None and churn.active
    said = f"sigmas rise from {levels[0]:g} to {levels[-1]:g}, as ComfyUI's FlipSigmas makes them"
    if guided or noisy or solver.noisy or not solver.one_step:
        what = "ERK guidance" if guided else "added noise" if noisy else f"{name_of(solver)!r}"
        raise ValueError(
            f"{said}, and {what} only goes down; Heun and DPM-Solver-2 without guidance "
            "(w_stiff=0, in ComfyUI form 'none') go upwards, too"
        )
    if levels[0] <= 0 or any(s >= t for s, t in pairwise(levels)):
        raise ValueError(f"{said}, but they do not begin above 0 and rise strictly: {levels}")


def _upwards(
    solver: Solver, denoiser: Denoiser, x: Tensor, levels: list[float], note: Callback
) -> Tensor:
    """Integrate from low to high noise; one step's formula holds in both directions."""
    nfe = 0
    steps = solver.steps(levels)
    for i, step in enumerate(steps):
        result, _ = step(denoiser, x, None)
        nfe += result.nfe
        note(
            StepInfo(
                i, len(steps), step.sigma, step.sigma_next, step.sigma, x, result.x,
                result.denoised, None, None, None, nfe,
            )
        )  # fmt: skip
        x = result.x
    return x


def _flow(solver: Solver, guidance: Guidance | None, flow: bool, sigmas: Tensor) -> Process | None:
    """Return the process of a flow-matching model, None for others or in t itself.

    Raises:
        ValueError: `sigmas` are no times.
    """
    if not flow:
        return None
    if len(sigmas) and not 0 <= float(sigmas.min()) <= float(sigmas.max()) <= 1:
        raise ValueError(
            f"with flow=True sigmas are times from 1 to 0, got {float(sigmas.max()):g} to "
            f"{float(sigmas.min()):g}"
        )
    return flow_process(solver, guidance)


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
        sigmas: falling noise levels [steps + 1], ending at 0 or above. A level that repeats the one
            before is left out. Without guidance (w_stiff=0) they may also rise, which integrates
            from data to noise.
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
    solver = Heun()
    process = _flow(solver, guidance, flow, sigmas)
    return run(
        solver, guidance, process, model, x, sigmas, extra_args, callback, disable, churn
    )  # fmt: skip


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
    solver = DPM2()
    process = _flow(solver, guidance, flow, sigmas)
    return run(
        solver, guidance, process, model, x, sigmas, extra_args, callback, disable, churn
    )  # fmt: skip


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
    # Each is asked for once, in order: only a last one, to 0, is not.
    intervals = pairwise(distinct(sigmas))

    def randn_like(x: Tensor) -> Tensor:
        drawn = torch.randn_like(x) if noise_sampler is None else noise_sampler(*next(intervals))
        return s_noise * drawn.to(x)

    noise = float(eta) if isinstance(eta, Tensor) else eta  # as noise levels are
    solver = Modal(order, None if response is None else tuple(response), noise)
    process = _flow(solver, None, flow, sigmas)
    return run(
        solver, None, process, model, x, sigmas, extra_args, callback, disable,
        randn_like=randn_like,
    )  # fmt: skip
