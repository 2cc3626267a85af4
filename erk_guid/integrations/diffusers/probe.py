"""A pipeline's network, guidance and prompts as one denoiser.

A pipeline runs its loop by itself: it calls its network where its scheduler says. So the denoiser
is a scheduler. Its `step` hands the denoised x to another thread, waits there until that one asks
for the next point, and sends the pipeline's loop to it. The loop is the pipeline's own, with
classifier-free guidance and whatever else it does.
"""

from __future__ import annotations

import copy
import inspect
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erk_guid.integrations.diffusers.families import Discrete, Family, Flow, Generators, keep_shift

CALLS = 4096
"""Calls of one run of a pipeline's loop; then another run begins."""


STEPS_AGREE = 1e-3
"""How far two answers to the same call may be apart, as a share of them."""


SECOND = (
    "the pipeline copies its scheduler, to move a second sample beside the first (sound beside a "
    "video, parts of a panorama): its network's answer depends on both, and fit knows the one "
    "alone. for_pipeline works without a fit"
)


class _Ended(BaseException):
    """Leaves a pipeline's loop; not an Exception, which the pipeline may catch."""


class _Point(NamedTuple):
    """Where the network is to be called, or was.

    Attributes:
        x: the sample, in float32.
        t: its time.
        denoised: what the network makes of it; None until it was called.
    """

    x: Tensor
    t: float
    denoised: Tensor | None = None


class _Exchange:
    """What the pipeline's thread and the asking one hand each other."""

    def __init__(self) -> None:
        self.asked: queue.Queue[_Point | None] = queue.Queue()
        self.answered: queue.Queue[_Point | BaseException] = queue.Queue()
        self.again = False
        """Whether a run of the loop begins that follows another one: nobody waits for its start."""
        self.closed = False

    def answer(self, found: _Point) -> _Point:
        """Hand over what was found and return the next point; called by the pipeline's thread."""
        if not self.again:
            self.answered.put(found)
        self.again = False
        following = self.asked.get()
        if following is None:
            self.closed = True
            raise _Ended
        return following


