"""A run as text that makes the same images: a command line, and a program."""

from __future__ import annotations

import inspect
import shlex
from typing import Any

import torch

from erk_guid.edm2 import edm_sampler
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.images import BATCH_SIZE
from erk_guid.guidance import Guidance
from erk_guid.play.session import Run
from erk_guid.solvers import Solver

SCRIPT = "generate_images.py"
OUTDIR = "out"


def as_command_line(run: Run, network: tuple[str, ...]) -> str:
    """Return the command line that makes the run's images, for a POSIX shell.

    Args:
        run: the run.
        network: the options that name the networks.
    """
    first, last = run.seeds[0], run.seeds[-1]
    seeds = f"--seeds={first}" if first == last else f"--seeds={first}-{last}"
    return shlex.join(["python", SCRIPT, *network, *run.arguments, seeds, f"--outdir={OUTDIR}"])


def as_python(run: Run) -> str:
    """Return the program that makes the run's images, as `images`, uint8 [N, C, H, W]."""
    config = run.config
    # Models are named as `load` takes them; what `generate` has as its default is left out.
    loading = _loading(config)
    guided = config.gnet is not None and config.guidance != 1
    options = {
        "gnet": "guide.net" if guided else None,
        "class_idx": None if config.class_idx is None else repr(config.class_idx),
        "batch_size": None if config.batch == BATCH_SIZE else repr(config.batch),
        **{name: _written(value) for name, value in _not_default(config).items()},
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    lines = [
        "import torch",
        "import erk_guid",
        "",
        f"model = erk_guid.load({config.net!r}{loading})",
        *([f"guide = erk_guid.load({config.gnet!r}{loading})"] if guided else []),
        "batches = erk_guid.generate(",
        "    model.net,",
        f"    {run.seeds!r},",
        "    encoder=model.encoder,",
        *(f"    {option}," for option in given),
        ")",
        "images = torch.cat([batch.images for batch in batches])  # uint8 [N, C, H, W]",
    ]
    return "\n".join(lines) + "\n"


def _loading(config: GenerationConfig) -> str:
    """Return the further arguments of `load`."""
    device = config.choose_device()
    options: dict[str, Any] = {
        "device": None if device.type == "cpu" else str(device),
        "trust": config.trust_pickle or None,
        "precision": config.precision,
    }
    return "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)


def _not_default(config: GenerationConfig) -> dict[str, Any]:
    """Return the sampler's options that differ from its own defaults."""
    parameters = inspect.signature(edm_sampler).parameters
    return {
        name: value
        for name, value in config.sampler_options.items()
        if value != parameters[name].default
    }


def _written(value: Any) -> str:
    """Return a value as Python text, by names that `erk_guid` and `torch` have."""
    if isinstance(value, Solver):
        return f"erk_guid.solvers.{value!r}"
    if isinstance(value, Guidance):
        return f"erk_guid.{value!r}"
    if isinstance(value, torch.dtype):
        return str(value)
    return repr(value)
