"""The other processes of a job: how they are reached, and whether they are alive.

They share a key-value store (torch.distributed's), which rank 0 or torchrun keeps. Every process
gives signs of life in it. So nobody waits for a process that was killed, stopped, or never began.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist

from erk_guid._parent import is_orphaned
from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.generation.identity import identity, is_here, lives

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds without a sign of life after which a rank is taken for dead."""
BEAT = 1.0
"""Seconds between two signs of life."""
RANK_TIMEOUT = 600.0
"""Seconds without progress after which a rank ends itself."""
JOINING = timedelta(minutes=5)
"""How long a rank looks for the store, and for what others must have put there."""
LOST: tuple[type[Exception], ...] = (dist.DistError,) if dist.is_available() else ()
"""What a store raises that has gone."""
NOTHING = "nothing"
"""What a message says of an option that a rank was not given."""
FAILED = "erk_guid/failed"
"""Key of the store: the rank that failed."""


class OtherRankError(ErkGuidError):
    """Another rank failed and has said why; this process only has to stop."""


class LeavingError(ErkGuidError):
    """This rank leaves and has not failed; the others go on, unless it is rank 0."""


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
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0  # a RANK alone is somebody else's
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


class Store(Protocol):
    """The part of torch.distributed's stores that is used here; values are bytes."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: Any, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class OwnStore:
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


_JOBS = itertools.count()
"""Jobs that this process has joined, in the order in which all ranks join them."""


class Connection(NamedTuple):
    """A job's place in the store.

    Attributes:
        store: where its keys are its own.
        keeps_store: this process keeps the store.
        place: what its keys begin with.
    """

    store: Store
    keeps_store: bool
    place: str

    def another(self) -> Store:
        """Return a store with keys of its own, over a connection of its own.

        A call that waits for a key lets no other call through its connection.
        """
        return _placed(f"{self.place}/another", _store.__wrapped__(False))


def connected(rank: int) -> Connection:
    """Connect the next job to the store.

    Raises:
        ErkGuidError: its port cannot be opened.
        LOST: nobody keeps it.
    """
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") != "True"
    # A process restarted by torchrun, or its next job, begins with counters of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = f"erk_guid/{attempt}/{next(_JOBS)}"
    return Connection(_placed(place, _store(keeps)), keeps, place)


def _placed(place: str, store: Any) -> Store:
    made: Store = dist.PrefixStore(place, store)  # type: ignore[attr-defined]
    return made


def beside(store: Any) -> Store:
    """Return a place for a job in a store that others keep and use."""
    return _placed(f"erk_guid/beside/{next(_JOBS)}", store)


@functools.cache
def _store(keeps: bool) -> Any:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not keeps:
        _wait_for_port(host, port)
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=keeps, timeout=JOINING, wait_for_workers=False
        )
    except RuntimeError as error:  # LOST is of this kind; torch 2.4 gives a port in use no other
        if keeps:
            reason = str(error).split(". ")[0]
            raise ErkGuidError(
                f"rank 0 cannot open the port {port} ({reason}); set MASTER_PORT to a free one"
            ) from error
        raise


def _wait_for_port(host: str, port: int) -> None:
    """Wait until somebody listens; the store would print pages of C++ frames if nobody does.

    Raises:
        ErkGuidError: nobody does, for `JOINING`.
    """
    until = time.monotonic() + JOINING.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ErkGuidError(
                    f"nobody answers at {printable(host, 80)}:{port} (MASTER_ADDR, MASTER_PORT) "
                    f"within {JOINING.total_seconds() / 60:g} minutes: rank 0 has ended or never "
                    f"began ({error.strerror or error})"
                ) from error
            time.sleep(0.2)


@dataclass
class Signs:
    """Signs of life of the ranks, as seen from here: by this process's clock.

    Attributes:
        store: where they give them.
        patience: seconds without one after which a rank is taken for dead.
    """

    store: Store = field(repr=False)
    patience: float = PATIENCE
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict, init=False, repr=False)
    _told: set[int] = field(default_factory=set, init=False, repr=False)

    def alive(self, rank: int) -> bool:
        """Return whether a rank has shown life within the last `patience` seconds.

        A rank that has shown none yet is given as long from the first question on.
        """
        return self._silent(rank)[1] < self.patience

    def may_come(self, rank: int) -> bool:
        """Return whether a rank is alive, or may still join: it is given `JOINING` for that."""
        beats, silent = self._silent(rank)
        return silent < (self.patience if beats else JOINING.total_seconds())

    def _silent(self, rank: int) -> tuple[int, float]:
        """Return how often a rank has shown life, and for how many seconds it has shown none."""
        beats, now = int(self.store.add(f"beat/{rank}", 0)), time.monotonic()
        before, since = self._seen.setdefault(rank, (beats, now))
        if beats != before:
            self._seen[rank] = (beats, now)
            return beats, 0.0
        return beats, now - since

    def left(self, rank: int) -> bool:
        """Return whether a rank has said goodbye."""
        return self.store.check([f"left/{rank}"])

    def silence(self, rank: int) -> str:
        """Return the line about a rank that is not alive, or never came."""
        beats, silent = self._silent(rank)
        if beats:
            return f"rank {rank} gave no sign of life for {self.patience:g} seconds"
        return f"rank {rank} has not joined within {silent:.0f} seconds"

    def tell(self, rank: int, more: str) -> None:
        """Print the line about a rank that is not alive, once."""
        if rank not in self._told:
            self._told.add(rank)
            print(f"Note: {self.silence(rank)}: {more}", file=sys.stderr)

    def end(self, rank: int) -> None:
        """Kill a rank that is not alive, if it is on this machine: nobody could wait for it."""
        if self.left(rank) or self.alive(rank) or not self.store.check([f"who/{rank}"]):
            return
        found = json.loads(self.store.get(f"who/{rank}"))
        if is_here(found) and lives(found):
            print(f"Note: rank {rank} still stands still, and is killed", file=sys.stderr)
            with contextlib.suppress(OSError):
                os.kill(found["pid"], signal.SIGKILL)

    def end_at_exit(self, rank: int) -> None:
        """Do `end` when this process ends: torchrun answers a killed rank by ending the others."""

        def end() -> None:
            with contextlib.suppress(*LOST):
                self.end(rank)

        atexit.register(end)


@contextlib.contextmanager
def showing_life(store: Store, rank: int, patience: float) -> Iterator[None]:
    """Give signs of life in the block, and say who this rank is.

    It ends the process when the store does not answer for `patience` seconds: who keeps it stands
    still, and no call of the main thread would return.
    """
    store.set(f"who/{rank}", json.dumps(identity()))
    stop = threading.Event()
    silent = f"rank {rank} ends: who keeps the store, rank 0 or torchrun, has not answered for"

    def beat() -> None:
        with contextlib.suppress(*LOST):  # the main thread will notice
            store.add(f"beat/{rank}", 1)
            while not stop.wait(BEAT):
                store.add(f"beat/{rank}", 1)
                answered()

    thread = threading.Thread(target=beat, daemon=True)
    with _ending_without_progress(patience, f"{silent} {patience:g} seconds") as answered:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)  # in the store's code it must not see the process end


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def ending_with_launcher(rank: int) -> Iterator[None]:
    """End this process when torchrun, which started it, is gone: nobody else would."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(BEAT):
            if is_orphaned():
                end_process(f"rank {rank} ends: torchrun, which started it, is gone")

    if not _by_torchrun():
        yield
        return
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


