"""Run the notebooks of docs/notebooks and keep their outputs: `python scripts/notebooks.py`.

A notebook holds its outputs, so that it can be read where nothing runs. Each checks by assertions
what it says; a test runs them all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
SECONDS = 900
"""Longest time of a cell."""


def run(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message shows it.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which change with every run
    return notebook


def main() -> None:
    """Run the notebooks that are named, or all."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(path)


if __name__ == "__main__":
    main()
