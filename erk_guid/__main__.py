"""``python -m erk_guid`` is ``erk-guid``."""

from erk_guid.cli import main

main(prog_name="python -m erk_guid")
