"""Let several processes share the work: those that torchrun started, or a single one."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, printable

T = TypeVar("T")


def launched() -> tuple[int, int] | None:
    """Return the rank and number of processes that torchrun started, None for a single one.

    Raises:
        ErkGuidError: its environment variables are incomplete, or are not what they should be.
    """
    world_size = _number("WORLD_SIZE", 1, 1, 1 << 20)
    if world_size == 1:
        return None
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise ErkGuidError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set")
    _number("MASTER_PORT", 0, 1, 65535)
    return _number("RANK", 0, 0, world_size - 1), world_size


def launched_rank() -> int:
    """Return the rank that torchrun gave this process, 0 for a single one."""
    return _number("RANK", 0, 0, 1 << 20)


def _number(name: str, default: int, low: int, high: int) -> int:
    """Return a whole number that the launcher put into the environment."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
        raise ErkGuidError(
            f"the environment variable {name} is {printable(text, 40)!r}, not a whole number from "
            f"{low} to {high}: torchrun sets it; without torchrun, unset it"
        )
    return int(text)


FAILED, ARRIVED = "erk_guid/failed", "erk_guid/arrived"
"""Keys of the store that all processes share."""


class OtherRankError(ErkGuidError):
    """Another rank failed and has said why; this process only has to stop."""


class Agreeing(Protocol):
    """Processes of which rank 0 can do something for all."""

    def agree(self, function: Callable[[], T], /) -> T:
        """Run `function` on rank 0 only, and return its result on every rank."""
        ...


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that share the work; a single process is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    store: Any = field(default=None, repr=False)
    control: Any = field(default=None, repr=False)

    def agree(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 only, and return its result on every rank.

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
        with self._translating():
            dist.broadcast_object_list(answer, src=0, group=self.control)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise OtherRankError(answer[1])
        return answer[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on rank 0; an empty list on the others.

        Waits for the slowest rank, or until another one fails.
        """
        if self.world_size == 1:
            return [value]
        self._arrive()
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        with self._translating():
            dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of every rank's `tensor` (on the CPU) on every rank; waits as `gather`."""
        if self.world_size > 1:
            self._arrive()
            with self._translating():
                dist.all_reduce(tensor, group=self.control)
        return tensor

    def _arrive(self) -> None:
        """Wait until every rank is here, or until one fails."""
        assert self.store is not None
        number = int(self.store.add(ARRIVED, 1))
        everyone = -(-number // self.world_size) * self.world_size  # of this round of arrivals
        while int(self.store.add(ARRIVED, 0)) < everyone:
            self.check()
            time.sleep(0.2)

    def check(self) -> None:
        """Stop this process if another one has failed, on any node; costs one message.

        Raises:
            OtherRankError: that rank has said why.
        """
        if self.store is not None and self.store.check([FAILED]):
            raise OtherRankError(f"rank {self.store.get(FAILED).decode()} failed")

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Report a broken connection as a process that has ended."""
        try:
            yield
        except RuntimeError as error:
            self.check()
            raise ErkGuidError(f"rank {self.rank} lost the other processes: {error}") from error


def current_group() -> ProcessGroup:
    """Return the process group that the user's script has set up, or a single process.

    Raises:
        ErkGuidError: torchrun started several processes, and no group was set up.
    """
    if not (dist.is_available() and dist.is_initialized()):
        count = os.environ.get("WORLD_SIZE", "1")
        if count != "1":
            raise ErkGuidError(
                f"{count} processes were started, and know nothing of each other: call "
                "torch.distributed.init_process_group first"
            )
        return ProcessGroup()
    if dist.get_world_size() == 1:
        return ProcessGroup()
    store = dist.distributed_c10d._get_default_store()
    return ProcessGroup(
        dist.get_rank(), dist.get_world_size(), store, _control_beside(dist.group.WORLD)
    )


_CONTROLS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Control groups by the user's group. They end with it: Gloo's threads must not outlive it."""


def _control_beside(world: Any) -> Any:
    """Return a Gloo group with the processes of `world`; every call returns the same one."""
    if world not in _CONTROLS:
        _CONTROLS[world] = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    return _CONTROLS[world]


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; a single process joins nothing.

    NCCL serves tensors on CUDA devices, Gloo everything else. A process that leaves by an
    exception tells the others, on all nodes, and does not wait for them.

    Raises:
        ErkGuidError: the launcher's environment variables are incomplete.
    """
    if launched() is None:
        yield ProcessGroup()
        return
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    # Joining has the usual time limit. After that a rank may wait long for another's download or
    # share: the store, not a timeout, reports that a rank failed.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    try:
        yield ProcessGroup(rank, dist.get_world_size(), store, control)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the store may be gone with rank 0
            store.set(FAILED, str(rank))
        raise
    # Not in a finally: after a failure no other process may be left.
    dist.destroy_process_group()
