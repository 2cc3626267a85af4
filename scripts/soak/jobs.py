"""The job that is attacked: its settings, its command line, and the same job undisturbed."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from scripts.soak.programs import Process, Program

LARGE = 2**53 + 1
"""A seed that is no floating-point number."""
FIRST = 960
"""Of the other seeds: with --subdirs they are in two folders."""
KEYS = ("seed", "step")


class Settings(NamedTuple):
    """A name for options that make images what they are."""

    name: str
    options: tuple[str, ...]


COMMON = ("--preset=digits", "--device=cpu")
SETTINGS = (
    Settings("heun", (*COMMON, "--steps=3", "--w_stiff=0.5")),
    Settings("deis", (*COMMON, "--solver=deis", "--steps=3", "--w_stiff=0.2")),
    Settings("modal", (*COMMON, "--solver=modal", "--steps=3")),
    Settings("churn", (*COMMON, "--solver=euler", "--steps=3", "--S_churn=2", "--class=3")),
)
BROKEN = Settings("broken", (*COMMON, "--steps=4", "--w_stiff=1e30", "--w_con=1.8"))
"""With these, about half of the images come out as NaN."""


@dataclass(frozen=True)
class Job:
    """A job of the command line.

    Attributes:
        extra: further options.
    """

    settings: Settings
    seeds: tuple[int, ...]
    outdir: Path
    batch: int = 8
    subdirs: bool = False
    trace: Path | None = None
    grid: Path | None = None
    extra: tuple[str, ...] = ()

    def options(self, resume: bool) -> list[str]:
        """Return its options on the command line."""
        return [
            f"--outdir={self.outdir}", f"--seeds={','.join(map(str, self.seeds))}",
            f"--batch={self.batch}", *self.settings.options, *self.extra,
            *(["--subdirs"] if self.subdirs else []),
            *([f"--trace={self.trace}"] if self.trace else []),
            *([f"--grid={self.grid}"] if self.grid else []),
            *(["--resume"] if resume else []),
        ]  # fmt: skip

    @property
    def own_model(self) -> bool:
        """Whether the model is not named as in the undisturbed run."""
        return any(option.startswith("--net=") for option in self.settings.options)

    def with_option(self, option: str) -> Job:
        """Return the job with one more option."""
        return replace(self, extra=(*self.extra, option))

    def image(self, seed: int) -> Path:
        """Return the path of an image."""
        folder = self.outdir / f"{seed // 1000 * 1000:06d}" if self.subdirs else self.outdir
        return folder / f"{seed:06d}.png"

    def there(self) -> dict[int, tuple[int, int]]:
        """Return which images are there, each with what changes when it is made again."""
        found = {}
        for seed in self.seeds:
            try:
                stat = self.image(seed).stat()
            except OSError:
                continue
            found[seed] = (stat.st_ino, stat.st_mtime_ns)
        return found


def pool(count: int) -> tuple[int, ...]:
    """Return seeds, a large one among them."""
    return (*range(FIRST, FIRST + count - 1), LARGE)


def drawn(rng: Random, folder: Path, seeds: int) -> Job:
    """Return a job with some of a number of seeds, and with random other options."""
    settings = rng.choice(SETTINGS)
    count = rng.randint(seeds // 2, seeds)
    suffix = rng.choice([".csv", ".npz"])
    return Job(
        settings,
        tuple(rng.sample(pool(seeds), count)),
        folder / "images",
        rng.randint(4, 16),
        subdirs=rng.random() < 0.3,
        trace=folder / f"trace{suffix}" if rng.random() < 0.7 else None,
        grid=folder / "grid.png" if rng.random() < 0.3 else None,
    )


Rows = dict[tuple[int, int], tuple[float, ...]]


class Undisturbed(NamedTuple):
    """What a run without faults made."""

    job: Job
    run: dict[str, Any]
    rows: Rows


class BrokenProgramError(Exception):
    """The program does not even run undisturbed."""


@dataclass
class References:
    """Undisturbed runs, each made when it is first asked for.

    Args:
        seeds: how many.
        told: is given what each of these runs came to.
    """

    program: Program
    folder: Path
    seeds: int
    told: Callable[[str], None]
    _made: dict[str, Undisturbed] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, settings: Settings) -> Undisturbed:
        """Return the undisturbed run with these settings, of the model that ships."""
        options = [option for option in settings.options if not option.startswith("--net=")]
        if len(options) < len(settings.options):
            settings = settings._replace(options=(COMMON[0], *options))
        with self._lock:
            if settings.name not in self._made:
                self._made[settings.name] = self._run(settings)
                self.told(f"undisturbed run: {settings.name}, {self.seeds} seeds")
            return self._made[settings.name]

    def _run(self, settings: Settings) -> Undisturbed:
        folder = self.folder / settings.name
        skip = ("--on-nonfinite=skip",)
        trace = folder / "trace.csv"
        job = Job(settings, pool(self.seeds), folder / "images", 16, trace=trace, extra=skip)
        env = self.program.environment(folder / "cache", {})
        argv = [*self.program.forms()[0], *job.options(resume=False)]
        ended = Process(argv, folder, env, "undisturbed", job.outdir).wait()
        if ended.code != 0:
            raise BrokenProgramError(f"undisturbed, exit code {ended.code}: {ended.error}")
        return Undisturbed(job, json.loads((job.outdir / "run.json").read_text()), rows_of(trace))


def rows_of(path: Path) -> Rows:
    """Read a trace.

    Raises:
        ValueError: a seed or a step is no whole number, or is there twice.
    """
    lines = _npz(path) if path.suffix == ".npz" else _csv(path)
    rows = {(seed, step): values for seed, step, values in lines}
    if len(rows) != len(lines):
        raise ValueError(f"{len(lines) - len(rows)} rows are there twice")
    return rows


Lines = Sequence[tuple[int, int, tuple[float, ...]]]


def _csv(path: Path) -> Lines:
    with open(path, newline="") as file:
        return [
            (int(row["seed"]), int(row["step"]),
             tuple(float(v or "nan") for k, v in row.items() if k not in KEYS))
            for row in csv.DictReader(file)
        ]  # fmt: skip


def _npz(path: Path) -> Lines:
    with np.load(path) as columns:
        if any(columns[key].dtype.kind not in "iu" for key in KEYS):
            raise ValueError("seeds or steps are no whole numbers")
        values = np.stack([columns[name] for name in columns.files if name not in KEYS], 1)
        keys = zip(columns["seed"].tolist(), columns["step"].tolist(), strict=True)
        return [
            (seed, step, tuple(row))
            for (seed, step), row in zip(keys, values.tolist(), strict=True)
        ]
