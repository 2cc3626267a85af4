"""What an attack came to: a table, soak.md and soak.json."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from scripts.soak.rounds import Outcome

HEAD = ("scenario", "rounds", "processes", "images", "kills", "by signal", "rounding", "findings")
LEFT = ("scenario", "by signal")


@dataclass(frozen=True)
class Report:
    """An attack that is over.

    Attributes:
        short: it was the short one.
    """

    seed: int
    seconds: float
    outcomes: Mapping[str, Outcome]
    short: bool

    @property
    def kills(self) -> int:
        """How many signals were sent that should end a process."""
        return sum(outcome.kills.total() for outcome in self.outcomes.values())

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, without its head."""
        return [
            (
                name, str(o.rounds), str(o.processes), str(o.images), str(o.kills.total()),
                " ".join(f"{k.removeprefix('SIG')} {n}" for k, n in sorted(o.kills.items())),
                str(o.rounding), str(len(o.findings)),
            )
            for name, o in self.outcomes.items()
        ]  # fmt: skip

    def table(self) -> str:
        """Return the table for a terminal."""
        rows = [HEAD, *self.rows()]
        widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
        lines = [
            "  ".join(
                cell.ljust(width) if name in LEFT else cell.rjust(width)
                for cell, width, name in zip(row, widths, HEAD, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self._summary(), *self._notes()])

    def findings(self) -> list[str]:
        """Return a line for each finding, with the command that repeats its round."""
        counted = {name: Counter(outcome.findings) for name, outcome in self.outcomes.items()}
        return [
            f"{name}/{number}: {what} ({count} times; {self._repeating(name, number)})"
            for name, counts in counted.items()
            for (number, what), count in counts.items()
        ]

    def _repeating(self, name: str, number: int) -> str:
        which = "--short" if self.short else f"--scenario={name} --round={number}"
        return f"python -m scripts.soak --seed={self.seed} {which}"

    def write(self, folder: Path) -> None:
        """Write soak.json and soak.md."""
        about = _about()
        data = {
            **about, "seed": self.seed, "seconds": round(self.seconds, 1), "kills": self.kills,
            "scenarios": {name: outcome.record() for name, outcome in self.outcomes.items()},
        }  # fmt: skip
        (folder / "soak.json").write_text(json.dumps(data, indent=1) + "\n")
        lines = [
            "# Attack on the command line", "", self._summary(), "",
            *(f"- {name}: {value}" for name, value in about.items()), "",
            _line(HEAD), _line(["---"] * len(HEAD)), *map(_line, self.rows()), "",
            *self._notes(), *(f"- {finding}" for finding in self.findings()),
        ]  # fmt: skip
        (folder / "soak.md").write_text("\n".join(lines).rstrip() + "\n")

    def _summary(self) -> str:
        minutes = self.seconds / 60
        found = sum(len(outcome.findings) for outcome in self.outcomes.values())
        return (
            f"{self.kills} kills in {minutes:.1f} minutes ({self.kills / minutes:.1f} a minute), "
            f"{found} findings; seed {self.seed}"
        )

    def _notes(self) -> list[str]:
        return [
            f"{name}: not tried, {count} times: {why}"
            for name, outcome in self.outcomes.items()
            for why, count in outcome.notes.items()
        ]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _about() -> dict[str, str]:
    """Return date, machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("erk_guid", "torch", "numpy"))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": f"{versions}, Python {platform.python_version()}",
    }
