"""Distance of a solver's results to the exact solution of the ODE, by number of evaluations.

`Problem` is a denoiser with start points and their exact end points: the mixtures of
`erk_guid.studies.accuracy.problems`, or a network with a fine solution of its own. `METHODS` are
the solvers compared. They include diffusers' schedulers as an outside check. `measure` runs them
at some numbers of evaluations. `as_near` says how many each needs to be as near as plain Heun.

This is fidelity to the ODE. It does not say which images look better, or score better.
"""

from __future__ import annotations

from erk_guid.studies.accuracy.measuring import Table, measure
from erk_guid.studies.accuracy.methods import METHODS, Method
from erk_guid.studies.accuracy.nearness import Nearness, as_near
from erk_guid.studies.accuracy.problems import PROBLEMS, Problem, make_problem

__all__ = [
    "METHODS", "PROBLEMS", "Method", "Nearness", "Problem", "Table", "as_near", "make_problem",
    "measure",
]  # fmt: skip
