"""From seeds to batches of images, as an iterable: nothing here writes files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor

from erk_guid.edm2 import edm_sampler
from erk_guid.generation.nonfinite import NonFiniteImagesError, Watch
from erk_guid.generation.seeds import SeededNoise, unique
from erk_guid.models.encoders import Encoder, StandardRGBEncoder, decode_checked
from erk_guid.models.networks import Network

BATCH_SIZE = 32
"""Images at a time, where nothing else is asked for."""


@dataclass(frozen=True)
class Sampled:
    """A batch of latents, with what they were made from; see `Batch`."""

    latents: Tensor
    noise: Tensor
    labels: Tensor | None
    seeds: list[int]
    indices: list[int]


@dataclass(frozen=True)
class Batch(Sampled):
    """A batch of images, with what they were made from.

    Attributes:
        images: uint8 [N, C, H, W], decoded.
        latents: what the sampler returned, [N, c, h, w].
        noise: unit-variance noise the sampler began with, float32 [N, c, h, w].
        labels: one-hot rows, float32 [N, label_dim]; None for an unconditional network.
        seeds: the seeds, in order.
        indices: their places in the list of all seeds.
        batch_idx, num_batches: which batch of how many (of this process).
    """

    images: Tensor
    batch_idx: int
    num_batches: int


@dataclass(frozen=True)
class _Generation:
    """The iterable that `generate` returns."""

    net: Network
    seeds: Sequence[int]
    encoder: Encoder
    gnet: Network | None
    class_idx: int | None
    device: torch.device
    sampler_fn: Callable[..., Tensor]
    sampler_options: dict[str, Any]
    shares: list[range] = field(repr=False)

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[Batch]:
        for batch_idx, indices in enumerate(self.shares):
            made = self.sample(indices)
            with torch.no_grad():
                images, finite = decode_checked(self.encoder, made.latents)
            if not bool(finite.all()):
                raise self.failure(
                    [k for k, f in zip(indices, finite.tolist(), strict=True) if not f]
                )
            yield Batch(**vars(made), images=images, batch_idx=batch_idx, num_batches=len(self))

    @torch.no_grad()
    def sample(self, indices: Sequence[int], watch: Watch | None = None) -> Sampled:
        """Return the latents of some of the seeds; on CUDA, without waiting for them.

        Args:
            indices: places in the list of seeds.
            watch: what looks at the networks, and waits for them.
        """
        net: Callable[..., Tensor] = self.net
        gnet: Callable[..., Tensor] | None = self.gnet
        if watch is not None:
            net = watch.network(net, "the network")
            gnet = gnet and watch.network(gnet, "the guiding network")
        seeds = [int(self.seeds[i]) for i in indices]
        random = SeededNoise(seeds, self.device)
        noise, labels = draw(self.net, random, self.class_idx)
        latents = self.sampler_fn(
            net,
            noise,
            labels=labels,
            gnet=gnet,
            randn_like=random.randn_like,
            **self.sampler_options,
        )
        if getattr(latents, "shape", None) != noise.shape:
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(
                f"sampler_fn must return samples shaped like the noise, {list(noise.shape)}, got "
                f"{got}"
            )
        return Sampled(latents, noise, labels, seeds, list(indices))

    def failure(self, indices: list[int]) -> NonFiniteImagesError:
        """Return the error for images that are not finite; they are sampled again to see where."""
        watch = Watch()
        if self.sampler_fn is edm_sampler:
            options = {**self.sampler_options, "callback": watch, "check_finite": False}
            replace(self, sampler_options=options).sample(indices, watch)
        return NonFiniteImagesError([int(self.seeds[i]) for i in indices], indices, watch.found)


def draw(net: Network, random: SeededNoise, class_idx: int | None) -> tuple[Tensor, Tensor | None]:
    """Draw the start of the images: unit-variance noise [N, C, H, W], and one-hot labels or None.

    Args:
        net: gives the shape and the number of classes.
        random: the seeds' streams, not yet drawn from.
        class_idx: this class only; None draws one for each seed.
    """
    noise = random.randn([net.img_channels, net.img_resolution, net.img_resolution])
    if not net.label_dim:
        return noise, None
    # Drawn even when a class is given, as in EDM2, so that the stream stays the same.
    classes = random.randint(net.label_dim)
    if class_idx is not None:
        classes = torch.full_like(classes, class_idx)
    return noise, torch.nn.functional.one_hot(classes, net.label_dim).to(torch.float32)


def generate(
    net: Network,
    seeds: Sequence[int],
    *,
    encoder: Encoder | None = None,
    gnet: Network | None = None,
    class_idx: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str | None = None,
    sampler_fn: Callable[..., Tensor] = edm_sampler,
    rank: int = 0,
    world_size: int = 1,
    **sampler_options: Any,
) -> _Generation:
    """Generate the images of a list of seeds, batch by batch, each only when requested.

    An image depends on its seed, not on the batch size, the rank or the number of processes
    (except for floating-point order). Seed k has its own random stream, see `SeededNoise`.

    Args:
        net: a network with `img_resolution`, `img_channels`, `label_dim`, called as
            ``net(x, sigma, class_labels)``.
        seeds: one image each.
        encoder: turns latents into pixels; `StandardRGBEncoder` by default.
        gnet: guiding network for model guidance (pass ``guidance=`` too).
        class_idx: make this class only; by default each seed draws its own.
        batch_size: largest number of images at a time.
        device: where the noise is drawn and the network is; by default the network's.
        sampler_fn: any function ``fn(net, noise, labels=None, gnet=None, randn_like=..., **more)``.
        rank, world_size: this process's share of the batches.
        sampler_options: passed to `sampler_fn` unchanged, e.g. ``num_steps=8, w_stiff=0.5``.

    Returns:
        An iterable of `Batch`, with ``len()``; it is empty in a process without a share.

    Raises:
        ValueError: a class the network does not have, a guiding network of another shape, a
            batch size below 1, a rank out of range, or two seeds that give one image.
        TypeError: a seed is no whole number.
        NonFiniteImagesError: while iterating: images came out as NaN or infinity; it names their
            seeds and indices, and the step.
    """
    if sampler_fn is edm_sampler:  # what comes out is looked at together with the pixels
        sampler_options = {"check_finite": False, **sampler_options}
    check_networks(net, gnet, class_idx)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
    if device is None:
        device = next(net.parameters()).device
    seeds = [index(seed) for seed in seeds]
    unique(seeds)  # of two that give one image, it names both
    shares = [
        part for part in divided(len(seeds), batch_size, world_size)[rank::world_size] if part
    ]
    return _Generation(
        net=net,
        seeds=seeds,
        encoder=encoder or StandardRGBEncoder(),
        gnet=gnet,
        class_idx=class_idx,
        device=torch.device(device),
        sampler_fn=sampler_fn,
        sampler_options=sampler_options,
        shares=shares,
    )


def divided(count: int, batch_size: int, world_size: int = 1) -> list[range]:
    """Divide 0 to count - 1 into batches of nearly equal size, as many for every process.

    Some are empty where there are fewer images than processes.
    """
    rounds = max(-(-count // (batch_size * world_size)), 1)
    size, larger = divmod(count, rounds * world_size)
    starts = [k * size + min(k, larger) for k in range(rounds * world_size + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def check_networks(net: Network, gnet: Network | None = None, class_idx: int | None = None) -> None:
    """Refuse a class that does not exist, or a guiding network that does not fit.

    Raises:
        ValueError: the message names what is wrong.
    """
    if class_idx is not None:
        if isinstance(class_idx, bool) or not isinstance(class_idx, int):
            raise ValueError(f"class must be a whole number, got {class_idx!r}")
        if not net.label_dim:
            raise ValueError(f"class {class_idx} asked of an unconditional network; leave it out")
        if not 0 <= class_idx < net.label_dim:
            raise ValueError(f"class {class_idx} is outside 0 to {net.label_dim - 1}")
    if gnet is not None:
        for what in ("img_channels", "img_resolution"):
            if getattr(gnet, what) != getattr(net, what):
                raise ValueError(
                    f"the guiding network has {what} {getattr(gnet, what)}, the main one "
                    f"{getattr(net, what)}; they must agree"
                )
        if gnet.label_dim not in (0, net.label_dim):
            raise ValueError(
                f"the guiding network has {gnet.label_dim} classes, the main one {net.label_dim}; "
                "it must have as many, or none"
            )
