"""Guidance of a solver's steps: the paper's form and the parameter-free form.

`FORMS` lists the forms that a word stands for, where users write ``w_stiff``; a number there is the
strength of the paper's form.
"""

from __future__ import annotations

from dataclasses import fields

from erk_guid.guidance.base import Guidance, Guided
from erk_guid.guidance.erk import (
    PAPER_SETTINGS,
    ERKGuidance,
    Gate,
    Measurement,
    dominant_eigenvector,
    nearest_paper_steps,
    stiffness,
)
from erk_guid.guidance.gaussian import ParameterFreeGuidance

__all__ = [
    "FORMS", "PAPER_SETTINGS", "ERKGuidance", "Gate", "Guidance", "Guided", "Measurement",
    "ParameterFreeGuidance", "dominant_eigenvector", "make_guidance", "nearest_paper_steps",
    "settings_of", "stiffness",
]  # fmt: skip

FORMS: dict[str, type[Guidance]] = {"auto": ParameterFreeGuidance}
"""Word to the form of guidance that it stands for; each is made without arguments."""


def make_guidance(w_stiff: float | str, **settings: object) -> Guidance:
    """Return guidance from settings as users write them.

    Args:
        w_stiff: a number, the strength of `ERKGuidance`, or a word of `FORMS`.
        settings: the other fields of `ERKGuidance`; None leaves one at its default. They have no
            part in the other forms.

    Raises:
        ValueError: an unknown word, a value out of range, or a setting beside a word that is not
            at its default.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(w_stiff, str):
        return ERKGuidance(w_stiff, **given)  # type: ignore[arg-type]
    if w_stiff not in FORMS:
        raise ValueError(
            f"w_stiff must be a number or {' or '.join(map(repr, FORMS))}, got {w_stiff!r}"
        )
    default = ERKGuidance()
    for name, value in given.items():
        if value != getattr(default, name):
            raise ValueError(f"{name} {value!r} has no part in w_stiff {w_stiff!r}; leave it out")
    return FORMS[w_stiff]()


def settings_of(guidance: Guidance) -> dict[str, float | str | None]:
    """Return guidance as `make_guidance` takes it: w_stiff, w_con, gate and bound.

    Raises:
        ValueError: neither a number nor a word stands for it.
    """
    numbers = guidance if isinstance(guidance, ERKGuidance) else ERKGuidance()
    found = {field.name: getattr(numbers, field.name) for field in fields(numbers)}
    if numbers is not guidance:
        words = [word for word, form in FORMS.items() if type(guidance) is form]
        if not words:
            raise ValueError(f"no word stands for {guidance!r}")
        found["w_stiff"] = words[0]
    return found
