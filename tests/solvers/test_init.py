"""Solvers by name."""

from __future__ import annotations

import pytest

from erk_guid.solvers import make_solver


def test_options_that_do_not_belong_are_refused() -> None:
    with pytest.raises(ValueError, match="'heun' has no option 'order'; it takes no options"):
        make_solver("heun", order=2)
    with pytest.raises(ValueError, match="'deis' has no option 'r'; it takes order, deis_mode"):
        make_solver("deis", r=0.5)
    for name, options, message in (
        ("deis", {"order": 5}, "deis combines 1 to 4 evaluations, got order 5"),
        ("dpmpp", {"order": 4}, "dpmpp combines 1 to 3"),
        ("ipndm", {"order": 1.5}, "ipndm combines 1 to 4"),
        ("deis", {"deis_mode": "exact"}, "'tab' or 'rhoab'"),
        ("unipc", {"variant": "bh3"}, "'bh1' or 'bh2'"),
        ("dpm2", {"r": 1.5}, "r must be above 0 and at most 1"),
        ("dpm2", {"r": "0.5"}, "r must be above 0 and at most 1, got '0.5'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_solver(name, **options)
