"""Processes that take batches from a queue: none waits for another, and none is needed.

Nothing here is a collective operation. So a slow rank makes fewer batches, a rank may join late,
and what a dead rank had begun is made by another.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.peers import (
    LOST,
    PATIENCE,
    Peers,
    Signs,
    connected,
    ending_with_launcher,
    launched,
    reporting,
    showing_life,
)


@dataclass
class Workers(Peers):
    """This process among those that share the work; a single process is rank 0 of 1."""

    def queue(self, count: int) -> Queue:
        """Return the queue of `count` batches, which all ranks share; there is one for a job."""
        return Queue(self, count)

    def leave(self, finished: bool) -> None:
        """Say goodbye. Rank 0 ends last, if it keeps the store or all is done.

        Args:
            finished: all is done. Who gives no sign of life then is killed if it is on this
                machine, or torchrun would wait for it. (torchrun's exit code is 1 then.)

        Raises:
            ErkGuidError: rank 0, which completes the work, fails or gives no sign of life.
        """
        try:
            if finished and self.rank:
                self._see_off_rank_0()
        finally:
            self.say_goodbye()
        if self.rank or self.signs is None or not (finished or self.keeps_store):
            return
        silent = self.see_off(range(1, self.world_size))
        for rank in silent if finished else ():
            self.signs.end_at_exit(rank)

    def _see_off_rank_0(self) -> None:
        while not self.store.check(["left/0"]):
            if self.signs is not None and not self.signs.may_come(0):
                self.signs.end_at_exit(0)
            self.check(0)
            time.sleep(0.1)


@dataclass
class Queue:
    """Batches 0 to count - 1. Every rank takes the next one; those of a dead rank are retaken."""

    workers: Workers
    count: int

    def fresh(self) -> Iterator[int]:
        """Yield batches that nobody has taken, until there are none."""
        store = self.workers.store
        while True:
            self.workers.check()
            index = int(store.add("next", 1)) - 1
            if index >= self.count:
                return
            store.set(self._owner(index), str(self.workers.rank))
            yield index

    def abandoned(self, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Yield batches that dead ranks have left, until all batches are done.

        Call it after `done` of all batches of one's own.

        Args:
            waiting: is called again and again while this rank waits.
        """
        store = self.workers.store
        # By the batches themselves: a rank may die between two records of one.
        while not store.check([self._done(index) for index in range(self.count)]):
            self.workers.check()
            waiting()
            alive = self._at_work()
            if len(alive) < self.workers.world_size:
                yield from self._retaken(alive)
            time.sleep(0.2)

    def _at_work(self) -> set[int]:
        """Return the ranks that are alive and have not left; tell of those that are not."""
        ranks, signs = range(self.workers.world_size), self.workers.signs
        if signs is None:
            return set(ranks)
        staying = [rank for rank in ranks if not signs.left(rank)]
        alive = {r for r in staying if r == self.workers.rank or signs.alive(r)}
        if self.workers.rank == min(alive, default=0):
            for rank in set(staying) - alive:
                signs.tell(rank, "its batches are made by the others")
        return alive

    def _retaken(self, alive: set[int]) -> Iterator[int]:
        store = self.workers.store
        mine = str(self.workers.rank)
        for index in range(self.count):
            if store.check([self._done(index)]):
                continue
            # Between taking a batch and signing it a rank may have died, too.
            signed = store.check([self._owner(index)])
            owner = store.get(self._owner(index)).decode() if signed else ""
            if owner and int(owner) in alive:
                continue
            if store.compare_set(self._owner(index), owner, mine).decode() == mine:
                yield index

    def done(self, index: int, images: int, notes: Any = None) -> None:
        """Record a batch whose files are written, with what rank 0 shall know of it."""
        store = self.workers.store
        if notes is not None:
            store.set(f"notes/{index}", pickle.dumps(notes))
        if int(store.add(self._done(index), 1)) > 1:
            return  # twice: by a rank that was slow, and by the one that took it for dead
        store.add("images", images)

    def made(self) -> int:
        """Return how many images all ranks have made so far."""
        return int(self.workers.store.add("images", 0))

    def notes(self) -> list[Any]:
        """Return what `done` was told of the batches, in their order."""
        store = self.workers.store
        keys = [f"notes/{index}" for index in range(self.count)]
        return [pickle.loads(store.get(key)) for key in keys if store.check([key])]

    @staticmethod
    def _owner(index: int) -> str:
        return f"owner/{index}"

    @staticmethod
    def _done(index: int) -> str:
        return f"done/{index}"


@contextlib.contextmanager
def workers(patience: float = PATIENCE) -> Iterator[Workers]:
    """Join the processes that torchrun (or a launcher like it) started; a single one joins nothing.

    A process that leaves by an exception tells the others, on all nodes, and they stop. One that
    only leaves (`LeavingError`, KeyboardInterrupt) is done without, unless it is rank 0.

    Args:
        patience: seconds without a sign of life after which a rank is taken for dead.

    Raises:
        ErkGuidError: the launcher's environment variables are incomplete, the store cannot be
            reached, or it was lost because its process ended.
    """
    found = launched()
    if found is None:
        yield Workers()
        return
    rank, world_size = found
    try:
        with ending_with_launcher(rank):
            store, keeps, _ = connected(rank)
            made = Workers(rank, world_size, store, Signs(store, patience), keeps)
            with showing_life(store, rank, patience):
                try:
                    with reporting(store, rank, needed=rank == 0):
                        yield made
                except BaseException:
                    with contextlib.suppress(*LOST):
                        made.leave(finished=False)
                    raise
                made.leave(finished=True)
    except LOST as error:
        raise ErkGuidError(
            f"rank {rank} lost the other processes: rank 0, or torchrun, has ended or never began "
            f"({error})"
        ) from error
