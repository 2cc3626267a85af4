"""Fuzz every reader of files, each in a process of its own; print a table of what was found.

A finding is an input on which a reader raises anything but the errors it promises, hangs, takes
memory out of proportion, writes outside its folder, connects to anything, or runs code from the
file. Inputs that do so are kept in output/fuzz/<target>/, with a traceback beside them.

With --short, the engine 'plain' repeats exactly. What libFuzzer counts depends on addresses in
memory, too: `setarch -R make fuzz ARGS=--short` repeats exactly.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scripts.fuzz.child import RSS_LIMIT, TIMEOUT, Task, run_child

if TYPE_CHECKING:
    from scripts.fuzz.targets import Target

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "tests" / "data" / "fuzz"
INSTRUMENTED = ("erk_guid", "pickletools", "zipfile", "PIL")
SHORT_SECONDS = 60
"""Time limit of one target in a short run, which ends by the number of its inputs before."""
GRACE = 60
"""Seconds that a process may take beyond its time."""
RESTARTS = 10
COVERAGE = re.compile(r"^#\d+.* cov: (\d+)", re.M)


@dataclass
class Outcome:
    """What came of one target."""

    target: Target
    minutes: float = 0.0
    executions: int = 0
    coverage: int | None = None
    findings: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        edges = "–" if self.coverage is None else f"{self.coverage:,}"
        return [
            self.target.name, f"{self.minutes:.1f}", f"{self.executions:,}", edges,
            str(len(self.findings)),
        ]  # fmt: skip


@dataclass
class Running:
    """A target's process, and those that it had before."""

    outcome: Outcome
    work: Path
    left: float
    runs: int | None
    restarts: int = 0
    pid: int = 0
    begun: float = 0.0