class _Probe(Family):
    """A scheduler that goes where it is asked to."""

    exchange: _Exchange
    first: float
    calls: int

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin at the first level, whatever the pipeline asks for.

        Raises:
            ValueError: the pipeline has made this scheduler itself.
        """
        if not hasattr(self, "exchange"):
            raise ValueError(SECOND)
        self.sigmas = torch.zeros(self.calls + 1)
        if len(self.timesteps) != self.calls or self.timesteps.device != torch.device(
            device or "cpu"
        ):
            self.timesteps = torch.zeros(self.calls, device=device)
        self.num_inference_steps = self.calls
        # Not found by its timestep: Mochi's first is 0, as those are that are not placed yet.
        self._step_index, self._begin_index = None, 0
        self._place(0, self.first)

    def _place(self, index: int, t: float) -> None:
        """Set the level of a call. Loops hold views of `timesteps`, so they see the change."""
        self.sigmas[index] = 1 - t if self.inverted else t
        if index < self.calls:
            self.timesteps[index] = timestep_of(self, t)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        """Begin a run, from `step` or from `scale_model_input`; refuse one in mid-schedule."""
        if self._begin_index != 0 or float(timestep) != float(self.timesteps[0]):
            raise ValueError(
                "the pipeline begins in mid-schedule, from an image with noise: fit needs runs "
                "that begin with noise alone (image to image with strength=1)"
            )
        super()._init_step_index(timestep)  # type: ignore[misc]

    def _move(
        self, x: Tensor, denoised: Tensor, index: int, sample: Tensor, generator: Generators
    ) -> Tensor:
        following = self.exchange.answer(_Point(x, self.time(index), denoised))
        if index + 1 == self.calls:
            self.exchange.asked.put(following)  # for the next run of the loop
            self.exchange.again = True
            raise _Ended
        self._place(index + 1, following.t)
        return following.x

    def _note(self, returned: Tensor) -> None:
        """Nothing: no sample is compared."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied.

        Raises:
            ValueError: always.
        """
        raise ValueError(SECOND)


def timestep_of(scheduler: Any, t: float) -> float:
    """Return what the network is told at a time: noise over signal, or t of a flow."""
    if hasattr(scheduler, "precondition_noise"):
        return float(scheduler.precondition_noise(torch.tensor(t)))
    if isinstance(scheduler, Discrete):
        if scheduler.config.get("timestep_type", "discrete") == "continuous":
            return 0.25 * float(np.log(t))
        kept = scheduler.alphas_cumprod.double()
        known = ((1 - kept) / kept).sqrt().log().numpy()
        found: Any = scheduler._sigma_to_t(np.float64(t), known)  # type: ignore[attr-defined]
        return float(found)
    sigma = 1 - t if scheduler.inverted else t
    return float(sigma * scheduler.config.num_train_timesteps)


class _Session:
    """One run of a pipeline's loop for some prompts, as often as it takes.

    Args:
        run: the loop.
        count: of the prompts.
    """

    def __init__(self, run: Callable[[_Exchange], None], count: int) -> None:
        self._run, self._count, self._copies = run, count, 1
        self._exchange = _Exchange()
        self._thread = threading.Thread(target=self._loop, name="erk_guid pipeline", daemon=True)
        self._thread.start()
        self.start = self._once_each(self._answer())

    def _once_each(self, start: _Point) -> _Point:
        """Return where the loop begins, with each sample once.

        DiT moves a copy of all samples beside them, for classifier-free guidance.

        Raises:
            ValueError: there are more or fewer samples than prompts, and they are no copies.
        """
        x, t, denoised = start
        assert denoised is not None
        once = x[: self._count]
        copies = len(x) // max(len(once), 1)
        if not torch.equal(once.repeat(copies, *[1] * (x.ndim - 1)), x) or len(once) < self._count:
            self.close()
            raise ValueError(
                f"the pipeline moves {len(x)} samples for {self._count} prompts, and fit does not "
                "know which are whose"
            )
        self._copies = copies
        return _Point(once, t, denoised[: self._count])

    def _loop(self) -> None:
        while not self._exchange.closed:
            try:
                self._run(self._exchange)
                raise ValueError(
                    "the pipeline ended its loop by itself: fit needs all of it (leave out of call "
                    "what ends it early, such as denoising_end)"
                )
            except _Ended:
                pass
            except BaseException as error:
                self._exchange.answered.put(error)
                return

    def _answer(self) -> _Point:
        found = self._exchange.answered.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """Return what the pipeline's network, with its guidance, makes of x."""
        self._exchange.asked.put(_Point(x.repeat(self._copies, *[1] * (x.ndim - 1)), t))
        found = self._answer().denoised
        assert found is not None
        return found[: self._count]

    def close(self) -> None:
        """End the loop."""
        self._exchange.asked.put(None)
        self._thread.join()


