"""EDM2's sampler as a front to `erk_guid.sample`, under EDM2's own signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from erk_guid.churn import Churn
from erk_guid.denoisers import ConditionalDenoiser, guided_denoiser
from erk_guid.guidance import ERKGuidance, Guidance
from erk_guid.sampling import Callback, sample
from erk_guid.schedules import RHO, SIGMA_MAX, SIGMA_MIN, edm_sigmas, make_sigmas
from erk_guid.solvers import Solver


def edm_sampler(
    net: ConditionalDenoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    gnet: ConditionalDenoiser | None = None,
    num_steps: int = 32,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    guidance: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = float("inf"),
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    w_stiff: float = 0.0,
    w_con: float = 0.0,
    *,
    solver: str | Solver = "heun",
    erk: Guidance | None = None,
    guidance_interval: tuple[float, float] | None = None,
    callback: Callback | None = None,
    schedule: str | Sequence[float] = "polynomial",
    denoise_to_zero: bool = True,
    afs: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Sample as EDM2's sampler does, with ERK guidance.

    Drops into an EDM2 checkout as its ``sampler_fn``. The keyword-only arguments are those that
    EDM2 does not know, besides `w_stiff` and `w_con`.

    Args:
        net: called as ``net(x, sigma, labels)``.
        noise: unit-variance noise [N, C, H, W].
        labels: one-hot rows [N, label_dim], or None.
        gnet: guiding network, called likewise; needed when `guidance` is not 1.
        num_steps, sigma_min, sigma_max, rho: see `karras_sigmas`.
        guidance: strength of *model* guidance (CFG, autoguidance), see `ModelGuidance`; with 1
            the guiding network is not run.
        S_churn, S_min, S_max, S_noise: noise added before steps, see `Churn`; only where nothing
            guides (w_stiff 0), and with a solver of one step (heun, euler, dpm2).
        randn_like: draws that noise, and the noise of a solver with `eta`.
        dtype: the loop runs in it, and the noise levels are computed in it (`edm_sigmas`), so that
            results are EDM2's own; the networks' output is cast to it.
        w_stiff: strength of `ERKGuidance`. As in the published function only the square counts, so
            a sign changes nothing.
        w_con: stiffness above which it acts. The published function's default is 0, that of the
            command lines, here and there, 0.5. A negative value opens the gate, as 0 does.
        solver: see `sample`.
        erk: guidance as an object, such as ``ParameterFreeGuidance()``, in place of `w_stiff` and
            `w_con`.
        guidance_interval: (low, high) in sigma: model guidance acts there only, and the guiding
            network is not run elsewhere, see `ModelGuidance`.
        callback, afs, check_finite: see `sample`.
        schedule: how the noise levels are spaced, see `make_sigmas`; or the levels themselves,
            falling to above 0: then `num_steps`, `sigma_min`, `sigma_max` and `rho` are not used.
        denoise_to_zero: end with an Euler step to sigma = 0; False stops at the last level.

    Returns:
        The samples, like noise, in `dtype`.

    Raises:
        NonFiniteError: see `sample`.
        ValueError: a value out of range, model guidance without `gnet`, or `erk` beside `w_stiff`
            or `w_con`.
    """
    if isinstance(w_stiff, str):
        raise TypeError(
            f"w_stiff must be a number, got {w_stiff!r}; the parameter-free form is "
            "erk=ParameterFreeGuidance()"
        )
    if erk is not None and (w_stiff or w_con):
        raise ValueError(
            f"erk={erk!r} and w_stiff={w_stiff:g}, w_con={w_con:g} both say how to guide; leave "
            "w_stiff and w_con out"
        )
    if erk is None:
        erk = ERKGuidance(abs(w_stiff), max(w_con, 0.0))
    check_strength(guidance, dtype)
    denoise = guided_denoiser(net, gnet, guidance, guidance_interval)
    sigmas = noise_levels(
        schedule, num_steps, sigma_min, sigma_max, rho, dtype=dtype, device=noise.device
    )
    return sample(
        lambda x, sigma: denoise(x, sigma, labels),
        noise.to(dtype) * sigmas[0].to(device=noise.device, dtype=dtype),
        sigmas if denoise_to_zero else sigmas[:-1],
        solver=solver,
        guidance=erk,
        callback=callback,
        churn=Churn(S_churn, S_min, S_max, S_noise, randn_like),
        afs=afs,
        randn_like=randn_like,
        check_finite=check_finite,
    )


def noise_levels(
    schedule: str | Sequence[float],
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the noise levels of `edm_sampler`, and a trailing 0.

    Args: as there; the loop runs in `dtype` and on `device`.

    Raises:
        ValueError: a value out of range, or levels that `dtype` does not hold.
    """
    if isinstance(schedule, str) and schedule == "polynomial":
        return edm_sigmas(num_steps, sigma_min, sigma_max, rho, dtype=dtype, device=device)
    if isinstance(schedule, str):
        sigmas = make_sigmas(schedule, num_steps, sigma_min, sigma_max, rho)
    else:
        sigmas = torch.tensor([*schedule, 0.0], dtype=torch.float64)
    held = sigmas[:-1].to(dtype)
    if not bool((torch.isfinite(held) & (held > 0)).all()):
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} does not hold the noise levels from "
            f"{float(sigmas[0]):g} to {float(sigmas[-2]):g}; EDM's are 80 to 0.002"
        )
    return sigmas


def check_strength(guidance: float, dtype: torch.dtype) -> None:
    """Refuse a strength of model guidance that the loop cannot compute with.

    Raises:
        ValueError: it is no number, or is larger than `dtype` holds; or that is no floating dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one such as torch.float32, got {dtype!r}")
    largest = torch.finfo(dtype).max
    if not isinstance(guidance, Real) or not abs(guidance) <= largest:
        raise ValueError(
            f"guidance must be a number of at most {largest:g}, which is what "
            f"{str(dtype).removeprefix('torch.')} holds, got {guidance!r}"
        )