@dataclass(frozen=True)
class Campaign:
    """What is fuzzed, and how.

    Attributes:
        minutes: for each target; None for each target's own time.
        short: a fixed number of inputs for each target, in place of a time.
        runs: that number; None for each target's own.
    """

    engine: str
    output: Path
    corpus: Path
    seed: int
    minutes: float | None
    short: bool
    runs: int | None = None

    def run(self, targets: Sequence[Target], jobs: int) -> list[Outcome]:
        """Fuzz the targets, `jobs` at a time."""
        waiting = list(targets)
        outcomes = [Outcome(target) for target in targets]
        by_name = {outcome.target.name: outcome for outcome in outcomes}
        running: list[Running] = []
        with tempfile.TemporaryDirectory(prefix="erk-fuzz-") as folder, _ending(running):
            while waiting or running:
                while waiting and len(running) < jobs:
                    target = waiting.pop(0)
                    running.append(self._begin(by_name[target.name], Path(folder) / target.name))
                for one in list(running):
                    if self._is_over(one):
                        running.remove(one)
                time.sleep(0.05)
        return outcomes

    def _begin(self, outcome: Outcome, work: Path) -> Running:
        target = outcome.target
        seconds = 60 * (target.minutes if self.minutes is None else self.minutes)
        artifacts = self.output / target.name
        shutil.rmtree(artifacts, ignore_errors=True)
        artifacts.mkdir(parents=True)
        one = Running(
            outcome, work, SHORT_SECONDS if self.short else seconds,
            (self.runs or target.runs) if self.short else None,
        )  # fmt: skip
        self._fork(one)
        return one

    def _fork(self, one: Running) -> None:
        """Start a process; what is imported, and instrumented, is there already."""
        sys.stdout.flush()
        sys.stderr.flush()
        shutil.rmtree(one.work, ignore_errors=True)
        one.work.mkdir(parents=True)
        one.begun = time.monotonic()
        one.pid = os.fork()
        if one.pid == 0:
            code = 70
            try:
                code = self._in_child(one)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def _in_child(self, one: Running) -> int:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        artifacts = self.output / one.outcome.target.name
        with open(artifacts / "log.txt", "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False, errors="replace")  # noqa: SIM115
        os.chdir(one.work)
        return run_child(one.outcome.target, self.engine, artifacts, one.work, self._task(one))

    def _task(self, one: Running) -> Task:
        name = one.outcome.target.name
        return Task(
            corpus=self.corpus / name, kept=KEPT / name, seed=self.seed + one.restarts,
            grow=not self.short, seconds=one.left, runs=one.runs,
        )  # fmt: skip

    def _is_over(self, one: Running) -> bool:
        """Return whether a target is finished; start it again after a hang or a crash."""
        spent = time.monotonic() - one.begun
        pid, status = os.waitpid(one.pid, os.WNOHANG)
        if not pid and spent <= one.left + GRACE:
            return False
        if not pid:
            os.kill(one.pid, signal.SIGKILL)
            _, status = os.waitpid(one.pid, 0)
        outcome = one.outcome
        outcome.minutes += spent / 60
        self._collect(one)
        one.left -= spent
        if os.waitstatus_to_exitcode(status) == 0:
            return True
        self._keep_last(one, os.waitstatus_to_exitcode(status))
        one.restarts += 1
        started = (one.work / "status.json").exists()
        if not started or one.restarts > RESTARTS or one.left < 1:
            return True
        self._fork(one)
        return False

    def _collect(self, one: Running) -> None:
        outcome, status = one.outcome, one.work / "status.json"
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(status.read_text())
            outcome.executions += told["executions"]
            outcome.findings += [f for f in told["findings"] if f not in outcome.findings]
        log = self.output / outcome.target.name / "log.txt"
        edges = COVERAGE.findall(log.read_text(errors="replace"))
        if edges:
            outcome.coverage = max(map(int, edges))

    def _keep_last(self, one: Running, code: int) -> None:
        """Keep the input that a process ended with, as its own finding."""
        target = one.outcome.target
        artifacts = self.output / target.name
        log = (artifacts / "log.txt").read_text(errors="replace")
        what = f"{_ENDS.get(code, f'the process ended with code {code}')}{_last_place(log)}"
        if what in one.outcome.findings:
            return
        one.outcome.findings.append(what)
        last = one.work / "read" / target.file
        if last.is_file():
            shutil.copyfile(last, artifacts / f"ended-{one.restarts}-{target.file}")


_ENDS = {
    1: f"no end after {TIMEOUT} seconds", 70: "the target cannot be run, see log.txt",
    71: f"more than {RSS_LIMIT} MiB of memory",
    -signal.SIGKILL: "no end, not even with force", -signal.SIGSEGV: "segmentation fault",
}  # fmt: skip
"""What the exit codes of a target's process mean."""


def _last_place(log: str) -> str:
    """Return where the package was when Python printed its last stack, deepest line first."""
    _, found, stack = log.rpartition("(most recent call first)")
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', stack if found else "")
    ours = [frame for frame in frames if "erk_guid" in Path(frame[0]).parts] or frames
    return "".join(f" in {Path(p).name}:{line} {name}" for p, line, name in ours[:1])


@contextlib.contextmanager
def _ending(running: list[Running]) -> Iterator[None]:
    """End the processes that are still at work when this one is interrupted."""
    try:
        yield
    finally:
        for one in running:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table, with the findings below."""
    head = ["target", "minutes", "executions", "edges", "findings"]
    rows = [head, *(outcome.cells() for outcome in outcomes)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    for outcome in outcomes:
        lines += [f"{outcome.target.name}: {finding}" for finding in outcome.findings]
    return "\n".join(lines)


def _targets(engine: str, also: Sequence[Path]) -> list[Target]:
    """Import the targets, and with them the package, in the form that counts coverage."""
    counted: Any = contextlib.nullcontext()
    if engine == "atheris":
        counted = importlib.import_module("atheris").instrument_imports(include=list(INSTRUMENTED))
    with counted, open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        from scripts.fuzz import targets

    import torch

    torch.set_num_threads(1)  # threads would not survive the fork
    more = [target for path in also for target in runpy.run_path(str(path))["TARGETS"]]
    return [*targets.TARGETS, *more]


@click.command()
@click.option("--target", "names", metavar="NAME", multiple=True, help="Only this one; repeatable.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.01), help="For each target.  [default: its own time]"
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Targets at a time."
)
@click.option(
    "--corpus",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the inputs found so far, which grows.  [default: corpus/ in --output]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seed of the random numbers.",
)
@click.option("--short", is_flag=True, help="A fixed number of inputs: about 3 seconds a target.")
@click.option(
    "--runs", type=click.IntRange(min=1), help="As --short, with this number of inputs for each."
)
@click.option(
    "--engine",
    type=click.Choice(["atheris", "plain"]),
    help="'plain' knows no coverage.  [default: atheris where it is installed]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "output" / "fuzz",
    help="Folder of the findings.  [default: output/fuzz]",
)
@click.option(
    "--also",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Python file with further targets, in TARGETS; repeatable.",
)
@click.option("--list", "listing", is_flag=True, help="Print the targets' names.")
def main(
    names: tuple[str, ...],
    minutes: float | None,
    jobs: int,
    corpus: Path | None,
    seed: int,
    short: bool,
    runs: int | None,
    engine: str | None,
    output: Path,
    also: tuple[Path, ...],
    listing: bool,
) -> None:
    """Fuzz the readers of files; exit with 1 if there are findings."""
    if not hasattr(os, "fork"):
        raise click.UsageError("this needs a system that can fork: Linux or macOS")
    engine = engine or ("atheris" if find_spec("atheris") else "plain")
    known = {target.name: target for target in _targets(engine, also)}
    if listing:
        click.echo("\n".join(known))
        return
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no target {unknown[0]!r}; known: {', '.join(known)}")
    output = output.resolve()
    corpus = (corpus or output / "corpus").resolve()
    campaign = Campaign(engine, output, corpus, seed, minutes, short or runs is not None, runs)
    outcomes = campaign.run([known[name] for name in names or known], jobs)
    click.echo(table(outcomes))
    if any(outcome.findings for outcome in outcomes):
        click.echo(f"\nThe inputs are in {output}/<target>/", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
