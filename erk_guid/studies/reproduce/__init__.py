"""The paper's tables as a command: run rows, score them, report paper beside measured."""

from __future__ import annotations

from erk_guid.studies.reproduce.planning import Reproduction, plan
from erk_guid.studies.reproduce.report import write_report
from erk_guid.studies.reproduce.runner import run
from erk_guid.studies.reproduce.tables import PAPER_TABLES, TABLES, Row, choose_rows

__all__ = [
    "PAPER_TABLES",
    "TABLES",
    "Reproduction",
    "Row",
    "choose_rows",
    "plan",
    "run",
    "write_report",
]
