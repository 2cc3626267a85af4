"""Real processes of the command line: begun, given signals, watched, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PATIENCE = 120.0
"""Seconds after which a process that should have ended counts as hanging."""
MARK = "ERK_SOAK_MARK"
"""Variable in the environment by which a process is found that its parent has left."""
LOCK = ".erk_guid.lock"
COPIED = ("erk_guid", "generate_images.py")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


class Sent(NamedTuple):
    """A signal that a process was sent.

    Attributes:
        number: of the signal.
        after: seconds since the process began.
        listening: the program had begun: it handled SIGTERM, or torch was loaded.
        begun: the process held the folder of the images.
        ending: it had handled SIGTERM, and did no more: Python itself was ending.
    """

    number: int
    after: float
    listening: bool
    begun: bool
    ending: bool = False


class Ended(NamedTuple):
    """What came of a process.

    Attributes:
        code: exit code; minus the number of the signal that killed it; None if it had to be
            killed after `PATIENCE` seconds.
        err: all that it wrote to standard error.
        sent: the signals it was sent, in order.
    """

    name: str
    code: int | None
    out: str
    err: str
    sent: tuple[Sent, ...]

    @property
    def error(self) -> str:
        """The last line of standard error."""
        lines = self.err.replace("\r", "\n").strip().splitlines()
        return lines[-1] if lines else ""


class Process:
    """A process of the program, with its output in files.

    Args:
        argv: the command.
        folder: of its output.
        env: its environment, whole.
        name: for messages.
        watched: the folder of the images, for `Sent.begun`.
        limit: largest size of a file that it may write, in bytes.
    """

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        env: Mapping[str, str],
        name: str,
        watched: Path,
        limit: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self._watched = name, watched
        self._mark = secrets.token_hex(8)
        self._outputs = tuple(folder / f"{name}.{stream}" for stream in ("out", "err"))
        self._sent: list[Sent] = []
        self._handled = False
        limited = ["prlimit", f"--fsize={limit}", *argv] if limit else argv
        with open(self._outputs[0], "wb") as out, open(self._outputs[1], "wb") as err:
            self._popen = subprocess.Popen(
                limited,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**env, MARK: self._mark},
                start_new_session=True,
            )
        self._began = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def signal(self, number: int) -> bool:
        """Send a signal, and return whether the process was there to get it."""
        handles = self._handles()
        listening = handles or listens(self._popen.pid)
        sent = Sent(number, self.age, listening, self._holds(), self._handled and not handles)
        if not self.running:
            return False
        self._popen.send_signal(number)
        self._sent.append(sent)
        return True

    def when(self, moment: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Wait until `moment` or the end, and return whether the process is still running."""
        until = time.monotonic() + patience
        while self.running and not moment() and time.monotonic() < until:
            self._handles()
            time.sleep(0.01)
        return self.running

    def reach(self, age: float) -> bool:
        """Wait until the process is so many seconds old; return whether it is still running."""
        return self.when(lambda: self.age > age)

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Wait for its end, and that of the processes it started; kill what takes too long."""
        until = time.monotonic() + patience
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._popen.wait(patience)
        while code is not None and (left := self.family()) and time.monotonic() < until:
            time.sleep(0.05)
        if code is None or left:
            code = None
            self.kill()
        out, err = (path.read_text(errors="replace") for path in self._outputs)
        return Ended(self.name, code, out, err, tuple(self._sent))

    def _handles(self) -> bool:
        """Return whether it handles SIGTERM now, and remember that it did."""
        handles = handles_signals(self._popen.pid)
        self._handled |= handles
        return handles

    def _holds(self) -> bool:
        return _holder(self._watched / LOCK) == self._popen.pid

    def kill(self) -> None:
        """End it and all that it started, at once."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()

    def family(self) -> list[int]:
        """Return this process and all that it started, as far as they run."""
        return [pid for pid in _pids() if _variable(pid, MARK) == self._mark]

    def ranks(self) -> dict[int, int]:
        """Return the processes that a launcher started, by rank."""
        found = {_variable(pid, "RANK"): pid for pid in self.family() if pid != self._popen.pid}
        return {int(rank): pid for rank, pid in found.items() if rank}


def _holder(lock: Path) -> object:
    """Return the number of the process that a folder's lock names; None if there is none."""
    try:
        return json.loads(lock.read_bytes()).get("pid")
    except (OSError, ValueError, AttributeError):
        return None


def listens(pid: int) -> bool:
    """Return whether a process is past the beginning of Python: it handles SIGTERM, or has torch.

    A signal before that meets no code of the program.
    """
    try:
        loaded = "libtorch_cpu" in Path("/proc", str(pid), "maps").read_text()
    except OSError:
        return True
    return loaded or handles_signals(pid)


def handles_signals(pid: int) -> bool:
    """Return whether a process handles SIGTERM; False for one that is gone."""
    try:
        caught = int(_after("SigCgt:", Path("/proc", str(pid), "status").read_text()), 16)
    except (OSError, ValueError):
        return False
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def _after(label: str, text: str) -> str:
    return text.partition(label)[2].split("\n")[0].strip()


def _pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _variable(pid: int, name: str) -> str:
    """Return a variable of the environment that a process began with; empty if it has none."""
    try:
        fields = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    prefix = f"{name}=".encode()
    return next((f[len(prefix) :].decode() for f in fields if f.startswith(prefix)), "")


@dataclass(frozen=True)
class Program:
    """A copy of the program: what is edited while the attack runs does not take part in it."""

    root: Path

    @classmethod
    def copied(cls, checkout: Path, root: Path) -> Program:
        """Copy the program from a checkout to `root`."""
        root.mkdir(parents=True)
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(checkout / COPIED[0], root / COPIED[0], ignore=skip)
        shutil.copyfile(checkout / COPIED[1], root / COPIED[1])
        return cls(root)

    def forms(self) -> list[list[str]]:
        """Return the ways to begin the command line."""
        script = Path(sys.executable).with_name("erk-guid")
        forms = [
            [sys.executable, str(self.root / COPIED[1])],
            [sys.executable, "-m", "erk_guid", "generate"],
        ]
        return [*forms, [str(script), "generate"]] if script.exists() else forms

    def knows(self, option: str) -> bool:
        """Return whether the command line has an option."""
        return f'"{option}"' in (self.root / "erk_guid/cli/generate.py").read_text()

    def torchrun(self, ranks: int, logs: Path) -> list[str]:
        """Return the command that runs the program in several processes, each with its own log."""
        return [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
            f"--master_port={free_port()}", f"--log_dir={logs}", "--redirects=3",
            self.forms()[0][1],
        ]  # fmt: skip

    def environment(self, cache: Path, more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process; modules come from the copy, or from `more` first."""
        inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
        paths = [more["PYTHONPATH"]] if "PYTHONPATH" in more else []
        return {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "ERK_GUID_CACHE": str(cache),
            **more,
            "PYTHONPATH": os.pathsep.join([*paths, str(self.root)]),
        }


def free_port() -> int:
    """Return the number of a port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
