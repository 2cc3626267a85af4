"""Distance of a solver's results to the exact solution of the ODE, by number of evaluations.

`Problem` is a denoiser with start points and their exact end points: the mixtures of
`erk_guid.studies.accuracy.problems`, or a network with a fine solution of its own. `METHODS` are
the solvers compared. They include diffusers' schedulers as an outside check. `measure` runs them.

This is fidelity to the ODE. It does not say which images look better, or score better.
"""

from __future__ import annotations

from erk_guid.studies.accuracy.measuring import Table, measure
from erk_guid.studies.accuracy.methods import METHODS, Method
from erk_guid.studies.accuracy.problems import PROBLEMS, Problem, make_problem

__all__ = ["METHODS", "PROBLEMS", "Method", "Problem", "Table", "make_problem", "measure"]
