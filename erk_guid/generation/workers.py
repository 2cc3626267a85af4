"""Processes that take batches from a queue: none waits for another, and none is needed.

What they share is a key-value store (torch.distributed's), which rank 0 or torchrun keeps. Nothing
here is a collective operation. So a slow rank makes fewer batches, a rank may join late, and what
a dead rank had begun is made by another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.process_groups import FAILED, OtherRankError, launched

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds without a sign of life after which a rank is taken for dead."""
BEAT = 1.0
"""Seconds between two signs of life."""
LOST: tuple[type[Exception], ...] = (dist.DistError,) if dist.is_available() else ()
"""What a store raises that has gone."""
JOINING = timedelta(minutes=5)
"""How long a rank looks for the store."""


class Store(Protocol):
    """The part of torch.distributed's stores that is used here; values are bytes."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class _Own:
    """A store for a single process."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def add(self, key: str, amount: int, /) -> int:
        total = int(self._held.get(key, b"0")) + amount
        self._held[key] = str(total).encode()
        return total

    def set(self, key: str, value: Any, /) -> None:
        self._held[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str, /) -> bytes:
        return self._held[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._held for key in keys)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        if self._held.get(key, b"") == expected.encode():
            self._held[key] = desired.encode()
        return self._held.get(key, b"")


@dataclass
class Workers:
    """This process among those that share the work; a single process is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    store: Store = field(default_factory=_Own, repr=False)
    patience: float = PATIENCE
    keeps_store: bool = False
    _agreed: int = field(default=0, init=False, repr=False)

    def agree(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 only, and return its result on every rank.

        Raises:
            ErkGuidError: `function` raised it; on the other ranks an `OtherRankError`.
        """
        key = f"agreed/{self._agreed}"
        self._agreed += 1
        if self.rank == 0:
            try:
                result = function()
            except ErkGuidError as error:
                self.store.set(key, pickle.dumps((None, str(error))))
                raise
            self.store.set(key, pickle.dumps((result, None)))
            return result
        while not self.store.check([key]):
            self.check()
            time.sleep(0.1)
        found, error_text = pickle.loads(self.store.get(key))
        if error_text is not None:
            raise OtherRankError(error_text)
        value: T = found
        return value

    def check(self) -> None:
        """Stop this process if another one has failed, on any node; costs one message.

        Raises:
            OtherRankError: that rank has said why.
        """
        if self.store.check([FAILED]):
            raise OtherRankError(f"rank {self.store.get(FAILED).decode()} failed")

    def queue(self, count: int) -> Queue:
        """Return the queue of `count` batches, which all ranks share; there is one for a job."""
        return Queue(self, count)

    def beat(self) -> None:
        """Give a sign of life."""
        self.store.add(f"beat/{self.rank}", 1)

    def leave(self) -> None:
        """Say goodbye. Whoever keeps the store waits for the others, and for some that may come."""
        self.store.add(f"left/{self.rank}", 1)
        if not self.keeps_store:
            return
        signs = Signs(self)
        others = list(range(1, self.world_size))
        while others := [r for r in others if not self._gone(r, signs)]:
            time.sleep(0.1)

    def _gone(self, rank: int, signs: Signs) -> bool:
        return self.store.check([f"left/{rank}"]) or not signs.alive(rank)


@dataclass
class Signs:
    """Signs of life of the other ranks, as seen from here: by this process's clock."""

    workers: Workers
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def alive(self, rank: int) -> bool:
        """Return whether a rank has shown life within the last `patience` seconds.

        A rank that has shown none yet is given as long from the first question on.
        """
        beats, now = int(self.workers.store.add(f"beat/{rank}", 0)), time.monotonic()
        before, since = self._seen.setdefault(rank, (beats, now))
        if beats != before:
            self._seen[rank] = (beats, now)
            return True
        return now - since < self.workers.patience


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

    def abandoned(self) -> Iterator[int]:
        """Yield batches that dead ranks have left, until all batches are done.

        Call it after `done` of all batches of one's own.
        """
        store, signs = self.workers.store, Signs(self.workers)
        # By the batches themselves: a rank may die between two records of one.
        while not store.check([self._done(index) for index in range(self.count)]):
            self.workers.check()
            alive = [r for r in range(self.workers.world_size) if signs.alive(r)]
            if len(alive) < self.workers.world_size:
                yield from self._retaken(alive)
            time.sleep(0.2)

    def _retaken(self, alive: list[int]) -> Iterator[int]:
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

    A process that leaves by an exception tells the others, on all nodes, and they stop.

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
        keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") != "True"
        made = Workers(rank, world_size, _connected(keeps), patience, keeps)
        stop = threading.Event()
        beating = threading.Thread(target=_beat, args=(made, stop), daemon=True)
        beating.start()
        try:
            yield made
        except BaseException as error:
            with contextlib.suppress(*LOST):  # the store may be gone
                if not isinstance(error, OtherRankError):
                    made.store.set(FAILED, str(rank))
                made.leave()
            raise
        finally:
            stop.set()
            beating.join(timeout=5)  # in the store's code it must not see the process end
        made.leave()
    except LOST as error:
        raise ErkGuidError(
            f"rank {rank} lost the other processes: rank 0 has ended or never began ({error})"
        ) from error


def _beat(made: Workers, stop: threading.Event) -> None:
    with contextlib.suppress(*LOST):  # the main thread will notice
        made.beat()
        while not stop.wait(BEAT):
            made.beat()


_JOBS = itertools.count()
"""Jobs that this process has joined, in the order in which all ranks join them."""


def _connected(keeps: bool) -> Store:
    store = _store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), keeps)
    # A process restarted by torchrun, or its next job, begins with counters of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    made: Store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"erk_guid/generate/{attempt}/{next(_JOBS)}", store
    )
    return made


@functools.cache
def _store(host: str, port: int, keeps: bool) -> Any:
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=keeps, timeout=JOINING, wait_for_workers=False
        )
    except LOST as error:
        if keeps:
            reason = str(error).split(". ")[0]
            raise ErkGuidError(
                f"rank 0 cannot open the port {port} ({reason}); set MASTER_PORT to a free one"
            ) from error
        raise
