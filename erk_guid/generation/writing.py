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
from erk_guid.models.encoders import Encoder, decode_checked

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
        run: which run's images they are, see `folders.fingerprint`.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        path: Callable[[int], Path],
        about: Callable[[int, int | None], str],
        run: str = "",
    ) -> None:
        self._encoder, self._path, self._about, self._run = encoder, path, about, run
        self._pool = ThreadPoolExecutor(THREADS.get(device.type, 1))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def write(self, made: Sampled) -> list[Future[bool]]:
        """Begin to write a batch; the results of the futures come when the files are there.

        The result is False for an image that came from NaN or infinity: it is not written.
        """
        images, finite, classes, copied = self._fetch(made)

        def save(k: int) -> bool:
            if copied is not None:
                copied.synchronize()
            if not bool(finite[k]):
                return False
            number = None if classes is None else int(classes[k])
            pixels: np.ndarray = images[k].numpy()
            # A folder that vanished is not made again: what it held would be missing.
            target = self._path(made.seeds[k])
            text = self._about(made.seeds[k], number)
            save_png(target, pixels, text, make_folder=False, run=self._run)
            return True

        return [self._pool.submit(save, k) for k in range(len(made.seeds))]

    @torch.no_grad()
    def _fetch(
        self, made: Sampled
    ) -> tuple[Tensor, Tensor, Tensor | None, torch.cuda.Event | None]:
        """Return images, which are finite, and classes, and the event after which they are there.

        All are on the CPU.
        """
        if self._stream is None:
            classes = None if made.labels is None else made.labels.argmax(1).cpu()
            images, finite = decode_checked(self._encoder, made.latents)
            return images.cpu(), finite.cpu(), classes, None
        self._stream.wait_stream(torch.cuda.current_stream(made.latents.device))
        with torch.cuda.stream(self._stream):
            decoded = decode_checked(self._encoder, made.latents)
            images, finite = _pinned(decoded[0]), _pinned(decoded[1])
            classes = None if made.labels is None else _pinned(made.labels.argmax(1))
            copied = torch.cuda.Event()
            copied.record(self._stream)
        for used in (made.latents, made.labels):
            if used is not None:
                used.record_stream(self._stream)  # its memory is not free before that
        return images, finite, classes, copied


def _pinned(x: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory of the CPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def finish(pending: list[Future[bool]], outdir: Path) -> list[bool]:
    """Wait for files, and return for each whether it was written.

    Raises:
        ErkGuidError: one of them cannot be written.
    """
    try:
        return [future.result() for future in pending]
    except OSError as error:
        raise ErkGuidError(f"cannot write an image to {outdir}: {error}") from error
