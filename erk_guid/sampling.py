"""The sampling loop: noise levels, a solver's steps, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erk_guid.churn import Churn
from erk_guid.denoisers import Denoiser
from erk_guid.guidance import ERKGuidance, Guidance, Guided
from erk_guid.processes import VE, InSigma, Process, in_sigma
from erk_guid.solvers import (
    AnalyticFirst,
    Memory,
    NoisyStep,
    Solver,
    check_levels,
    make_solver,
    name_of,
    names_of_solvers,
)
from erk_guid.solvers.base import check_floating


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each step. Tensors are the sampler's own: do not edit.

    With a process, x and sigma are the process's own (sigma is a time), stiffness is per unit of
    noise over signal.

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
        gate: per sample, [N] bool, whether rho (or h rho) exceeds w_con; None without a pair, and
            in the parameter-free form, which has no gate.
        correction_size: Euclidean norm of the correction per sample, [N]; None at steps without
            one.
        nfe: calls of the denoiser so far, this step's included.
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
    nfe: int


Callback = Callable[[StepInfo], None]


class NonFiniteError(ValueError):
    """Samples that came out as NaN or infinity.

    Attributes:
        indices: which samples of the batch, from 0.
    """

    def __init__(self, indices: Sequence[int], count: int) -> None:
        self.indices = list(indices)
        shown = ", ".join(map(str, self.indices[:8])) + (", ..." if len(self.indices) > 8 else "")
        super().__init__(
            f"{len(self.indices)} of {count} samples are not finite (number {shown}): x was not to "
            "begin with, the denoiser returned NaN or infinity, or a strength or noise level is "
            "beyond what the dtype holds; a callback can look at each step"
        )


def finite_rows(x: Tensor) -> Tensor:
    """Return which samples of x [N, ...] are finite everywhere, bool [N]; does not wait for it."""
    return torch.isfinite(x).flatten(1).all(1)


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: str | Solver | None = None,
    guidance: Guidance | None = None,
    process: Process | None = None,
    callback: Callback | None = None,
    churn: Churn | None = None,
    afs: bool = False,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    check_finite: bool = True,
) -> Tensor:
    """Integrate the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

    With a solver that adds noise (``Modal(eta=0.5)``) this is the reverse SDE in place of the ODE.

    Args:
        denoiser: called as ``denoiser(x, sigma)``, see `Denoiser`.
        x: where to start, [N, ...] of any floating dtype, already scaled: a draw from the
            prior is ``sigmas[0] * torch.randn(...)``. The loop runs in its dtype and on its
            device.
        sigmas: noise levels, [M >= 2], strictly decreasing. A trailing 0 is reached by an
            Euler step; without one the sampler stops at the last level.
        solver: a solver with its options (`erk_guid.solvers`), or a name for one with its
            defaults: "heun", "euler", "dpm2", "deis", "ipndm", "ipndm_v", "dpmpp", "unipc", "res",
            "modal". None is Heun, EDM's; with another process it is the modal solver, or Heun
            where there is guidance or churn.
        guidance: `ERKGuidance` (the paper), `ParameterFreeGuidance`, or None for the plain solver.
            Costs no evaluation of the denoiser. With ``ERKGuidance(w_stiff=0)`` the result is that
            of the plain solver, bit for bit.
        process: what x is, see `erk_guid.processes`; None for EDM's x = clean + sigma noise. With
            another process `sigmas` are its times, and x, the result and what the denoiser and
            the callback see are as the process has them. From pure noise (t = 1) plain Heun and
            DPM-Solver-2 are poor in sigma, for the first step goes from nearly infinite sigma to
            ten or so: take the modal solver or `ParameterFreeGuidance`, or leave `process` out
            and integrate in t itself.
        callback: called with a `StepInfo` after each step.
        churn: noise to add before steps (euler, heun and dpm2 without guidance), see `Churn`. With
            a process, its S_min and S_max are noise over signal.
        afs: analytical first step: at the first noise level the drift is taken to be
            x / sqrt(1 + sigma^2), which saves an evaluation.
        randn_like: returns standard normal noise shaped like its argument, for a solver with
            `eta`. Called once in each step that adds noise. `churn` has its own.
        check_finite: raise if a sample is NaN or infinite at the end. This waits for the device,
            once. False returns such samples as they are.

    Returns:
        x at ``sigmas[-1]``. A Heun run over N levels and a trailing 0 takes 2 N - 1 evaluations.

    Gradients are recorded as usual: wrap the call in ``torch.no_grad()`` unless they are wanted
    (networks from `erk_guid.load` do not ask for any).

    Raises:
        NonFiniteError: samples came out as NaN or infinity; a `ValueError` with their `indices`.
        ValueError: unusable sigmas, an unknown solver, guidance for a solver without what it
            needs, churn with guidance or for a solver with a memory, a denoiser that returns
            another shape or edits its x, an x that is not floating, noise levels that its dtype
            does not hold.
        TypeError: `guidance` or `solver` is something else, or the denoiser returns something else
            than a tensor of floating-point numbers.
    """
    if guidance is not None and (isinstance(guidance, type) or not isinstance(guidance, Guidance)):
        raise TypeError(
            f"guidance must be an erk_guid.ERKGuidance or another guidance object, e.g. "
            f"ERKGuidance(w_stiff=0.5), got {guidance!r}; for classifier-free guidance or "
            "autoguidance with a strength, wrap the denoisers: ModelGuidance(main, guide, strength)"
        )
    if process is not None and not isinstance(process, Process):
        raise TypeError(f"process must be an object such as RectifiedFlow(), got {process!r}")
    if churn is not None and not isinstance(churn, Churn):
        raise TypeError(f"churn must be an object such as Churn(S_churn=40), got {churn!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a StepInfo, got {callback!r}")
    if not isinstance(afs, bool):
        raise TypeError(f"afs must be True or False, got {afs!r}")
    transformed = process is not None and not isinstance(process, VE)
    if solver is None:
        bare = guidance is None and (churn is None or not churn.active)
        solver = "modal" if transformed and bare else "heun"
    solver = as_solver(solver)
    if guidance is not None:
        guidance.check(solver)
    if churn is not None:
        check_churn(churn, solver, guidance)
    if not isinstance(sigmas, Tensor):
        raise ValueError(
            f"sigmas must be a 1-D tensor of at least two noise levels, got {type(sigmas).__name__}"
        )
    check_floating(x)
    if x.ndim < 2:
        raise ValueError(
            f"x must have dimensions behind the batch's, [N, ...], got {list(x.shape)}"
        )
    if process is not None and transformed:
        problem = in_sigma(denoiser, x, sigmas, process)
        end = sample(
            problem.denoiser, problem.x, problem.sigmas,
            solver=solver, guidance=guidance, churn=churn, afs=afs,
            callback=None if callback is None else _restating(callback, problem, sigmas.tolist()),
            randn_like=randn_like, check_finite=False,
        )  # fmt: skip
        restored = problem.restored(end, float(problem.sigmas[-1])).to(x.dtype)
        return checked(restored) if check_finite else restored
    # One look at the noise levels from the host; after this the loop never waits for the device.
    levels = check_levels(sigmas)
    steps = solver.plan(levels)
    if guidance is not None and not guidance.active and callback is None:
        guidance = None
    elif guidance is None and callback is not None:
        guidance = ERKGuidance(w_stiff=0)  # measures, and corrects nothing

    memory: Memory | None = None
    nfe = 0
    for i, step in enumerate(steps):
        sigma_hat = step.sigma
        gamma = churn.gamma(step.sigma, len(steps), x.dtype) if churn is not None else None
        if churn is not None and gamma is not None:
            x, sigma_hat = churn.add(x, step.sigma, gamma)
            step = solver.plan([sigma_hat, step.sigma_next])[0]
        analytic = afs and i == 0
        where = AnalyticFirst(denoiser, sigma_hat) if analytic else denoiser
        if solver.noisy and isinstance(step, NoisyStep) and step.spread > 0:
            result, memory = step(where, x, memory, randn_like(x))
        else:
            result, memory = step(where, x, memory)
        nfe += result.nfe - analytic
        guided = Guided(result.x) if guidance is None else guidance(result)
        x_before, x = x, guided.x
        if x.shape != x_before.shape:
            raise ValueError(
                f"step {i} of {type(solver).__name__}, or its guidance, turned samples of shape "
                f"{list(x_before.shape)} into {list(x.shape)}"
            )
        if callback is not None:
            callback(
                StepInfo(
                    step=i,
                    num_steps=len(steps),
                    sigma=levels[i],
                    sigma_next=step.sigma_next,
                    sigma_hat=sigma_hat,
                    x_before=x_before,
                    x=x,
                    denoised=result.denoised,
                    stiffness=guided.stiffness,
                    gate=guided.gate,
                    correction_size=guided.size,
                    nfe=nfe,
                )
            )
        # What the next step needs is in the memory; the rest should not live through it.
        del result, guided, x_before
    return checked(x) if check_finite else x


def checked(x: Tensor) -> Tensor:
    """Return x, or raise if a sample of it is not finite; a graph being traced is not looked at."""
    if x.is_meta or torch.compiler.is_compiling():
        return x
    finite = finite_rows(x)
    if not bool(finite.all()):
        raise NonFiniteError((~finite).nonzero().flatten().tolist(), len(x))
    return x


def as_solver(solver: str | Solver) -> Solver:
    """Return the solver that a name stands for, or the solver itself.

    Raises:
        ValueError: there is no solver of that name.
        TypeError: it is neither a name nor a solver.
    """
    if isinstance(solver, str):
        return make_solver(solver)
    if isinstance(solver, type):
        raise TypeError(f"solver is the class {solver.__name__}; make one: {solver.__name__}()")
    if not isinstance(solver, Solver):
        raise TypeError(
            f"solver must be a name or an erk_guid.solvers.Solver, got {type(solver).__name__}"
        )
    return solver


def _restating(callback: Callback, problem: InSigma, times: list[float]) -> Callback:
    """Return a callback for the problem in sigma that tells `callback` of it in the process."""

    def restate(info: StepInfo) -> None:
        size, dtype = info.correction_size, problem.denoiser.dtype
        end = float(problem.sigmas[info.step + 1])
        moved = info.sigma_hat != info.sigma
        callback(
            replace(
                info,
                sigma=times[info.step],
                sigma_next=times[info.step + 1],
                sigma_hat=max(problem.process.time(info.sigma_hat), times[info.step])
                if moved
                else times[info.step],
                x_before=problem.restored(info.x_before, info.sigma_hat).to(dtype),
                x=problem.restored(info.x, end).to(dtype),
                denoised=info.denoised.to(dtype),
                correction_size=None if size is None else problem.restored(size, end),
            )
        )

    return restate


def check_churn(churn: Churn, solver: Solver, guidance: Guidance | None) -> None:
    """Refuse added noise where something remembers what was before it.

    Raises:
        ValueError: with guidance, or a solver with a memory.
    """
    if not churn.active:
        return
    if guidance is not None and guidance.active:
        raise ValueError(
            f"S_churn must be 0 with ERK guidance, got {churn.S_churn}: guidance compares two "
            "solutions at one noise level, and churn moves one of them to another; leave one of "
            "the two out (w_stiff=0 is the solver without guidance)"
        )
    if not solver.one_step:
        raise ValueError(
            f"S_churn must be 0 with the solver {name_of(solver)!r}, got {churn.S_churn}: it "
            "remembers evaluations at points that the added noise leaves; solvers that churn goes "
            f"with: {', '.join(names_of_solvers(one_step=True))}"
        )
