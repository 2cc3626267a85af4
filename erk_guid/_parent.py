"""Who started this process.

It is read when the package is imported, before torch, which takes seconds: the launcher that
started this process may end meanwhile.
"""

from __future__ import annotations

import os

PARENT = os.getppid()
"""Number of the process that started this one."""


def is_orphaned() -> bool:
    """Return whether the process that started this one has ended."""
    return os.getppid() != PARENT