@contextlib.contextmanager
def watched(rank: int, timeout: float) -> Iterator[Callable[[], None]]:
    """End this process if it hangs in the block; give a function to call on progress.

    Args:
        rank: of this process.
        timeout: seconds without progress; 0 for no watch.
    """
    others = "the others make its batches"
    if _by_torchrun():
        others = "torchrun ends the others, too; --resume goes on"
    line = (
        f"rank {rank} made no progress for {timeout:g} seconds (a device, file system or network "
        f"that hangs?): it ends, and {others}. --rank-timeout sets the time"
    )
    with _ending_without_progress(timeout, line) as progress:
        yield progress


@contextlib.contextmanager
def _ending_without_progress(timeout: float, line: str) -> Iterator[Callable[[], None]]:
    """End this process with a line, unless the function that is given is called again and again.

    Time in which the whole process stands still (SIGSTOP, a sleeping computer) does not count.
    """
    idle, stop = [0.0], threading.Event()
    pause = min(BEAT, timeout / 4)

    def watch() -> None:
        before = time.monotonic()
        while not stop.wait(pause):
            now = time.monotonic()
            idle[0] += min(now - before, 2 * pause)
            before = now
            if idle[0] > timeout:
                end_process(line)

    def progress() -> None:
        idle[0] = 0.0

    if not timeout:
        yield progress
        return
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield progress
    finally:
        stop.set()


