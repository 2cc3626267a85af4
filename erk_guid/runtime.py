"""Where the work runs: devices, processes, and one random stream per seed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from erk_guid.errors import ErkGuidError

T = TypeVar("T")


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one present (cuda, mps, cpu).

    Under torchrun a plain "cuda" means the GPU of this process's LOCAL_RANK.

    Raises:
        ErkGuidError: no such device here; the message says which there are.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    here = ", ".join(kind for kind, there in present.items() if there)
    try:
        device = torch.device(name or next(kind for kind, there in present.items() if there))
    except RuntimeError as error:
        raise ErkGuidError(f"unknown device {name!r}; present: {here}") from error
    if not present.get(device.type, False):
        raise ErkGuidError(f"device {name!r} is not present here; use one of: {here}")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ErkGuidError(
                f"device {device} does not exist: {torch.cuda.device_count()} CUDA devices are "
                "visible (with torchrun, start no more processes per node than that)"
            )
    return device


class OtherRankError(ErkGuidError):
    """Rank 0 failed and has said why; this process has only to stop."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that share the work; a lone process is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1

    def agree(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; it runs there alone.

        Raises:
            ErkGuidError: `function` raised it; on the other ranks an `OtherRankError`.
        """
        if self.world_size == 1:
            return function()
        answer: list[Any] = [None, None]
        failure: ErkGuidError | None = None
        if self.rank == 0:
            try:
                answer[0] = function()
            except ErkGuidError as error:
                failure, answer[1] = error, str(error)
        dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise OtherRankError(answer[1])
        return answer[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values or []


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; a lone process joins nothing.

    NCCL carries what lies on CUDA devices, Gloo everything else. A process that leaves by an
    exception does not wait for the others: torchrun stops them.

    Raises:
        ErkGuidError: the launcher's environment variables are incomplete.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield ProcessGroup()
        return
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise ErkGuidError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks meet only to begin and at the end: one may wait long for a slower one, or for rank 0's
    # download. A rank that dies is noticed by torchrun and by its closed connection, not by this.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2)
    )
    yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    # Not in a finally: after a failure there is nobody left to say goodbye to.
    dist.destroy_process_group()


class SeededNoise:
    """One random stream per image, so that an image depends on its seed and nothing else.

    Seed k draws from ``torch.Generator(device).manual_seed(k mod 2^32)``, as in EDM2: the first
    draw is the noise, the second (for a conditional network) the class.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [
            torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds
        ]
        self._device = device

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise, [seeds, *shape]."""
        return torch.stack(
            [
                torch.randn(list(shape), generator=g, dtype=dtype, device=self._device)
                for g in self._generators
            ]
        )

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise like `x` [seeds, ...]."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> Tensor:
        """Whole numbers in [0, high), [seeds]."""
        return torch.stack(
            [
                torch.randint(high, size=[], generator=g, device=self._device)
                for g in self._generators
            ]
        )
