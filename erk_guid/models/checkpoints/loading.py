"""One function to open a network from any source."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from erk_guid.common.datasets import refuse_overwriting
from erk_guid.common.errors import CheckpointError, ErkGuidError, printable, reason_of
from erk_guid.common.files import check_writable, sha256_of, shipped_file, with_home
from erk_guid.models.checkpoints.build import NETWORKS, own_memory
from erk_guid.models.checkpoints.download import download, how_to_refetch, is_url
from erk_guid.models.checkpoints.folder import (
    digest_of_settings,
    fetch_from_hub,
    hub_name,
    is_model,
    read_model,
    weights_in,
)
from erk_guid.models.checkpoints.native import has_header, read_native, save_network
from erk_guid.models.checkpoints.presets import PRESETS, SHIPPED, Preset
from erk_guid.models.checkpoints.snapshot import read_snapshot
from erk_guid.models.checkpoints.trusted import read_trusted
from erk_guid.models.encoders import ENCODERS, Encoder, StandardRGBEncoder
from erk_guid.models.networks import Network, Unconditional
from erk_guid.models.networks.compiling import can_compile
from erk_guid.models.networks.precond import Preconditioned
from erk_guid.models.networks.precond import freeze as frozen

PRECISIONS = ("float32", "bfloat16", "float16")
"""What networks can be told to compute in."""
UNCONDITIONAL = "uncond:"
"""Prefix of a source whose class-conditional network is run without classes."""


@dataclass(frozen=True)
class Checkpoint:
    """A network and what is known about its file.

    Attributes:
        net: the network, in evaluation mode, asking for no gradients; called as
            ``net(x, sigma, class_labels)``, with `img_resolution`, `img_channels`, `label_dim`.
        encoder: turns the network's output into pixels.
        source: the name given to `load`: a preset's name, a path or a URL.
        path: the local file.
        format: "safetensors", "diffusers", "pkl", or "pkl (trusted)".
        metadata: further text from the header, such as how the network was trained.
        preset: the preset named `source`, if there is one; it also names the guiding network.
        unconditional: whether `net` was wrapped to ignore class labels ("uncond:" sources).
    """

    net: Network = field(repr=False)
    encoder: Encoder = field(repr=False)
    source: str
    path: Path
    format: str
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    preset: Preset | None = None
    unconditional: bool = False

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file (reads all of it)."""
        return sha256_of(self.path)

    @property
    def fingerprint(self) -> str:
        """The file's hash and how it is used; what the network computes depends on both."""
        beside = digest_of_settings(self.path) if self.format == "diffusers" else ""
        return (UNCONDITIONAL if self.unconditional else "") + self.sha256 + beside

    def without_classes(self, source: str) -> Checkpoint:
        """Return the same network, run without classes, as `load(source)` would."""
        return replace(
            self, net=Unconditional(self.net), source=source, unconditional=True,
            preset=PRESETS.get(source.removeprefix(UNCONDITIONAL)),
        )  # fmt: skip