def end_process(line: str) -> None:
    """Print a line and end the process, whatever its main thread waits for."""
    os.write(2, f"Error: {line}\n".encode())
    os._exit(1)


@dataclass
class Peers:
    """This process among those of a job; a single process is rank 0 of 1.

    Attributes:
        rank, world_size: which of how many.
        store: what they share.
        signs: their signs of life; None where nobody gives them.
        keeps_store: this process keeps the store, and ends last.
    """

    rank: int = 0
    world_size: int = 1
    store: Store = field(default_factory=OwnStore, repr=False)
    signs: Signs | None = field(default=None, repr=False)
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
            self.check(0)
            time.sleep(0.1)
        found, error_text = pickle.loads(self.store.get(key))
        if error_text is not None:
            raise OtherRankError(error_text)
        value: T = found
        return value

    def check_alike(self, given: Mapping[str, object]) -> None:
        """Refuse to share work with a process that was given something else; every rank calls it.

        Args:
            given: what the work depends on, in JSON's types.

        Raises:
            ErkGuidError: rank 0 was given something else; the message names what.
        """
        mine = {name: json.dumps(value, sort_keys=True) for name, value in given.items()}
        first = self.agree(lambda: mine)
        apart = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
        if apart:
            what = "; ".join(
                f"{name} is {printable(first.get(name, NOTHING), 60)} there, "
                f"{printable(mine.get(name, NOTHING), 60)} here"
                for name in apart
            )
            raise ErkGuidError(
                f"rank {self.rank} was not given what rank 0 was given: {what}. Start all "
                "processes with the same options"
            )

    def check(self, *needed: int) -> None:
        """Stop this process if another one has failed, on any node; costs one message.

        Args:
            needed: ranks that must be alive.

        Raises:
            OtherRankError: that rank has said why.
            ErkGuidError: a rank that is needed gives no sign of life, or never joined.
        """
        if self.store.check([FAILED]):
            raise OtherRankError(f"rank {self.store.get(FAILED).decode()} failed")
        for rank in needed:
            if self.signs is not None and rank != self.rank and not self.signs.may_come(rank):
                raise ErkGuidError(f"rank {self.rank} ends: {self.signs.silence(rank)}")

    def say_goodbye(self) -> None:
        """Tell the others that this process needs them no more, and does nothing for them."""
        self.store.add(f"left/{self.rank}", 1)

    def see_off(self, ranks: Iterable[int], longest: float = math.inf) -> set[int]:
        """Wait until ranks have said goodbye, and return those that give no sign of life.

        Args:
            ranks: which.
            longest: seconds to wait at most.
        """
        others, silent, until = set(ranks), set[int](), time.monotonic() + longest
        assert self.signs is not None
        while others and time.monotonic() < until:
            others = {rank for rank in others if not self.signs.left(rank)}
            silent |= {rank for rank in others if not self.signs.alive(rank)}
            others -= silent
            time.sleep(0.1)
        return silent


class Agreeing(Protocol):
    """Processes of which rank 0 can do something for all."""

    def agree(self, function: Callable[[], T], /) -> T:
        """Run `function` on rank 0 only, and return its result on every rank."""
        ...


@contextlib.contextmanager
def reporting(store: Store, rank: int, needed: bool) -> Iterator[None]:
    """Tell the others, on all nodes, if the block fails.

    Args:
        store: where.
        rank: of this process.
        needed: the others cannot go on if this rank only leaves (because of a signal).
    """
    try:
        yield
    except OtherRankError:
        raise
    except BaseException as error:
        if needed or not isinstance(error, (LeavingError, KeyboardInterrupt)):
            with contextlib.suppress(*LOST):  # the store may be gone
                store.set(FAILED, str(rank))
        raise
