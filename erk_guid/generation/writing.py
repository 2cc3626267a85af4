"""Write a batch's images while the next one is sampled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.pictures import save_png
from erk_guid.generation.images import Sampled
from erk_guid.models.encoders import Encoder

THREADS = {"cuda": 4}
"""Threads that write files, by device; 1 on others: on a CPU they take time from the network."""


class ImageWriter:
    """Decodes latents and saves the images, in the background as far as the device allows.

    On CUDA a batch is decoded on a stream of its own and copied to pinned memory, so that neither
    this process nor the stream of the sampler waits for it. Elsewhere decoding takes its time at
    once. PNG files are written by threads everywhere.

    Args:
        encoder: decodes latents.
        device: where they are.
        path: gives the file of a seed.
        about: gives the text to store in an image, from seed and class.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        path: Callable[[int], Path],
        about: Callable[[int, int | None], str],
    ) -> None:
        self._encoder, self._path, self._about = encoder, path, about
        self._pool = ThreadPoolExecutor(THREADS.get(device.type, 1))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def write(self, made: Sampled) -> list[Future[None]]:
        """Begin to write a batch; the results of the futures come when the files are there."""
        images, classes, copied = self._fetch(made)

        def save(k: int) -> None:
            if copied is not None:
                copied.synchronize()
            number = None if classes is None else int(classes[k])
            pixels: np.ndarray = images[k].numpy()
            save_png(self._path(made.seeds[k]), pixels, self._about(made.seeds[k], number))

        return [self._pool.submit(save, k) for k in range(len(made.seeds))]

    @torch.no_grad()
    def _fetch(self, made: Sampled) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
        """Return images and classes on the CPU, and the event after which they are there."""
        if self._stream is None:
            classes = None if made.labels is None else made.labels.argmax(1).cpu()
            return self._encoder.decode(made.latents).cpu(), classes, None
        self._stream.wait_stream(torch.cuda.current_stream(made.latents.device))
        with torch.cuda.stream(self._stream):
            images = _pinned(self._encoder.decode(made.latents))
            classes = None if made.labels is None else _pinned(made.labels.argmax(1))
            copied = torch.cuda.Event()
            copied.record(self._stream)
        for used in (made.latents, made.labels):
            if used is not None:
                used.record_stream(self._stream)  # its memory is not free before that
        return images, classes, copied


def _pinned(x: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory of the CPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def finish(pending: list[Future[None]], outdir: Path) -> None:
    """Wait for files.

    Raises:
        ErkGuidError: one of them cannot be written.
    """
    for future in pending:
        try:
            future.result()
        except OSError as error:
            raise ErkGuidError(f"cannot write an image to {outdir}: {error}") from error
