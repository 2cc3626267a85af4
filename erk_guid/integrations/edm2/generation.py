"""EDM2's `generate_images` and what belongs to it, built on `erk_guid.generate`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erk_guid.common.pictures import save_png
from erk_guid.edm2 import edm_sampler
from erk_guid.generation.devices import choose_device
from erk_guid.generation.folders import image_path
from erk_guid.generation.images import Batch, generate
from erk_guid.generation.seeds import SeededNoise, seeds_in
from erk_guid.models.checkpoints import PRESETS, Checkpoint, load
from erk_guid.models.checkpoints.trusted import EasyDict
from erk_guid.models.encoders import (
    GENERATION_VAE_BATCH,
    Encoder,
    StabilityVAEEncoder,
    StandardRGBEncoder,
)
from erk_guid.models.networks import Network

config_presets: dict[str, EasyDict] = {
    name: EasyDict(
        net=preset.net,
        **({"gnet": preset.gnet, "guidance": preset.guidance} if preset.gnet else {}),
    )
    for name, preset in PRESETS.items()
}
"""Keyword arguments of `generate_images` by preset, EDM2's presets and this package's own."""


def parse_int_list(s: str | Sequence[int]) -> list[int]:
    """Parse '1,2,5-10' into [1, 2, 5, 6, 7, 8, 9, 10]; return a list as it is.

    Raises:
        ValueError: a part is neither a whole number nor a range.
    """
    return seeds_in(s) if isinstance(s, str) else list(s)


class StackedRandomGenerator(SeededNoise):
    """One random stream per seed, for a whole batch; sizes include the batch axis."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]) -> None:
        super().__init__(seeds, torch.device(device))

    def _inner(self, size: Sequence[int]) -> list[int]:
        if not size or size[0] != len(self):
            raise ValueError(f"size must begin with the {len(self)} seeds, got {list(size)}")
        return list(size[1:])

    def randn(
        self, size: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Tensor:
        """Return standard normal noise, shaped `size`."""
        return super().randn(self._inner(size), dtype).to(device)

    def randint(self, high: int, size: Sequence[int], device: Any = None) -> Tensor:  # type: ignore[override]
        """Return whole numbers in [0, high), shaped `size` ([seeds])."""
        if self._inner(size):
            raise ValueError(f"size must be [{len(self)}], got {list(size)}")
        return super().randint(high).to(device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Return standard normal noise like `x` [seeds, ...]."""
        return self.randn(x.shape, x.dtype)


@dataclass(frozen=True)
class _Images:
    """The iterable that `generate_images` returns."""

    batches: Iterable[Batch]
    seeds: list[int]
    rounds: int
    outdir: Path | None
    subdirs: bool
    text: str

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[EasyDict]:
        made = 0
        for batch in self.batches:
            made += 1
            if self.outdir is not None:
                for seed, image in zip(batch.seeds, batch.images.cpu().numpy(), strict=True):
                    about = f"seed {seed}, {self.text}"
                    save_png(image_path(self.outdir, seed, self.subdirs), image, about)
            yield EasyDict({**batch.__dict__, "num_batches": self.rounds})
        for number in range(made, self.rounds):  # other processes have images in this round
            yield EasyDict(
                images=None, latents=None, noise=None, labels=None, seeds=[], indices=[],
                batch_idx=number, num_batches=self.rounds,
            )  # fmt: skip


def generate_images(
    net: str | Path | Checkpoint | Network,
    gnet: str | Path | Checkpoint | Network | None = None,
    encoder: Encoder | None = None,
    outdir: str | Path | None = None,
    subdirs: bool = False,
    seeds: Sequence[int] = range(16, 20),
    class_idx: int | None = None,
    max_batch_size: int = 32,
    encoder_batch_size: int | None = GENERATION_VAE_BATCH,
    verbose: bool = True,
    device: torch.device | str | None = None,
    sampler_fn: Callable[..., Tensor] = edm_sampler,
    **sampler_kwargs: Any,
) -> _Images:
    """Generate images, batch by batch, each only when requested; EDM2's function.

    Args:
        net, gnet: main and guiding network: a path, a URL, a preset's name, what `erk_guid.load`
            returns, or a module.
        encoder: turns latents into pixels; by default the file's.
        outdir: where to write ``{seed:06d}.png``; None writes nothing.
        subdirs: make a folder for every 1000 seeds.
        seeds: one image each.
        class_idx: make this class only; None draws one for each seed.
        max_batch_size: images at a time.
        encoder_batch_size: latents decoded at a time by a VAE; None leaves the encoder's own.
        verbose: print to stderr what is loaded.
        device: cuda, mps or cpu; None takes the best present.
        sampler_fn: ``fn(net, noise, labels=, gnet=, randn_like=, **sampler_kwargs)``.
        sampler_kwargs: e.g. ``num_steps=8, guidance=1.4, w_stiff=0.5``.

    Returns:
        An iterable with ``len()``. Its items have `images` (uint8 [N, C, H, W]), `latents`,
        `noise`, `labels`, `seeds`, `indices`, `batch_idx`, `num_batches`, as attributes and as
        keys. Under torchrun each process has its share; `images` is None in a round in which
        that is empty.

    Raises:
        ErkGuidError: a network that cannot be loaded or used.
        ValueError: a class that does not exist, a guiding network that does not fit, or a module
            that makes latents without an encoder.
    """
    place = choose_device(str(device) if device is not None else None)
    main, own = _network(net, place, verbose)
    guide = _network(gnet, place, verbose)[0] if gnet is not None else None
    if sampler_kwargs.get("guidance", 1) != 1 and guide is None:
        warnings.warn(
            f"guidance={sampler_kwargs['guidance']} without gnet: as in EDM2, the network guides "
            "itself, which changes nothing and costs a second evaluation",
            stacklevel=2,
        )
        guide = main
    if encoder is None and own is None and main.img_channels not in (1, 3):
        raise ValueError(
            f"the network makes {main.img_channels} channels, which are no pixels; pass encoder= "
            "(a path or preset in place of the module brings its own)"
        )
    encoder = encoder or own or StandardRGBEncoder()
    if isinstance(encoder, StabilityVAEEncoder) and encoder_batch_size is not None:
        encoder = StabilityVAEEncoder(**{**encoder.config, "batch_size": encoder_batch_size})
    rank, world_size = _place()
    listed = [int(seed) for seed in seeds]
    batches = generate(
        main, listed, encoder=encoder, gnet=guide, class_idx=class_idx, batch_size=max_batch_size,
        device=place, sampler_fn=sampler_fn, rank=rank, world_size=world_size, **sampler_kwargs,
    )  # fmt: skip
    rounds = max(-(-len(listed) // (max_batch_size * world_size)), 1)
    given = ", ".join(f"{name} {value}" for name, value in sampler_kwargs.items())
    return _Images(
        batches, listed, rounds, None if outdir is None else Path(outdir), subdirs, given
    )


def _network(
    net: str | Path | Checkpoint | Network, device: torch.device, verbose: bool
) -> tuple[Network, Encoder | None]:
    if isinstance(net, Checkpoint):
        return net.net.to(device), net.encoder
    if not isinstance(net, (str, Path)):
        return net.to(device), None
    if verbose and _place()[0] == 0:
        print(f"Loading network from {net} ...", file=sys.stderr)
    loaded = load(net, device)
    return loaded.net, loaded.encoder


def _place() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
