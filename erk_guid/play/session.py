"""The answer to a choice: the same seeds by plain Heun, by the choice, and by a fine reference."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, reason_of
from erk_guid.edm2 import check_strength
from erk_guid.generation.config import GenerationConfig, Models
from erk_guid.generation.images import generate
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.generation.trace import NO_ROWS, Trace
from erk_guid.play.choice import Choice, Fit, number
from erk_guid.sampling import StepInfo
from erk_guid.schedules import SIGMA_MAX, SIGMA_MIN
from erk_guid.solvers import Heun, Modal, name_of

FINEST = 64
"""Evaluations of the reference; twice as many, or four times, where `FINER` asks for it."""
FINER = 4
"""The reference has at least so many times the evaluations of what it is compared with."""
KEPT = 12
"""Runs that are kept, the newest; a reference is one of them."""

Reader = Callable[[Sequence[str]], GenerationConfig]
"""Makes a config of options of the command line, and names every mistake (ErkGuidError)."""


@dataclass(frozen=True)
class Run:
    """What some options came to.

    Attributes:
        arguments: the options.
        config: what they stand for.
        seeds: of the images.
        images: uint8 [N, C, H, W].
        latents: where the run ended, [N, c, h, w].
        before_zero: where it was at its last noise level above 0, like latents.
        rows: of a trace, see `erk_guid.generation.trace`.
    """

    arguments: tuple[str, ...]
    config: GenerationConfig
    seeds: range
    images: Tensor
    latents: Tensor
    before_zero: Tensor
    rows: np.ndarray

    @property
    def evaluations(self) -> int:
        """Evaluations of the main network that an image took."""
        return self.config.evaluations().main

    @property
    def guide_evaluations(self) -> int:
        """Evaluations of the guiding network that an image took."""
        return self.config.evaluations().guide

    def distance_to(self, fine: Run) -> Distance:
        """Return how far the images are from those of a reference.

        A run that ends at its last noise level is compared with the reference there.
        """
        there = fine.latents if self.config.denoise_to_zero else fine.before_zero
        apart = (self.latents - there).double().flatten(1).norm(dim=1)
        error = apart.std() / len(apart) ** 0.5 if len(apart) > 1 else apart.new_full((), torch.nan)
        return Distance(float(apart.mean()), float(error))


@dataclass(frozen=True)
class Distance:
    """Euclidean distance of an image's latents to the reference's, over all of their elements.

    Attributes:
        mean: over the images.
        error: its standard error; NaN for a single image.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        mean, error = (f"{v:#.{n}g}".rstrip(".") for v, n in ((self.mean, 3), (self.error, 2)))
        return mean if math.isnan(self.error) else f"{mean} ± {error}"


@dataclass(frozen=True)
class Answer:
    """The runs of a choice; those that are still to come are None."""

    chosen: Run
    reference: Run | None = None
    plain: Run | None = None


class Session:
    """The networks, and the newest runs.

    Args:
        models: the networks; they stay as they are.
        network: options of the command line that name them.
        read: see `Reader`.
        fits: sources of fitted settings by name.
    """

    def __init__(
        self, models: Models, network: Sequence[str], read: Reader, fits: Mapping[str, Fit]
    ) -> None:
        self.models = models
        self.network = tuple(network)
        self.fits = dict(fits)
        self._read = read
        self._one_at_a_time = threading.Lock()
        self._run = lru_cache(maxsize=KEPT)(self._make)

    @classmethod
    def open(
        cls, network: Sequence[str], read: Reader, guided: bool, fits: Mapping[str, Fit]
    ) -> Session:
        """Load the networks, and check the files of settings.

        Args:
            network: options of the command line that name them.
            read: see `Reader`.
            guided: whether there is a guiding network.
            fits: sources of fitted settings by name.

        Raises:
            ErkGuidError: a file cannot be used, or the networks do not fit together.
        """
        for fit in fits.values():
            if not fit.takes_steps:
                read([*network, *(["--guidance=2"] if guided else []), *fit.arguments])
        # The guiding network is loaded for a strength other than 1 only.
        config = read([*network, *(["--guidance=2"] if guided else [])])
        models = config.open(config.choose_device(), ProcessGroup())
        return cls(models, network, read, fits)

    @property
    def guided(self) -> bool:
        """Whether there is a guiding network."""
        return self.models.guide is not None

    @property
    def classes(self) -> int:
        """Number of classes of the network; 0 without any."""
        return self.models.loaded.net.label_dim

    def run(self, choice: Choice) -> Run:
        """Return the run of a choice.

        Raises:
            ErkGuidError: the parts of the choice do not fit together.
        """
        return self._run(tuple(choice.arguments(self.guided, self.fits)), choice.seeds)

    def answer(self, choice: Choice) -> Iterator[Answer]:
        """Yield the answer to a choice, each time with one run more.

        Raises:
            ErkGuidError: the parts of the choice do not fit together.
        """
        chosen = self.run(choice)
        answer = Answer(chosen)
        yield answer
        answer = replace(answer, reference=self._run(self._reference(chosen), choice.seeds))
        yield answer
        yield replace(answer, plain=self._run(self._plain(chosen), choice.seeds))

    def _common(self, chosen: Run) -> list[str]:
        """Return the options of a run that its reference shares."""
        config = chosen.config
        shared = [f"--guidance={number(config.guidance)}"] if self.guided else []
        if config.class_idx is not None:
            shared.append(f"--class={config.class_idx}")
        for name, usual in (("sigma_min", SIGMA_MIN), ("sigma_max", SIGMA_MAX)):
            if (level := getattr(config, name)) != usual:
                shared.append(f"--{name}={number(level)}")
        return shared

    def _reference(self, chosen: Run) -> tuple[str, ...]:
        steps = FINEST
        while steps < FINER * chosen.evaluations:
            steps *= 2
        return (*self._common(chosen), f"--solver={name_of(Modal())}", f"--steps={steps}")

    def _plain(self, chosen: Run) -> tuple[str, ...]:
        """Return the options of plain Heun with as many evaluations, over the same noise levels.

        A run to 0 takes an odd number of them; one that stops at the last level an even number.
        """
        steps, odd = divmod(chosen.evaluations, 2)
        ending = [] if odd else ["--no-denoise-to-zero"]
        return (
            *self._common(chosen), f"--solver={name_of(Heun())}", f"--steps={steps + 1}", *ending,
        )  # fmt: skip

    def _make(self, arguments: tuple[str, ...], seeds: range) -> Run:
        config = self._read([*self.network, *arguments])
        models = replace(self.models, config=config)
        rows, above_zero = [NO_ROWS], []
        trace = Trace(rows.append)

        def callback(info: StepInfo) -> None:
            trace.callback(info)
            if info.step == info.num_steps - 1:
                above_zero.append((info.x_before if info.sigma_next == 0 else info.x).cpu())

        net = models.loaded.net
        with self._one_at_a_time:
            try:
                check_strength(config.guidance, getattr(torch, config.dtype))
                batches = generate(
                    net, seeds, batch_size=config.batch, callback=callback,
                    **models.generation_options,
                )  # fmt: skip
            except ValueError as error:
                raise ErkGuidError(reason_of(error)) from error
            made = []
            for batch in batches:
                trace.end_batch(batch.seeds)
                made.append((batch.images.cpu(), batch.latents.cpu()))
        return Run(
            arguments,
            config,
            seeds,
            images=torch.cat([images for images, _ in made]),
            latents=torch.cat([latents for _, latents in made]),
            before_zero=torch.cat(above_zero),
            rows=np.concatenate(rows),
        )
