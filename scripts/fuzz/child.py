"""One target in one process: inputs are made and read until the time, or their number, is up."""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from scripts.fuzz.guard import Finding, Guard, limit_memory, stay_in
from scripts.fuzz.mutations import scramble

if TYPE_CHECKING:
    from scripts.fuzz.targets import Target

TIMEOUT = 10
"""Seconds after which an input is one that hangs its reader."""
RSS_LIMIT = 4096
"""MiB that a process may take in all."""
RAW = 0.25
"""Share of the inputs whose bytes are changed without regard to what they mean."""
STACKED = (1, 1, 1, 2, 3, 5)
"""Changes that are made to one input."""
LONGEST_KEPT = 1 << 20


@dataclass
class Child:
    """A target, where its inputs lie and where its findings go.

    Attributes:
        target: what is fuzzed.
        artifacts: folder of the inputs that are findings.
        work: temporary folder.
        executions: inputs that were read.
        found: findings by their signature; each is kept once.
    """

    target: Target
    artifacts: Path
    work: Path
    executions: int = 0
    found: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guard = Guard(self.work, self.target.may_raise)

    @property
    def folder(self) -> Path:
        """The folder that the reader sees."""
        return self.work / "read"

    def prepare(self) -> list[bytes]:
        """Watch this process, make the valid inputs and read them once.

        Raises:
            Exception: a valid input that is not read; the target is at fault.
        """
        self.guard.install()
        made = self.work / "made"
        made.mkdir(parents=True, exist_ok=True)
        seeds = [bytes(seed) for seed in self.target.seeds(made)]
        for seed in seeds:
            path = self._written(seed)
            self.guard.warm(functools.partial(self.target.read, path))
        self._report()
        return seeds

    def _written(self, data: bytes) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        path = self.folder / self.target.file
        path.write_bytes(data)
        return path

    def try_input(self, data: bytes) -> Finding | None:
        """Read one input; keep it if it is a finding of a new kind."""
        path = self._written(data)
        self.executions += 1
        self._report()  # now, as what follows may end the process
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        try:
            finding = self.guard.check(
                lambda: self.target.read(path), len(data), self.target.allowance
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
        if finding is not None and finding.signature not in self.found:
            self.found[finding.signature] = self._keep(data, finding)
            self._report()
        return finding

    def _keep(self, data: bytes, finding: Finding) -> Path:
        self.artifacts.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(finding.signature.encode()).hexdigest()[:8]
        path = self.artifacts / f"finding-{digest}-{self.target.file}"
        path.write_bytes(data[:LONGEST_KEPT])
        path.with_name(path.name + ".txt").write_text(
            f"{finding.signature}\n\n{finding.report}", errors="replace"
        )
        return path

    def changed(self, data: bytes, rng: Random) -> bytes:
        """Return an input changed by the target's own mutator, once or a few times."""
        for _ in range(rng.choice(STACKED)):
            data = self.target.mutate(data, rng) or scramble(data, rng)
        return data[: self.target.longest]

    def _report(self) -> None:
        """Write what has been done so far, for the process that waits."""
        content = {"executions": self.executions, "findings": sorted(self.found)}
        (self.work / "status.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class Task:
    """How long to go on, with which random numbers and which inputs.

    Attributes:
        corpus: folder of inputs; new ones are added if `grow`.
        kept: folder of inputs that belong to the project.
        seconds: time limit; None for none.
        runs: number of inputs to make; None for no limit.
    """

    corpus: Path
    kept: Path
    seed: int
    grow: bool
    seconds: float | None
    runs: int | None


def inputs_in(*folders: Path) -> Iterator[bytes]:
    """Yield the inputs in folders, in the order of their names."""
    for folder in folders:
        if folder.is_dir():
            for path in sorted(p for p in folder.iterdir() if p.is_file()):
                yield path.read_bytes()


def run_plain(child: Child, task: Task) -> None:
    """Read the corpus, then changed inputs of it: no measure of coverage, and no atheris."""
    pool = [*child.prepare(), *inputs_in(task.kept, task.corpus)]
    limit_memory(RSS_LIMIT)
    end = time.monotonic() + (task.seconds if task.seconds is not None else 1e9)
    for data in _plain_inputs(child, pool, task):
        if time.monotonic() > end:
            break
        child.try_input(data)


def _plain_inputs(child: Child, pool: Sequence[bytes], task: Task) -> Iterator[bytes]:
    yield from pool
    rng, made = Random(task.seed), 0
    while task.runs is None or made < task.runs:
        data = rng.choice(pool)
        yield scramble(data, rng) if rng.random() < RAW else child.changed(data, rng)
        made += 1


def run_atheris(child: Child, task: Task) -> None:
    """Let libFuzzer choose the inputs by coverage; it ends the process."""
    atheris = importlib.import_module("atheris")
    seeds = child.prepare()
    limit_memory(RSS_LIMIT)
    given = child.work / "seeds"
    _write_all(given, [*seeds, *inputs_in(task.kept)])
    grown = task.corpus if task.grow else child.work / "corpus"
    grown.mkdir(parents=True, exist_ok=True)
    if not task.grow:
        _write_all(grown, inputs_in(task.corpus))
    child.artifacts.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        child.try_input(data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        if not data or rng.random() < RAW:
            return bytes(atheris.Mutate(data, most))
        return child.changed(data, rng)[:most]

    limits = [f"-runs={task.runs}"] if task.runs is not None else []
    limits += [f"-max_total_time={int(task.seconds)}"] if task.seconds is not None else []
    options = [
        f"-seed={task.seed}", f"-timeout={2 * TIMEOUT}", f"-rss_limit_mb={RSS_LIMIT}", *limits,
        f"-max_len={child.target.longest}", f"-artifact_prefix={child.artifacts}/",
        # Python's own handlers of signals print where the reader was.
        "-handle_segv=0", "-handle_bus=0", "-handle_fpe=0", "-handle_ill=0", "-handle_abrt=0",
        f"-use_value_profile={int(task.grow)}", "-print_final_stats=1", "-reload=0",
        "-len_control=0",
        str(grown), str(given),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _write_all(folder: Path, inputs: Iterable[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


ENGINES = {"atheris": run_atheris, "plain": run_plain}


def run_child(target: Target, engine: str, artifacts: Path, work: Path, task: Task) -> int:
    """Fuzz one target; return the process's exit code."""
    stay_in(work)
    faulthandler.enable()
    ENGINES[engine](Child(target, artifacts, work), task)
    return 0
