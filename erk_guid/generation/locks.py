"""One job a folder: a lock that names who holds it, and is taken over when its holder is gone."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.generation.identity import identity, is_here, lives

LOCK_FILE = ".erk_guid.lock"
BEAT = 2.0
"""Seconds between two signs of life that a holder writes into its lock."""
WATCHED = 20.0
"""Seconds without one after which a holder on another machine is taken for gone."""
_LENGTH = 512
"""Bytes of a lock. They are rewritten in place, so that no reader finds half of one."""


@dataclass(frozen=True)
class FolderLock:
    """A lock, as this process or another rank of its job knows it.

    Attributes:
        folder: what is locked.
        token: of this job.
    """

    folder: Path
    token: str

    def check(self) -> None:
        """Raise unless the folder is there, and still this job's.

        Raises:
            ErkGuidError: it is gone, or another job has taken it over.
        """
        try:
            found = _read(self.folder / LOCK_FILE)
        except OSError as error:
            raise ErkGuidError(f"cannot read {self.folder}: {error.strerror or error}") from error
        if found is None:
            raise ErkGuidError(f"{self.folder} was moved, emptied or deleted while the job ran")
        if found.get("token") != self.token:
            raise ErkGuidError(
                f"{self.folder} was taken over by another job ({_holder(found)}), which found no "
                "sign of life of this one"
            )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Hold the lock of a folder, which is made if it is missing.

    A holder on this machine is gone when its process is. One on another machine is gone when it
    wrote no sign of life for `WATCHED` seconds. No clocks are compared.

    Raises:
        ErkGuidError: another job holds it, or the folder cannot be written to.
    """
    lock = FolderLock(folder, secrets.token_hex(8))
    path = folder / LOCK_FILE
    about = {**identity(), "token": lock.token, "began": _now()}
    new = not os.path.exists(folder)  # Path.exists raises on long names
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(path, about)
    except OSError as error:
        reason = error.strerror or error
        raise ErkGuidError(f"cannot write to {folder}: {reason}") from error
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, about, stop), daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        stop.set()
        beating.join()
        os.close(file)
        with contextlib.suppress(OSError):  # the folder may be gone
            found = _read(path)
            if found is not None and found.get("token") == lock.token:
                path.unlink(missing_ok=True)
                if new:
                    folder.rmdir()  # if nothing was put into it


def _taken(path: Path, about: dict[str, Any]) -> int:
    """Create the lock, and return its open file."""
    while True:
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            _refuse_living(path)
            continue
        _write(file, about, 0)
        return file


def _refuse_living(path: Path) -> None:
    """Remove the lock of a holder that is gone.

    Raises:
        ErkGuidError: the holder is at work.
    """
    found = _read(path)
    if found is None:
        return
    if not _gone(path, found):
        raise ErkGuidError(
            f"another job is at work in {path.parent} ({_holder(found)}); wait for it, or choose "
            "another folder"
        )
    # Renaming is atomic: of two that take over, one gets the old lock. The other may get the new
    # one, and puts it back.
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != found:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    else:
        print(f"Note: took over {path.parent}: {_holder(found)} is gone", file=sys.stderr)
    aside.unlink()


def _gone(path: Path, found: dict[str, Any]) -> bool:
    if is_here(found):
        return not lives(found)
    print(
        f"Note: {path.parent} is locked by {_holder(found)}; watching for {WATCHED:g} seconds "
        "whether it is at work",
        file=sys.stderr,
    )
    until = time.monotonic() + WATCHED
    while time.monotonic() < until:
        time.sleep(0.2)
        if _read(path) != found:
            return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a lock says; an empty dict where it says nothing, None where there is none."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_LENGTH))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _beat(file: int, about: dict[str, Any], stop: threading.Event) -> None:
    number = 0
    while not stop.wait(BEAT):
        number += 1
        with contextlib.suppress(OSError):  # `check` finds out
            _write(file, about, number)


def _write(file: int, about: dict[str, Any], beat: int) -> None:
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, json.dumps({**about, "beat": beat}).encode().ljust(_LENGTH))


def _holder(found: dict[str, Any]) -> str:
    if not found:
        return "a job that has not said who it is"
    names = ("host", "pid", "began")
    host, pid, began = (printable(found.get(name, "unknown"), 80) for name in names)
    return f"process {pid} on {host}, since {began}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
