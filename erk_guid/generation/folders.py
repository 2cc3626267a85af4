"""The folder of a job: its images, and run.json, which says how they were made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import PARTIAL, write_bytes
from erk_guid.common.pictures import is_somebodys, is_whole_png, says_seed
from erk_guid.generation.locks import LOCK_FILE, FolderLock
from erk_guid.generation.seeds import unique
from erk_guid.generation.trace import part_files, restart_parts
from erk_guid.solvers import same_as_recorded

RUN_FILE = "run.json"
MOST_BYTES = 1 << 28
"""Size of the largest run.json that is read: ten million seeds, and more."""


def image_path(outdir: Path, seed: int, subdirs: bool) -> Path:
    """Return the path of the image of `seed`; `subdirs` gives a folder per 1000 seeds."""
    folder = outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


@dataclass(frozen=True)
class ImageFolder:
    """The folder of a job.

    Attributes:
        path: where it is.
        subdirs: a folder for every 1000 seeds.
    """

    path: Path
    subdirs: bool

    def image(self, seed: int) -> Path:
        """Return the path of the image of `seed`."""
        return image_path(self.path, seed, self.subdirs)

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """Return the seeds that have no image here."""
        return [seed for seed in seeds if not self.image(seed).exists()]

    def check(self, lock: FolderLock, seeds: Sequence[int]) -> None:
        """Raise unless the folder is there, and still this job's.

        Raises:
            ErkGuidError: the message counts how many of the seeds have no image.
        """
        try:
            lock.check()
        except ErkGuidError as error:
            raise ErkGuidError(
                f"{error}; {len(self.missing(seeds))} of {len(seeds)} images are missing there"
            ) from error

    def check_made(self, seeds: Sequence[int]) -> None:
        """Raise if an image that was made is not there.

        Raises:
            ErkGuidError: the message counts them.
        """
        missing = self.missing(seeds)
        if missing:
            raise ErkGuidError(
                f"{len(missing)} of {len(seeds)} images made are missing in {self.path}, such as "
                f"that of seed {missing[0]}: something removed them; --resume makes them again"
            )

    def prepare(
        self,
        seeds: Sequence[int],
        settings: dict[str, Any],
        about: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ) -> list[int]:
        """Make the folder ready for a job, and write its run.json.

        Args:
            seeds: to be made, each once.
            settings: what makes the images what they are.
            about: more to record.
            resume: make only what is missing.
            overwrite: delete images of other settings.

        Returns:
            The seeds still to be made.

        Raises:
            ErkGuidError: the folder holds images of other settings, or cannot be written.
        """
        self._refuse_nested()
        run = fingerprint(settings)
        before = self._resumed(settings) if resume else self._cleared(seeds, settings, overwrite)
        recorded: list[int] = before["seeds"] if before else []
        try:
            unique([*recorded, *seeds])
        except ValueError as error:
            raise ErkGuidError(f"{self.path} has images of earlier seeds: {error}") from error
        todo = list(seeds)
        _remove(list(self._files(f".*{PARTIAL}*")))  # of killed runs
        if resume:
            # Of other seeds only what says that it is this run's: earlier versions' do not.
            claimed = set(recorded)
            todo = [s for s in seeds if not self._has(s, run, sure=s not in claimed)]
        if not overwrite:
            self._refuse_foreign(todo, run)
        _remove(self.image(s) for s in todo)
        if before is None:
            _remove(part_files(self.path))
        else:
            restart_parts(self.path, run, without=todo)
        skipped = set(before.get("nonfinite", []) if before else []) - set(todo)
        self._write(
            {
                "settings": settings,
                **about,
                "seeds": sorted({*recorded, *seeds}),
                **({"nonfinite": sorted(skipped)} if skipped else {}),
            }
        )
        return todo

    def _refuse_nested(self) -> None:
        """Refuse a folder within that of another run, or around one: their images would mix.

        Raises:
            ErkGuidError: the message names the other run's folder.
        """
        around = self.path.absolute().parent
        if re.fullmatch(r"\d{6,}", self.path.name) and (around / RUN_FILE).exists():
            raise ErkGuidError(
                f"{self.path} is named like a folder of the run in {around}, which would take the "
                "images for its own; choose another --outdir"
            )
        for record in self._files(RUN_FILE):
            if record.parent != self.path:
                raise ErkGuidError(
                    f"{record.parent} holds another run, and is named like a folder of this one; "
                    "choose another --outdir"
                )

    def _has(self, seed: int, run: str, sure: bool = False) -> bool:
        """Return whether the image of a seed is there: whole, and this run's by its own words."""
        return is_whole_png(self.image(seed), f"seed {seed},", run, sure)

    def _refuse_foreign(self, seeds: Sequence[int], run: str) -> None:
        """Refuse to put images in the place of files that are none of this run's.

        Raises:
            ErkGuidError: the message counts them.
        """
        there = (seed for seed in seeds if is_somebodys(self.image(seed)))
        foreign = [seed for seed in there if not self._has(seed, run)]
        if foreign:
            files = "file has the name" if len(foreign) == 1 else "files have names"
            raise ErkGuidError(
                f"{len(foreign)} {files} of images of this run, and came from elsewhere, such as "
                f"{self.image(foreign[0])}; move what you want to keep, and delete the others"
            )

    def remove(self) -> list[Path]:
        """Delete the images of the run that run.json describes, and what it wrote beside them.

        Returns:
            What is left: files that are none of this run's, and folders that hold them.

        Raises:
            ErkGuidError: run.json or a file cannot be read, or not be deleted.
        """
        record = self._read()
        if record is not None:
            run = fingerprint(record["settings"])
            images = {seed: self.image(seed) for seed in record["seeds"]}
            _remove(path for seed, path in images.items() if self._has(seed, run))
            _remove([*self._files(f".*{PARTIAL}*"), *part_files(self.path), self.path / LOCK_FILE])
            _remove([self.path / RUN_FILE])
            for folder in [*{path.parent for path in images.values()} - {self.path}, self.path]:
                with contextlib.suppress(OSError):  # not empty, or a link
                    folder.rmdir()
        return sorted(self.path.rglob("*"))

    def record_skipped(self, skipped: Sequence[int]) -> None:
        """Write into run.json which seeds of this run have no image, and say so.

        Raises:
            ErkGuidError: it cannot be read or written.
        """
        if not skipped:
            return
        run = self._read()
        if run is not None:
            self._write({**run, "nonfinite": sorted({*run.get("nonfinite", []), *skipped})})
        images = "image" if len(skipped) == 1 else "images"
        print(
            f"Note: {len(skipped)} {images} came out as NaN or infinity and were left out. "
            f"{self.path / RUN_FILE} lists their seeds under nonfinite; --resume makes them again",
            file=sys.stderr,
        )

    def recorded(self) -> set[int]:
        """Return the seeds that run.json lists; empty if there is none.

        Raises:
            ErkGuidError: it cannot be read.
        """
        run = self._read()
        return set(run["seeds"]) if run else set()

    def _read(self) -> dict[str, Any] | None:
        return read_run(self.path / RUN_FILE)

    def _write(self, run: dict[str, Any]) -> None:
        try:
            write_bytes(self.path / RUN_FILE, (json.dumps(run, indent=1) + "\n").encode())
        except OSError as error:
            reason = error.strerror or error
            raise ErkGuidError(f"cannot write to --outdir {self.path}: {reason}") from error

    def _resumed(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of the run that is resumed; None for an empty folder."""
        before = self._read()
        if before is None and any(self._files("*.png")):
            raise ErkGuidError(
                f"cannot resume: {self.path} holds images but no {RUN_FILE}, so nothing says how "
                "they were made; choose another --outdir, or --overwrite in place of --resume"
            )
        if before is not None:
            refuse_mixture(self.path, before["settings"], settings)
        return before

    def _cleared(
        self, seeds: Sequence[int], settings: dict[str, Any], overwrite: bool
    ) -> dict[str, Any] | None:
        """Delete images of other settings, with `overwrite`.

        Returns:
            The record of a run with the same settings, whose images stay.

        Raises:
            ErkGuidError: there are images of other settings, or a run.json that is none.
        """
        there = set(self._files("*.png"))
        if not there:
            self._refuse_other_record(overwrite)
            return None
        before = self._recorded(settings)
        if before is None:
            if not overwrite:
                raise ErkGuidError(
                    f"{self.path} holds {len(there)} images of other settings, or of an unknown "
                    "origin; choose another --outdir, --resume with the first run's settings, or "
                    "--overwrite to delete them"
                )
            named = {path for path in there if re.fullmatch(r"\d{6,18}\.png", path.name)}
            others = sum(is_somebodys(path) and not says_seed(path) for path in named)
            _remove(named)
            if others:
                print(
                    f"Note: {others} of the {len(named)} pictures deleted in {self.path} did not "
                    "say that they were made by this program",
                    file=sys.stderr,
                )
            there -= named
        ours = {self.image(seed) for seed in [*seeds, *(before["seeds"] if before else [])]}
        if there - ours:
            # A score over the folder would count them, too.
            count = len(there - ours)
            print(f"Note: {self.path} holds {count} other images, which stay", file=sys.stderr)
        return before

    def _refuse_other_record(self, overwrite: bool) -> None:
        """Refuse a run.json of another program, in a folder without images.

        Raises:
            ErkGuidError: it is there, holds something, and describes no run.
        """
        path = self.path / RUN_FILE
        if overwrite or not path.is_file() or not path.stat().st_size:
            return
        try:
            read_run(path)
        except ErkGuidError as error:
            raise ErkGuidError(
                f"{path} is there, and is no record of a run of this program; choose another "
                "--outdir, move the file, or give --overwrite to replace it"
            ) from error

    def _recorded(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of a run with these settings; None if there is none."""
        try:
            before = self._read()
            if before is not None:
                refuse_mixture(self.path, before["settings"], settings)
        except ErkGuidError:
            return None
        return before

    def _files(self, pattern: str) -> Iterator[Path]:
        """Yield files in the folder and in its --subdirs folders, where jobs write; none deeper."""
        yield from self.path.glob(pattern)
        yield from self.path.glob(f"{'[0-9]' * 6}*/{pattern}")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ErkGuidError(f"cannot replace {path}: {error.strerror}") from error


def fingerprint(settings: dict[str, Any]) -> str:
    """Return which run's an image is: the same for settings that may be mixed.

    In which folder it lies changes nothing.
    """
    same = same_as_recorded(json.loads(json.dumps(settings)))
    same.pop("subdirs", None)
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]


def read_run(path: Path) -> dict[str, Any] | None:
    """Read a run.json; None if there is none.

    Raises:
        ErkGuidError: it is damaged, or something else.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise ValueError(f"it is no file of at most {MOST_BYTES >> 20} MiB")
        run = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ErkGuidError(f"cannot resume: {path} is not readable ({error})") from error
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("settings"), dict)
        or not _are_seeds(run.get("seeds"))
        or not _are_seeds(run.get("nonfinite", []))
    ):
        raise ErkGuidError(f"cannot resume: {path} does not describe a run")
    return run


def _are_seeds(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(seed, int) for seed in found)


def refuse_mixture(outdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those of a record.

    Raises:
        ErkGuidError: the message names each that differs.
    """
    # Through JSON, so that 1 and 1.0 and infinities compare as they were written.
    before, now = same_as_recorded(before), json.loads(json.dumps(now))
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        what = "; ".join(f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise ErkGuidError(
            f"cannot resume {outdir} with other settings: {what}. Repeat the first run's settings, "
            "or choose another --outdir"
        )
