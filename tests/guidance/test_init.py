"""Guidance as users write it."""

from __future__ import annotations

import pytest
from guidance.test_gaussian import AUTO

from erk_guid.guidance import (
    ERKGuidance,
    make_guidance,
    settings_of,
)


def test_settings_as_users_write_them() -> None:
    for name, value in (("w_con", 0.1), ("bound", 0.2), ("gate", "step")):
        with pytest.raises(ValueError, match=f"{name} .* has no part in w_stiff 'auto'"):
            make_guidance("auto", **{name: value})
    for given in ((0.5, {"w_con": 0.2, "bound": 0.1, "gate": "step"}), (0.5, {}), ("auto", {})):
        guidance = make_guidance(given[0], **given[1])
        assert make_guidance(**settings_of(guidance)) == guidance
    assert make_guidance("auto", w_con=0.5, gate="stiffness") == make_guidance("auto") == AUTO
    assert make_guidance(0.5) == ERKGuidance(0.5)
    with pytest.raises(ValueError, match="no word stands for"):
        settings_of(object())  # type: ignore[arg-type]
