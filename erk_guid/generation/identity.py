"""Which process is which: on this machine, or on another one that shares its files."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Return this process: its number counts within a running system and a process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        system = boot.read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        system = ""
    host = platform.node()[:80]
    pid = os.getpid()
    return {
        "host": host, "machine": f"{host} {system}", "pid": pid,
        "process_began": process_began(pid),
    }  # fmt: skip


def is_here(found: dict[str, Any]) -> bool:
    """Return whether `found`, an `identity`, is of this machine."""
    return bool(found.get("machine") == identity()["machine"])


def lives(found: dict[str, Any]) -> bool:
    """Return whether the process of an `identity` of this machine is still there."""
    return process_began(found.get("pid")) == found.get("process_began")


def process_began(pid: Any) -> str | None:
    """Return when a process began, in the system's ticks; None if there is no such process."""
    if isinstance(pid, bool) or not isinstance(pid, int):
        return None
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.exists() and Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    try:
        os.kill(pid, 0)  # no /proc: without its beginning, a new process of that number looks alike
    except ProcessLookupError:
        return None
    except OSError:
        return "unknown"
    return "unknown"