def load(
    name_or_path_or_url: str | Path,
    device: torch.device | str | None = None,
    trust: bool = False,
    *,
    precision: str | None = None,
    compile: bool = False,
    freeze: bool = True,
) -> Checkpoint:
    """Open a network: a preset's name, a `.pkl` or `.safetensors` file, or a URL of either.

    EDM2 networks in diffusers' layout can be opened too, by a model's folder
    (``unet/config.json``, a VAE in ``vae/``) or by its name on the Hugging Face hub,
    ``owner/name[/folder][@revision]``.

    Args:
        name_or_path_or_url: for a preset, its main network is opened. With "uncond:" in front,
            the network ignores class labels (for classifier-free guidance, as `gnet`).
        device: where to put it; None leaves it on the CPU.
        trust: run the code inside a `.pkl`, for networks whose class is not ours. Only for files
            from authors you trust.
        precision: "float32", "bfloat16" or "float16": what the network computes in. Float16 is
            for CUDA: elsewhere a line on stderr says that it is float32. None is what the file asks
            for: float16 on CUDA for most published ones.
        compile: compile the network with `torch.compile`, when it is first called. Where that does
            not work (on a CPU it needs a C++ compiler), a line on stderr says so.
        freeze: return the inference form of our own networks, see `erk_guid.models.freeze`. With
            False the network can be trained and saved, and has the file's own weights in their own
            dtypes; it is slower.

    Raises:
        ValueError: another precision.
        CheckpointError: the file is damaged, unsafe or of an unknown kind.
        ErkGuidError: there is no such preset or file, or it cannot be downloaded.
    """
    source = str(name_or_path_or_url)
    if source.startswith(UNCONDITIONAL):
        loaded = load(
            source.removeprefix(UNCONDITIONAL), device, trust,
            precision=precision, compile=compile, freeze=freeze,
        )  # fmt: skip
        return loaded.without_classes(source)
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    path = locate(source)
    try:
        loaded = _read(path, source, trust)
    except Exception as error:
        remedy = how_to_refetch(path) if is_url(_address(source)) else ""
        raise CheckpointError(f"{source}: {_reason(error)}{remedy}") from error
    loaded.net.to(device or "cpu")
    if precision is not None:
        _set_precision(loaded.net, source, precision, torch.device(device or "cpu"))
    if freeze and isinstance(loaded.net, Preconditioned):
        frozen(loaded.net, inplace=True)
    elif loaded.format in ("safetensors", "diffusers"):
        assert isinstance(loaded.net, nn.Module)
        own_memory(loaded.net)
    if compile and can_compile(torch.device(device or "cpu")):
        assert isinstance(loaded.net, nn.Module)
        loaded.net.compile()
    return replace(loaded, preset=PRESETS.get(source))


def _reason(error: Exception) -> str:
    """Return why a file cannot be used."""
    if isinstance(error, CheckpointError):
        return printable(error)
    if isinstance(error, OSError):
        return f"cannot read it: {error}"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    # The last check, for files made to pass all checks before it.
    return printable(f"damaged ({type(error).__name__}: {error})")


def _set_precision(net: Any, source: str, precision: str, device: torch.device) -> None:
    if not isinstance(net, tuple(NETWORKS.values())):
        raise ErkGuidError(
            f"{source}: a precision of {precision} cannot be asked of a network whose code is in "
            "its file"
        )
    dtype: torch.dtype = getattr(torch, precision)
    lacking = {
        torch.float16: device.type != "cuda" and "float16 is for CUDA",
        torch.bfloat16: device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
        and "bfloat16 needs a GPU of the Ampere generation or later",
    }.get(dtype)
    if lacking:
        print(f"{lacking}; on {device} {source} computes in float32", file=sys.stderr)
        dtype = torch.float32
    ours: Any = net
    ours.precision = dtype


def _address(source: str) -> str:
    """Return the path, URL or name of the network that a source stands for."""
    source = source.removeprefix(UNCONDITIONAL)
    return PRESETS[source].net if source in PRESETS else source


def locate(source: str, refresh: bool = False) -> Path:
    """Return the local file behind anything `load` takes; download it if needed.

    Args:
        source: as `load` takes it.
        refresh: download it again if it is a URL, or a preset that is downloaded from one.

    Raises:
        ErkGuidError: there is none; the message suggests close preset names.
    """
    address = _address(source)
    if is_url(address):
        return download(address, refresh=refresh)
    path = _local(address) or fetch_from_hub(address)
    if path is None:
        raise _unknown(address)
    return path


def check_source(source: str) -> None:
    """Refuse what no network can be behind. Nothing is fetched, and no file is opened.

    Args:
        source: as `load` takes it. A URL passes, and so does what may be a name on the hub.

    Raises:
        ErkGuidError: see `locate`.
    """
    address = _address(source)
    if not is_url(address) and _local(address) is None and hub_name(address) is None:
        raise _unknown(address)


def _local(address: str) -> Path | None:
    """Return the file of a path or of a shipped network, or None if there is none."""
    if address.startswith(SHIPPED):
        return shipped_file(address.removeprefix(SHIPPED))
    if not address:
        raise ErkGuidError("the name of the network is empty")
    path = with_home(address)
    # Not the methods of a Path: a name that is too long is an error there.
    if os.path.isdir(path):
        return weights_in(path)
    return path if os.path.isfile(path) else None


