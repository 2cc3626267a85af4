"""The file that keeps settings: JSON with the settings and what they are for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import write_bytes
from erk_guid.guidance import Guidance, make_guidance, settings_of
from erk_guid.solvers import Solver, make_solver, names_of_options

FORMAT = "erk_guid_settings"
VERSION = 1
SETTINGS_START = (f'{{\n "{FORMAT}"'.encode(),)
"""How such a file begins, see `check_writable`."""
PROCESS = "process"
"""Entry of `Settings.measured` that names the process whose times the levels are."""
LARGEST_NUMBER = 10**15
"""Largest whole number in the file; larger ones have no use there and may exceed any float."""
LARGEST = 1_000_000
"""Largest size of a file that is read, in bytes."""

_GUIDANCE: dict[str, tuple[type, ...]] = {
    "w_stiff": (float, int, str),
    "w_con": (float, int),
    "bound": (float, int, type(None)),
    "gate": (str,),
}
_MADE_FOR: dict[str, tuple[type, ...]] = {
    "solver": (str,),
    "order": (int, type(None)),
    "r": (float, int, type(None)),
    "deis_mode": (str, type(None)),
    "predict_x0": (bool, type(None)),
    "variant": (str, type(None)),
    "lower_order_final": (bool, type(None)),
    "threshold": (bool, type(None)),
    "response": (list, type(None)),
    "eta": (float, int, type(None)),
    "denoise_to_zero": (bool,),
    "num_steps": (int,),
    "sigma_min": (float, int),
    "sigma_max": (float, int),
    "rho": (float, int),
    "schedule": (str, list),
}
"""The options of the command lines that settings belong to."""


@dataclass(frozen=True)
class Settings:
    """Settings of guidance, and what they were found for.

    Attributes:
        guidance: the settings.
        made_for: options of the command lines that they belong to: the solver and its options,
            and the noise levels, under the names of `GenerationConfig`'s fields.
        measured: how they were found, for the reader: network, seeds, errors. It is not
            interpreted, except that a run with another `net` or `guidance` gets a remark, and for
            `process`.
    """

    guidance: Guidance
    made_for: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def process(self) -> str | None:
        """The process whose times the levels are, such as "RectifiedFlow()"; None for sigmas."""
        found = self.measured.get(PROCESS)
        return None if found is None else str(found)

    def solver(self) -> Solver:
        """Return the solver that the settings are for; Heun where they name none.

        Raises:
            ErkGuidError: there is no such solver, or a value is out of range.
        """
        known = names_of_options()
        options = {name: value for name, value in self.made_for.items() if name in known}
        try:
            return make_solver(self.made_for.get("solver", "heun"), **options)
        except ValueError as error:
            raise ErkGuidError(f"unusable settings: {printable(error)}") from error

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        content = {
            FORMAT: VERSION,
            **settings_of(self.guidance),
            "made_for": self.made_for,
            "measured": self.measured,
        }
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read_settings(path: str | Path, *, times: bool = False) -> Settings:
    """Read the file of settings and check it.

    Args:
        path: the file.
        times: whether levels may be times of a process other than EDM's (`Settings.process`).

    Raises:
        ErkGuidError: it cannot be read, or is no file of settings; the message says what is wrong.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ErkGuidError(f"{path} is too large for a file of settings")
        content = json.loads(data)
    except OSError as error:
        raise ErkGuidError(
            f"cannot read {printable(path, 200)}: {error.strerror}; name a file of settings"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ErkGuidError(
            f"{path} is no file of settings (not JSON: {printable(error, 100)}); 'erk-guid fit' "
            "and 'erk-guid calibrate' write them"
        ) from error
    if not isinstance(content, dict) or FORMAT not in content:
        raise ErkGuidError(f"{path} is no file of settings; 'erk-guid fit' writes them")
    if content.pop(FORMAT) != VERSION:
        raise ErkGuidError(f"{path} was written by another version; this one reads {VERSION}")
    made_for, measured = content.pop("made_for", {}), content.pop("measured", {})
    if not isinstance(made_for, dict) or not isinstance(measured, dict):
        raise ErkGuidError(f"{path}: 'made_for' and 'measured' hold names and values")
    _check(path, content, _GUIDANCE)
    _check(path, made_for, _MADE_FOR)
    for name in ("w_stiff", "w_con"):
        if name not in content:
            raise ErkGuidError(f"{path} does not say {name}")
    for name, what in (("schedule", "noise levels"), ("response", "responses")):
        values = made_for.get(name)
        if isinstance(values, list):
            if not values or not all(_is_a(value, (float, int)) for value in values):
                raise ErkGuidError(f"{path}: the {what} of {name!r} must be numbers")
            made_for[name] = tuple(map(float, values))
    schedule, steps = made_for.get("schedule"), made_for.get("num_steps")
    if isinstance(schedule, tuple) and steps not in (None, len(schedule)):
        raise ErkGuidError(
            f"{path} says num_steps {steps} and lists {len(schedule)} noise levels; fit again, or "
            "correct it"
        )
    try:
        guidance = make_guidance(**content)
    except ValueError as error:
        raise ErkGuidError(f"{path}: {printable(error)}") from error
    found = Settings(guidance, made_for, measured)
    if found.process is not None and not times:
        raise ErkGuidError(
            f"{path} holds times of {printable(found.process, 60)}, not noise levels of an EDM "
            "network; use it in the program that it was fitted in"
        )
    return found


def _check(path: Path, found: dict[str, Any], known: dict[str, tuple[type, ...]]) -> None:
    for name, value in found.items():
        if name not in known:
            raise ErkGuidError(
                f"{path}: unknown entry {printable(name, 60)!r}; known: {', '.join(known)}"
            )
        if not _is_a(value, known[name]):
            raise ErkGuidError(f"{path}: {name} cannot be {printable(repr(value), 60)}")


def _is_a(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return False
    # In Python a bool is an int, but not for a reader of the file.
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
