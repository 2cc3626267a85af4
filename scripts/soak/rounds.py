"""One round of a scenario: what it runs, kills and finds, told as it happens."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from scripts.soak import checks
from scripts.soak.jobs import Job, References, drawn
from scripts.soak.programs import Ended, Process, Program

LONGEST = 6.0
"""Seconds after a process began within which it is struck, if the time alone decides."""
LIVES = 40
"""Processes of one job after which the next one is left in peace."""
DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""What is drawn from: half of the kills leave no time for anything."""


NOTHING: Mapping[str, str] = MappingProxyType({})


class AbortedError(Exception):
    """The whole attack is being ended."""


class UnavailableError(Exception):
    """A fault that cannot be made on this machine."""


@dataclass
class Outcome:
    """What came of the rounds of a scenario.

    Attributes:
        kills: signals by name.
        rounding: images that differ from the undisturbed ones by one level.
        findings: with the numbers of the rounds.
        notes: faults that could not be tried, and why.
    """

    rounds: int = 0
    processes: int = 0
    images: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    rounding: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "kills": dict(self.kills), "notes": dict(self.notes)}


@dataclass
class Budget:
    """When the attack ends; shared by all rounds.

    Attributes:
        until: by the monotonic clock.
        kills: after so many; None for no such end.
        aborted: no process may be begun any more.
    """

    until: float
    kills: int | None = None
    spent: int = 0
    aborted: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def over(self) -> bool:
        """Return whether jobs shall only be finished now."""
        enough = self.kills is not None and self.spent >= self.kills
        return enough or time.monotonic() > self.until

    def spend(self) -> None:
        """Count a kill."""
        with self._lock:
            self.spent += 1


@dataclass
class Round:
    """A round of a scenario: it depends on its number and the seed, and on the machine's pace.

    Attributes:
        seeds: of a job, at most.
        lives: processes of a job before it is left in peace.
        told: is given a line for each event.
    """

    number: int
    rng: Random
    folder: Path
    program: Program
    references: References
    budget: Budget
    outcome: Outcome
    seeds: int
    lives: int
    told: Callable[[str], None]
    _begun: list[Process] = field(default_factory=list)

    def job(self) -> Job:
        """Return a random job of this round."""
        return drawn(self.rng, self.folder, self.seeds)

    def begin(
        self,
        job: Job,
        resume: bool = True,
        *,
        name: str = "",
        argv: Sequence[str] = (),
        limit: int | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> Process:
        """Begin a process of a job; `argv` stands before its options, by default a random form."""
        if self.budget.aborted:
            raise AbortedError
        command = [*(argv or self.rng.choice(self.program.forms())), *job.options(resume)]
        process = Process(
            command, self.folder, self.program.environment(self.folder / "cache", env),
            f"{len(self._begun):03d}{name}", job.outdir, limit,
        )  # fmt: skip
        self._begun.append(process)
        self.outcome.processes += 1
        return process

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._begun:
            process.kill()

    def find(self, findings: Sequence[str], where: str = "") -> None:
        """Take note of findings."""
        for finding in [] if self.budget.aborted else findings:
            self.outcome.findings.append((self.number, finding))
            self.told(f"FOUND {finding}{where and f' [{where}]'}")

    def strike(self, process: Process, job: Job) -> None:
        """Wait for a random moment, and send a random signal, or two."""
        if not self._await_moment(process, job):
            return
        number = self.rng.choice(DEADLY)
        self.kill(process, number)
        if number == signal.SIGINT and self.rng.random() < 0.4:
            time.sleep(self.rng.choice([0.02, 0.3, 2.5]))
            self.kill(process, number)

    def kill(self, process: Process, number: int) -> None:
        """Send a signal to a process, if it still runs."""
        if process.signal(number):
            self.count(number)

    def count(self, number: int) -> None:
        """Count a kill."""
        self.budget.spend()
        self.outcome.kills[signal.Signals(number).name] += 1

    def _await_moment(self, process: Process, job: Job) -> bool:
        """Wait for a moment: a time, an image, the beginning or the end of the work."""
        kind, delay = self.rng.random(), self.rng.uniform(0, 0.7)
        until = self.rng.uniform(0, LONGEST)
        count = len(job.there()) + self.rng.randint(0, 12)
        if kind < 0.6:
            return process.reach(until)
        if kind < 0.7:
            return process.when((job.outdir / "run.json").exists) and process.reach(
                process.age + delay
            )
        wanted = min(count, len(job.seeds)) if kind < 0.9 else len(job.seeds)
        there = process.when(lambda: len(job.there()) >= wanted)
        return there and process.reach(process.age + delay)

    def ended(self, process: Process, job: Job, before: dict[int, tuple[int, int]]) -> Ended:
        """Wait for a process that may have been struck, check it, and tell of it."""
        ended = process.wait()
        self.tell(ended, job)
        if ended.sent:
            self.find(checks.after_signal(ended), process.name)
            if ended.code in (130, 143) and ended.sent[0].begun:
                self.find(checks.stopped(job), process.name)
        else:
            self.find(checks.succeeded(ended), process.name)
        self.find(checks.unchanged(job, before), process.name)
        return ended

    def tell(self, ended: Ended, job: Job) -> None:
        """Tell of the end of a process."""
        sent = ", ".join(f"{signal.Signals(s.number).name} at {s.after:.1f} s" for s in ended.sent)
        self.told(
            f"{ended.name}: {sent or 'undisturbed'}; exit code {ended.code}; "
            f"{len(job.there())} of {len(job.seeds)} images"
        )

    def finish(
        self, job: Job, skipped: Collection[int] = (), env: Mapping[str, str] = NOTHING
    ) -> bool:
        """Resume a job undisturbed, and check all it has made.

        Returns:
            Whether the process ended well.
        """
        before = job.there()
        ended = self.begin(job, name="-finish", env=env).wait()
        self.tell(ended, job)
        self.find([*checks.succeeded(ended), *checks.unchanged(job, before)], ended.name)
        if ended.code == 0:
            made = re.search(r"^(\d+) images? made", ended.out, re.M)
            due = len(job.seeds) - len(set(before).union(skipped))
            if made is None or int(made[1]) != due:
                self.find([f"{made and made[1]} images made where {due} were due"], ended.name)
        return self.compare(job, skipped) and ended.code == 0

    def compare(self, job: Job, skipped: Collection[int] = ()) -> bool:
        """Check a job that is done; return whether nothing was found."""
        found = checks.finished(job, self.references.of(job.settings), skipped)
        self.outcome.rounding += found.rounding
        self.outcome.images += len(job.seeds) - len(skipped)
        self.find(found.findings)
        return not found.findings
