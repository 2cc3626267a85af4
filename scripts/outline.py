#!/usr/bin/env python3
"""Write erk_guid/cli/outline.json: what the command lines say before they import anything.

python scripts/outline.py
"""

from __future__ import annotations

from importlib.resources import as_file, files

from erk_guid.cli.outline import FILE, text

if __name__ == "__main__":
    with as_file(files("erk_guid.cli").joinpath(FILE)) as path:
        path.write_text(text())
