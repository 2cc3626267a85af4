"""Pixels <-> latents: how a network's outputs become images.

Final latents are what networks see (standard deviation 0.5); pixels are uint8 [N, C, H, W].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.sampling import finite_rows


class Encoder(Protocol):
    """An encoder as generation needs it: `decode`, and how to write it into a file."""

    @property
    def config(self) -> dict[str, Any]: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode float latents [N, C, h, w] to uint8 pixels [N, C', H, W] on the same device."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode uint8 pixels [N, C', H, W] to float32 latents [N, C, h, w] on the same device."""


DEFAULT_VAE_BATCH = 8
"""Images that a VAE encodes or decodes at a time, unless a file says otherwise."""

PIXELS = "0 to 1"
"""The range of the VAE's pixels, as written in records of runs."""

GENERATION_VAE_BATCH = 4
"""Latents decoded at a time while images are generated, whatever the file says (as EDM2 does)."""


class StandardRGBEncoder:
    """Pixels scaled to [-1, 1]; for networks that work on pixels, of any channel count."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32) / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        # Truncation after adding 128 (not 127.5) rounds to the nearest: 127.5 (x + 1) + 0.5.
        return (latents.to(torch.float32) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class StabilityVAEEncoder:
    """Stable Diffusion's VAE (sd-vae-ft-mse) as EDM2 uses it, with latents whitened per channel.

    EDM2's VAE works on pixels in [0, 1]; the pipelines of Stable Diffusion use [-1, 1]. Decoding
    clamps to [0, 1], multiplies by 255 and truncates. Encoding divides by 255. Latents of the
    published networks are wrong in every pixel under the other convention.

    Args:
        vae_name: name on the Hugging Face hub, or a local folder in diffusers' layout.
        raw_mean, raw_std: statistics of the VAE's own latents, per channel.
        final_mean, final_std: those of the latents the network sees.
        batch_size: images encoded or decoded at a time.

    The VAE is fetched (through diffusers) when the first image is decoded or encoded.
    """

    def __init__(
        self,
        vae_name: str = "stabilityai/sd-vae-ft-mse",
        raw_mean: Sequence[float] = (5.81, 3.25, 0.12, -2.15),
        raw_std: Sequence[float] = (4.17, 4.62, 3.71, 3.28),
        final_mean: float = 0.0,
        final_std: float = 0.5,
        batch_size: int = DEFAULT_VAE_BATCH,
    ) -> None:
        self.config: dict[str, Any] = {
            "vae_name": vae_name,
            "raw_mean": [float(v) for v in raw_mean],
            "raw_std": [float(v) for v in raw_std],
            "final_mean": float(final_mean),
            "final_std": float(final_std),
            "batch_size": int(batch_size),
        }
        self.vae_name = vae_name
        self.batch_size = batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        numbers = [*self.config["raw_mean"], *self.config["raw_std"], final_mean, final_std]
        if not all(math.isfinite(v) for v in numbers) or min(self.config["raw_std"]) <= 0:
            raise ValueError("the statistics must be finite, the deviations positive")
        std = torch.tensor(raw_std, dtype=torch.float32)
        self.scale = final_std / std
        self.bias = final_mean - torch.tensor(raw_mean, dtype=torch.float32) * self.scale
        self._vae: Any = None

    def _load(self, device: torch.device) -> Any:
        if self._vae is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError as error:
                raise MissingExtraError(
                    "diffusers", "diffusers", "decoding with the VAE"
                ) from error
            try:
                vae = AutoencoderKL.from_pretrained(self.vae_name, use_safetensors=True)
            except (OSError, ValueError) as error:
                raise ErkGuidError(
                    f"cannot get the VAE {self.vae_name!r}: not in the Hugging Face cache and not "
                    "to be downloaded. Put it into a folder (config.json and "
                    "diffusion_pytorch_model.safetensors) and name that with --vae"
                ) from error
            self._vae = vae.eval().requires_grad_(False)
        # Here, as a copy at every batch would wait for the device.
        self.scale, self.bias = self.scale.to(device), self.bias.to(device)
        return self._vae.to(device)

    def prepare(self, device: torch.device) -> None:
        """Fetch the VAE now instead of at the first image.

        Raises:
            ErkGuidError: it cannot be fetched, or diffusers is not installed.
        """
        self._load(device)

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the VAE's weights; None before it was fetched.

        A folder's name, and that of a repository, may come to mean other weights.
        """
        if self._vae is None:
            return None
        digest = hashlib.sha256()
        for name, value in sorted(self._vae.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's posterior (raw latents, not whitened).

        Args:
            pixels: uint8 [N, 3, H, W].

        Returns:
            Two float32 tensors [N, C, h, w].
        """
        vae = self._load(pixels.device)
        found = [
            vae.encode(batch.to(torch.float32) / 255).latent_dist
            for batch in pixels.split(self.batch_size)
        ]
        return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])

    def encode(
        self, pixels: Tensor, randn_like: Callable[[Tensor], Tensor] = torch.randn_like
    ) -> Tensor:
        """Draw latents from the VAE's posterior, and whiten them.

        Args:
            pixels: uint8 [N, 3, H, W].
            randn_like: makes the noise of the draw; `torch.zeros_like` gives the posterior's
                mean.

        Returns:
            ``(mean + std * noise) * scale + bias``, float32 [N, C, h, w].
        """
        mean, std = self.moments(pixels)
        raw = mean + std * randn_like(mean)
        return raw * self._per_channel(self.scale, raw) + self._per_channel(self.bias, raw)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_checked(latents)[0]

    def decode_checked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode latents [N, C, h, w]; also return for which the VAE gave finite numbers, [N]."""
        vae = self._load(latents.device)
        latents = latents.to(torch.float32)
        raw = (latents - self._per_channel(self.bias, latents)) / self._per_channel(
            self.scale, latents
        )
        images, finite = [], []
        for batch in raw.split(self.batch_size):
            pixels = vae.decode(batch).sample
            finite.append(finite_rows(pixels))
            # Keep 8-bit batches, not float ones; otherwise a large batch would not fit.
            images.append((pixels.clamp(0, 1) * 255).to(torch.uint8))
        return torch.cat(images), torch.cat(finite)

    @staticmethod
    def _per_channel(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like).reshape(1, -1, 1, 1)


def decode_checked(encoder: Encoder, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Decode latents; also say which images come from finite numbers.

    NaN and infinity would become pixels like any others.

    Returns:
        The pixels, see `Encoder.decode`, and bool [N]; on the same device, without waiting for it.
    """
    finite = finite_rows(latents)
    if isinstance(encoder, StabilityVAEEncoder):
        images, sound = encoder.decode_checked(latents)
        return images, finite & sound
    return encoder.decode(latents), finite


ENCODERS: dict[str, type[StandardRGBEncoder] | type[StabilityVAEEncoder]] = {
    "StandardRGBEncoder": StandardRGBEncoder,
    "StabilityVAEEncoder": StabilityVAEEncoder,
}
"""The encoders that files may name."""
