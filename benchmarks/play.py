#!/usr/bin/env python3
"""Time what the playground shows for 16 digits in 8 steps: `python benchmarks/play.py`.

Each line is one press of the button: seconds until one's own images are there, and until all is.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from erk_guid.cli.play import config_of, first_choice, fits_of
from erk_guid.play.session import Session

NETWORKS = ("--preset=digits", "--gnet=uncond:digits")


def main() -> None:
    """Print the seconds of each choice."""
    session = Session.open(NETWORKS, config_of, True, fits_of("digits", None))
    first = first_choice("digits", 1.0)
    modal = replace(first, solver="modal", form="none")
    print(f"{torch.get_num_threads()} threads; own images, all")
    for name, choice in (
        ("heun", first),
        ("heun, again with another strength", replace(first, w_stiff=0.3)),
        ("modal", modal),
        ("modal, again from another seed", replace(modal, first_seed=100)),
    ):
        began = time.monotonic()
        seconds = [time.monotonic() - began for _ in session.answer(choice)]
        print(f"{name}: {seconds[0]:.2f} s, {seconds[-1]:.2f} s")


if __name__ == "__main__":
    main()
