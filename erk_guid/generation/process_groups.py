"""Processes that score together: they add up statistics by collective operations."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.peers import (
    BEAT,
    JOINING,
    LOST,
    PATIENCE,
    Peers,
    Signs,
    beside,
    connected,
    end_process,
    ending_with_launcher,
    launched,
    reporting,
    showing_life,
)

T = TypeVar("T")

ARRIVED = "erk_guid/arrived"
"""Key of the store: how often processes have come to a collective operation."""
FOREVER = timedelta(days=2)
"""Time limit of collective operations: the store, and no time limit, tells who failed."""


@dataclass
class ProcessGroup(Peers):
    """This process among those that share the work; a single process is rank 0 of 1.

    Attributes:
        control: Gloo group of all processes; None for a single one.
    """

    control: Any = field(default=None, repr=False)

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
        """Wait until every rank is here, or until one fails or gives no sign of life."""
        number = int(self.store.add(ARRIVED, 1))
        everyone = -(-number // self.world_size) * self.world_size  # of this round of arrivals
        while int(self.store.add(ARRIVED, 0)) < everyone:
            self.check(*range(self.world_size))
            time.sleep(0.2)

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        """Report a broken connection as a process that has ended."""
        try:
            with self._watching():
                yield
        except RuntimeError as error:
            self.check()
            raise ErkGuidError(f"rank {self.rank} lost the other processes: {error}") from error

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """End this process if a rank falls silent in the block: Gloo would wait for it."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(BEAT):
                try:
                    self.check(*range(self.world_size))
                except LOST:
                    return  # Gloo loses that rank, too
                except ErkGuidError as error:
                    end_process(str(error))

        if self.signs is None:
            yield
            return
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def leave(self) -> None:
        """Say goodbye. Who keeps the store lets the others read it first, for a while."""
        self.say_goodbye()
        if self.keeps_store and self.signs is not None:
            self.see_off(range(1, self.world_size), longest=self.signs.patience)


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
    return _group_beside(dist.group.WORLD)


_GROUPS: WeakKeyDictionary[Any, ProcessGroup] = WeakKeyDictionary()
"""Our groups by the user's group. They end with it: Gloo's threads must not outlive it."""


def _group_beside(world: Any) -> ProcessGroup:
    """Return a group with the processes of `world`; every call returns the same one."""
    if world not in _GROUPS:
        _GROUPS[world] = ProcessGroup(
            dist.get_rank(),
            dist.get_world_size(),
            beside(dist.distributed_c10d._get_default_store()),
            control=dist.new_group(backend="gloo", timeout=FOREVER),
        )
    return _GROUPS[world]


@contextlib.contextmanager
def process_group(device: torch.device, patience: float = PATIENCE) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; a single process joins nothing.

    NCCL serves tensors on CUDA devices, Gloo everything else. A process that leaves by an
    exception tells the others, on all nodes, and does not wait for them.

    Args:
        device: of this process.
        patience: seconds without a sign of life after which a rank is taken for dead.

    Raises:
        ErkGuidError: the launcher's environment variables are incomplete, the others cannot be
            reached, or one of them is dead.
    """
    found = launched()
    if found is None:
        yield ProcessGroup()
        return
    rank, world_size = found
    with ending_with_launcher(rank):
        try:
            connection = connected(rank)
            store = connection.store
            signs = Signs(store, patience)
            group = ProcessGroup(rank, world_size, store, signs, connection.keeps_store)
            with showing_life(store, rank, patience):
                try:
                    with reporting(store, rank, needed=True):
                        group.control = _joined(device, connection.another(), rank, world_size)
                        yield group
                        # Not in a finally: after a failure no other process may be left.
                        dist.destroy_process_group()
                finally:
                    with contextlib.suppress(*LOST):
                        group.leave()
        except LOST as error:
            raise ErkGuidError(f"rank {rank} lost the other processes ({error})") from error


def _joined(device: torch.device, store: Any, rank: int, world_size: int) -> Any:
    """Join torch.distributed's group, and return a Gloo group of all processes."""
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
        )
        return dist.new_group(backend="gloo", timeout=FOREVER)
    except RuntimeError as error:
        minutes = JOINING.total_seconds() / 60
        raise ErkGuidError(
            f"rank {rank}: not all of {world_size} processes joined within {minutes:g} minutes: "
            f"{str(error).splitlines()[0]}"
        ) from error
