"""Settings files that ship with the package, fitted to its presets by `erk-guid fit`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable

FITTED = "fitted"
"""The schedule that stands for such a file."""


@cache
def shipped_fits() -> dict[str, tuple[int, ...]]:
    """Return the numbers of evaluations that there are files for, rising, by preset."""
    found: dict[str, list[int]] = {}
    for entry in _folder().iterdir():
        name, _, count = entry.name.removesuffix(".json").rpartition("-")
        found.setdefault(name, []).append(int(count))
    return {name: tuple(sorted(counts)) for name, counts in sorted(found.items())}


def shipped_fit(preset: str | None, evaluations: int) -> Traversable:
    """Return the settings file that was fitted for a preset and a number of evaluations.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    if evaluations not in shipped_fits().get(preset or "", ()):
        known = "; ".join(
            f"--preset {name} --steps {', '.join(map(str, counts))}"
            for name, counts in shipped_fits().items()
        )
        raise ValueError(
            f"--schedule {FITTED}: nothing was fitted for "
            f"{preset or 'a network without a preset'} and {evaluations} steps, only for {known}; "
            "'erk-guid fit' fits your own, then give --settings"
        )
    return _folder() / f"{preset}-{evaluations}.json"


def _folder() -> Traversable:
    return files("erk_guid") / "data" / "fits"
