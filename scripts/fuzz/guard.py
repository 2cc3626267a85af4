"""What counts as a finding: an input that a reader neither takes nor refuses as it promises."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CANARY = "erk_guid_canary"
"""A module made for this: its function `sing` is called by code that a file has smuggled in."""

MIB = 1 << 20
FACTOR = 40
"""Bytes of memory that a reader may take for each byte of its input, beyond its allowance."""

_ALWAYS = frozenset({
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pickle.find_class", "pty.spawn", "socket.bind", "socket.connect", "socket.getaddrinfo",
    "subprocess.Popen", "webbrowser.open",
})  # fmt: skip
"""Events of Python's audit hooks that no reader may cause."""
_PATHS = frozenset({
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.symlink", "os.truncate", "shutil.copyfile", "shutil.copytree", "shutil.move",
    "shutil.rmtree",
})  # fmt: skip
"""Events that a reader may cause in its temporary folder only."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class ForbiddenError(Exception):
    """Raised in the reader, so that what it must not do is not done."""


@dataclass(frozen=True)
class Finding:
    """An input at fault.

    Attributes:
        signature: equal for inputs that show one fault: what happened, and where.
        report: the same at length, with a traceback where there is one.
    """

    signature: str
    report: str


@dataclass
class Guard:
    """Runs readers and watches them.

    Attributes:
        folder: the temporary folder, the only place that a reader may write to.
        allowed: what a reader may raise.
    """

    folder: Path
    allowed: tuple[type[BaseException], ...]
    armed: bool = False
    forbidden: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Begin to watch this process; Python cannot remove audit hooks, but they can sleep."""
        self.folder = Path(os.path.realpath(self.folder))
        module = types.ModuleType(CANARY)
        module.sing = lambda *args: self._refuse("code from the file was run")  # type: ignore[attr-defined]
        sys.modules[CANARY] = module
        sys.addaudithook(self._hear)

    def warm(self, read: Callable[[], object]) -> None:
        """Run a reader on a valid input, so that what it imports when first called is there.

        Raises:
            Exception: whatever the reader raises.
        """
        with _silence():
            read()

    def check(self, read: Callable[[], object], size: int, allowance: int) -> Finding | None:
        """Run a reader on an input of `size` bytes.

        Args:
            allowance: MiB that the reader may take, whatever the input's size.
        """
        self.forbidden = []
        error: BaseException | None = None
        with _peak() as grown, _silence():
            self.armed = True
            try:
                read()
            except BaseException as caught:
                error = caught
            finally:
                self.armed = False
        return self._judge(error, grown(), allowance * MIB + FACTOR * size)

    def _judge(self, error: BaseException | None, grown: int, most: int) -> Finding | None:
        trace = "" if error is None else "".join(traceback.format_exception(error))
        if self.forbidden:
            return Finding(f"forbidden: {self.forbidden[0]}", "\n".join(self.forbidden) + trace)
        if error is not None and not isinstance(error, self.allowed):
            return Finding(f"{type(error).__name__} in {_place(error)}", trace)
        memory = next((e for e in _chain(error) if _is_of_memory(e)), None)
        if memory is not None:
            return Finding(f"refused for want of memory in {_place(memory)}", trace)
        if grown > most:
            kind = "returned" if error is None else f"{type(error).__name__} in {_place(error)}"
            text = f"took {grown / MIB:.0f} MiB, at most {most / MIB:.0f} were due"
            return Finding(f"memory: {kind}", f"{text}\n{trace}")
        return None

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in _ALWAYS:
            self._refuse(f"{event} {args!r:.200}")
        elif event in _PATHS:
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)) and not self._is_inside(path):
                    self._refuse(f"{event} {args!r:.200}")
        elif event == "open" and _writes(args) and not self._is_inside(args[0]):
            self._refuse(f"open {args!r:.200}")

    def _refuse(self, what: str) -> None:
        self.forbidden.append(what)
        raise ForbiddenError(what)

    def _is_inside(self, path: Any) -> bool:
        armed, self.armed = self.armed, False
        try:
            real = Path(os.path.realpath(os.fsdecode(path)))
        except ValueError:  # a null character; there is no such file
            return True
        finally:
            self.armed = armed
        compiled = real.parent.name == "__pycache__"  # of a module that is imported when needed
        return compiled or str(real) == os.devnull or self.folder in (real, *real.parents)


def _writes(args: tuple[Any, ...]) -> bool:
    path, mode, flags = args
    if isinstance(path, int):
        return False
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & _WRITING)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _place(error: BaseException) -> str:
    """Return the deepest line of the package in the traceback, or else the deepest line."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "erk_guid" in Path(f.filename).parts]
    if not frames:
        return "an unknown place"
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Yield a function that tells by how many bytes the process has grown at most since then."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        yield lambda: 0
        return
    with contextlib.suppress(OSError):
        reset.write_text("5")
    before = _kilobytes(status, "VmRSS")
    yield lambda: max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, name: str) -> int:
    text = status.read_text()
    return int(text[text.index(name) + len(name) + 1 :].split(maxsplit=1)[0])


def limit_memory(mib: int) -> None:
    """Let this process have `mib` MiB of addresses more than now: larger allocations fail."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * MIB, hard))


def stay_in(folder: Path) -> None:
    """Put temporary files of libraries into `folder`, too."""
    tempfile.tempdir = str(folder)