def _unknown(address: str) -> ErkGuidError:
    close = get_close_matches(address, PRESETS, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else " ('erk-guid presets' lists them)"
    return ErkGuidError(f"{printable(address, 200)!r} is no file, no URL and no preset{hint}")


def _read(path: Path, source: str, trust: bool) -> Checkpoint:
    with open(path, "rb") as file:
        start = file.read(16)
    # By content, not by suffix: cached downloads and renamed files keep working. A safetensors
    # file begins with the length of its JSON header and a brace.
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        if not has_header(path) and is_model(path):
            return Checkpoint(*read_model(path), source, path, "diffusers")
        net, encoder, metadata = read_native(path)
        return Checkpoint(net, encoder, source, path, "safetensors", metadata)
    if start.lstrip()[:1] == b"<":
        raise CheckpointError("it is a web page, not a checkpoint; download the file itself")
    if start[:4] == b"PK\x03\x04":
        raise CheckpointError("it is a zip archive (perhaps a torch.save file), not a snapshot")
    if not trust:
        net, encoder = read_snapshot(path)
        return Checkpoint(net, encoder, source, path, "pkl")

    print(f"Running the code inside {path}, as asked by --trust-pickle", file=sys.stderr)
    data = read_trusted(path)
    net = _ForeignNetwork(data["ema"], source).eval().requires_grad_(False)
    encoder = data.get("encoder") or StandardRGBEncoder()
    return Checkpoint(net, _adapted(encoder), source, path, "pkl (trusted)")


class _ForeignNetwork(nn.Module):
    """A network whose code is in a trusted file: what goes wrong in it is told as the file's."""

    def __init__(self, net: Any, source: str) -> None:
        super().__init__()
        self.net = net
        self.source = source
        self.img_resolution: int = net.img_resolution
        self.img_channels: int = net.img_channels
        self.label_dim: int = net.label_dim

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        try:
            out = self.net(x, sigma, class_labels)
        except torch.cuda.OutOfMemoryError:
            raise  # not the code's fault: callers ask for a smaller batch
        except Exception as error:  # the file's own code may raise anything
            reason = printable(f"{type(error).__name__}: {error}", 200)
            raise CheckpointError(f"{self.source}: its network failed ({reason})") from error
        if not isinstance(out, torch.Tensor) or out.shape != x.shape:
            found = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise CheckpointError(
                f"{self.source}: its network returned {found} for an x of {list(x.shape)}, where "
                "it should return the denoised x"
            )
        return out

    def compile(self, *args: Any, **options: Any) -> None:
        self.net.compile(*args, **options)


class _ForeignEncoder:
    """An encoder from a trusted file, with `decode` and `encode` named as in EDM2."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.config: dict[str, Any] = {}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._encoder.decode(latents)
        return pixels

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self._encoder.encode(pixels)
        return latents


def _adapted(encoder: Any) -> Encoder:
    ours: Encoder = encoder
    return ours if isinstance(encoder, tuple(ENCODERS.values())) else _ForeignEncoder(encoder)


def convert(source: str | Path, dest: str | Path, *, overwrite: bool = False) -> Checkpoint:
    """Write the network behind `source` (anything `load` takes, unless trusted) as safetensors.

    The weights keep their dtypes, so both files compute the same, bit for bit.

    Args:
        source: the network.
        dest: the new file.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ErkGuidError: as `load`; there is such a file, or it cannot be written.
    """
    check_writable(dest)
    if os.path.isfile(dest) and not overwrite:
        raise ErkGuidError(
            f"{printable(dest, 200)} is there already; write to another file, or give overwrite "
            "(--overwrite)"
        )
    loaded = load(source, freeze=False)
    assert isinstance(loaded.net, nn.Module)
    refuse_overwriting({"DEST": Path(dest)}, [loaded.path])
    try:
        # The file's name only: its folder is private.
        origin = loaded.source if is_url(loaded.source) or loaded.preset else loaded.path.name
        save_network(dest, loaded.net, loaded.encoder, {"source": origin, **loaded.metadata})
    except (OSError, SafetensorError) as error:
        raise ErkGuidError(f"cannot write {dest}: {reason_of(error)}; write elsewhere") from error
    return loaded
