"""Attack real runs of the command line with faults, and compare what they made with calm runs.

A finding is an image that is missing, made twice or different, a trace or run.json that does not
tell the truth, a file left behind, a traceback, a wrong exit code, or a process that does not end.
The seed gives the moments and the faults; where in the program they meet it depends on the
machine's pace. So a finding is repeated by running its round a few times.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import NoReturn

import click

from scripts.soak import faults, kills, report, servers
from scripts.soak.jobs import BrokenProgramError, References
from scripts.soak.programs import Program
from scripts.soak.rounds import LIVES, Budget, Outcome, Round, UnavailableError

ROOT = Path(__file__).parents[2]
Scenario = Callable[[Round], None]
SCENARIOS: dict[str, Scenario] = {
    "process": kills.process,
    "ranks": kills.ranks,
    "torchrun": kills.torchrun,
    "stop": kills.stop,
    "disk": faults.disk,
    "folder": faults.folder,
    "server": servers.server,
    "nonfinite": faults.nonfinite,
    "together": faults.together,
    "clock": kills.clock,
}
TURNS = (
    "process", "folder", "ranks", "server", "process", "disk", "torchrun", "together",
    "process", "nonfinite", "server", "clock", "process", "folder", "ranks", "stop",
)  # fmt: skip
"""In which order scenarios come, again and again: those with the most kills most often."""
SEEDS, SHORT_SEEDS = 80, 16
SHORT = ("process", "folder")
"""One round of each in a short attack."""


@dataclass(frozen=True)
class Turn:
    """A round that is to be run."""

    scenario: str
    number: int


@dataclass
class Attack:
    """All rounds, and what came of them."""

    program: Program
    work: Path
    kept: Path
    seed: int
    seeds: int
    lives: int
    budget: Budget
    began: float = field(default_factory=time.monotonic)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _open: list[Round] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, turns: Iterator[Turn], streams: int) -> None:
        """Run rounds until there are none or the time is over, `streams` beside each other."""
        references = References(
            self.program, self.work / "undisturbed", self.seeds, lambda text: self._tell("", text)
        )
        with ThreadPoolExecutor(streams) as pool:
            streaming = [pool.submit(self._stream, turns, references) for _ in range(streams)]
            try:
                for done in as_completed(streaming):
                    done.result()
            except BaseException:
                self._abort()
                raise

    def _abort(self) -> None:
        """Let no process be begun any more, and kill those that run."""
        self.budget.aborted = True
        for one in list(self._open):
            one.end()

    def _stream(self, turns: Iterator[Turn], references: References) -> None:
        while True:
            with self._lock:
                turn = None if self.budget.over() else next(turns, None)
                if turn is None:
                    return
                outcome = self.outcomes.setdefault(turn.scenario, Outcome())
                outcome.rounds += 1
            self._round(turn, outcome, references)

    def _round(self, turn: Turn, outcome: Outcome, references: References) -> None:
        label = f"{turn.scenario}/{turn.number}"
        one = Round(
            turn.number, Random(f"{self.seed}/{label}"), self.work / label.replace("/", "-"),
            self.program, references, self.budget, outcome, self.seeds, self.lives,
            lambda text: self._tell(label, text),
        )  # fmt: skip
        self._open.append(one)
        before = len(outcome.findings)
        try:
            SCENARIOS[turn.scenario](one)
        except UnavailableError as error:
            outcome.notes[str(error)] += 1
            self._tell(label, f"not tried: {error}")
        finally:
            one.end()
            self._open.remove(one)
        if any(number == turn.number for number, _ in outcome.findings[before:]):
            shutil.copytree(one.folder, self.kept / one.folder.name, dirs_exist_ok=True)
        shutil.rmtree(one.folder, ignore_errors=True)

    def _tell(self, label: str, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {label:12}  {text}", flush=True)


def _turns(names: Sequence[str], number: int | None) -> Iterator[Turn]:
    """Yield rounds of the named scenarios for ever; with a number, that one of each."""
    if number is not None:
        yield from (Turn(name, number) for name in dict.fromkeys(names))
        return
    counts = dict.fromkeys(names, 0)
    while True:
        for name in names:
            yield Turn(name, counts[name])
            counts[name] += 1


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@click.command()
@click.option(
    "--scenario", "names", metavar="NAME", multiple=True, type=click.Choice(list(SCENARIOS)),
    help="Only this one; repeatable.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=10.0, show_default=True,
    help="After these, jobs are finished and no others begun.",
)  # fmt: skip
@click.option("--kills", type=click.IntRange(min=1), help="End after so many kills.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the random numbers.")
@click.option(
    "--round", "number", type=click.IntRange(min=0), help="Only this round of each scenario."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rounds at a time."
)
@click.option("--short", is_flag=True, help="A fixed small attack, in under 40 seconds.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "output" / "soak",
    help="Folder of soak.json, soak.md, and the rounds with findings.  [default: output/soak]",
)  # fmt: skip
@click.option(
    "--checkout", type=click.Path(exists=True, file_okay=False, path_type=Path), default=ROOT,
    help="The program that is attacked, in a copy.  [default: this one]",
)  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="Print the scenarios.")
def main(
    names: tuple[str, ...],
    minutes: float,
    kills: int | None,
    seed: int,
    number: int | None,
    jobs: int,
    short: bool,
    output: Path,
    checkout: Path,
    listing: bool,
) -> None:
    """Attack runs of the command line; exit with 1 if there are findings."""
    if listing:
        for name, scenario in SCENARIOS.items():
            click.echo(f"{name:12}{(scenario.__doc__ or '').splitlines()[0]}")
        return
    if sys.platform != "linux":
        raise click.UsageError("this needs Linux: processes are watched by /proc")
    signal.signal(signal.SIGTERM, _terminated)
    # In the background a shell has it ignored, and all processes begun here would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="erk-soak-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        attack = Attack(
            Program.copied(checkout.resolve(), work / "program"), work, output, seed,
            SHORT_SEEDS if short else SEEDS, 2 if short else LIVES,
            Budget(time.monotonic() + 60 * minutes, kills),
        )  # fmt: skip
        turns = _turns(names or (SHORT if short else TURNS), 0 if short else number)
        try:
            attack.run(turns, 2 if short else jobs)
        except BrokenProgramError as error:
            raise click.ClickException(str(error)) from error
    written = report.Report(seed, time.monotonic() - attack.began, attack.outcomes, short)
    written.write(output)
    click.echo(written.table())
    if findings := written.findings():
        click.echo("\n".join(["", *findings, "", f"Their folders are in {output}"]), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