class PipelineDenoiser:
    """Denoised samples of a pipeline, for `erk_guid.fit`.

    Args:
        pipe: the pipeline. It is copied, without its weights.
        kind: our modal scheduler class of the family of the pipeline's scheduler.
        config: for it.
        arguments: for some rows, what the pipeline is called with.
        first: time at which runs begin.
        steps: `num_inference_steps` that the pipeline is told; guidance may depend on it.
        calls: of one run of the pipeline's loop; by default very many.
    """

    def __init__(
        self,
        pipe: Any,
        kind: type[Family],
        config: Mapping[str, Any],
        arguments: Callable[[Sequence[int]], Mapping[str, Any]],
        first: float,
        steps: int,
        calls: int | None = None,
    ) -> None:
        self._pipe, self._arguments, self._first, self._steps = pipe, arguments, first, steps
        self._config, self._calls = config, CALLS if calls is None else calls
        probe = type(kind.__name__, (_Probe, kind), {})
        self._kind: Any = probe
        self._sessions: dict[tuple[int, ...], _Session] = {}

    def _session(self, rows: tuple[int, ...]) -> _Session:
        if rows not in self._sessions:
            self._sessions[rows] = _Session(lambda exchange: self._run(rows, exchange), len(rows))
        return self._sessions[rows]

    def _run(self, rows: tuple[int, ...], exchange: _Exchange) -> None:
        scheduler = self._kind.from_config(self._config)
        scheduler.exchange, scheduler.first = exchange, self._first
        scheduler.calls = self._calls
        called(self._pipe, scheduler, self._steps, self._arguments(rows))

    def starts(self, rows: Sequence[int]) -> Tensor:
        """Return the samples with which the pipeline begins, [rows, ...], float32."""
        return self._session(tuple(rows)).start.x

    def check_steps(self, longer: PipelineDenoiser, times: Sequence[float]) -> None:
        """Ask the same at every step of one run of the pipeline's loop, and in a longer loop.

        Args:
            longer: the same with other `calls`.
            times: at which it is asked, too.

        Raises:
            ValueError: the answers differ.
        """
        session = self._session((0,))
        x, t, first = session.start
        assert first is not None
        for step in range(1, self._calls):
            apart = float((session.denoised(x, t) - first).norm() / first.norm())
            if apart > STEPS_AGREE:
                raise ValueError(
                    "what the pipeline makes of the same sample at the same time depends on the "
                    f"number of the step (step {step} of {self._calls} is {apart:.2g} from step "
                    "0). A callback, guidance that begins or ends at a part of the run, or random "
                    "numbers do that, and fit asks in another order: leave it out of call"
                )
        other = longer._session((0,))
        for time in times:
            answers = [each.denoised(x, time) for each in (session, other)]
            apart = float((answers[1] - answers[0]).norm() / answers[0].norm())
            if apart > STEPS_AGREE:
                raise ValueError(
                    "what the pipeline makes of the same sample at the same time depends on how "
                    f"many timesteps its scheduler has ({self._calls} or {longer._calls}: "
                    f"{apart:.2g} apart), and fit asks at many: leave out of call what does that"
                )

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the denoised x, like x.

        Args:
            x: [N, ...].
            t: the time, one for all.
            labels: [N, 1], the number of each row.
        """
        rows = tuple(labels[:, 0].long().tolist())
        found = self._session(rows).denoised(x.float(), float(t))
        return found.to(x.dtype)

    def close(self) -> None:
        """End all loops."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def called(pipe: Any, scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> Any:
    """Call a copy of the pipeline with another scheduler; its weights are shared."""
    copied = copy.copy(pipe)
    copied.scheduler = scheduler
    copied.set_progress_bar_config(disable=True)
    return copied(num_inference_steps=steps, output_type="latent", **arguments)


def end_of_run(pipe: Any, scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> Tensor:
    """Return where a pipeline's run ends, [N, ...], in float32 and before it is scaled or decoded.

    Args:
        pipe: the pipeline.
        scheduler: ours, for it. It is not changed.
        steps: `num_inference_steps`.
        arguments: what the pipeline is called with.
    """
    base: Any = type(scheduler)
    found: list[Tensor] = []

    def move(self: Any, *args: Any) -> Tensor:
        moved: Tensor = base._move(self, *args)
        found[:] = [moved]
        return moved

    recorder: Any = type(base.__name__, (base,), {"_move": move})
    made = recorder.from_config(scheduler.config)
    keep_shift(scheduler, made)
    called(pipe, made, steps, arguments)
    if not found:
        raise RuntimeError("the pipeline did not call scheduler.step")
    return found[0].detach().clone()


def usual_times(
    pipe: Any,
    spaced: Any,
    steps: int,
    arguments: Mapping[str, Any],
) -> list[float]:
    """Return the times, above the end, that a pipeline takes by itself for some steps.

    Args:
        pipe: the pipeline.
        spaced: our scheduler for it. It is not changed.
        steps: how many.
        arguments: what the pipeline is called with.
    """
    base: Any = type(spaced)
    found: list[float] = []
    asked = False

    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        base.set_timesteps(self, *args, **options)
        if asked:  # diffusers' own __init__ calls it, too
            if isinstance(self, Flow):
                self.check_told()
            found.extend(dict.fromkeys(self.time(k) for k in range(len(self.timesteps))))
            raise _Ended

    # Pipelines look at the signature to see what they may pass.
    set_timesteps.__signature__ = inspect.signature(base.set_timesteps)  # type: ignore[attr-defined]
    recorder: Any = type(base.__name__, (base,), {"set_timesteps": set_timesteps})
    scheduler = recorder.from_config(spaced.config)
    keep_shift(spaced, scheduler)
    asked = True
    try:
        called(pipe, scheduler, steps, arguments)
    except _Ended:
        return found
    raise RuntimeError("the pipeline did not call scheduler.set_timesteps")
