"""EDM2 networks in diffusers' layout: a folder with config.json and safetensors.

Others have converted the published networks to it (on Hugging Face, BiliSakura/EDM2-diffusers). A
model's folder has ``unet/diffusion_pytorch_model.safetensors`` with ``unet/config.json``, and a
VAE in ``vae/``. The tensors have the names of our own state dict. Settings that the shapes decide
are read from the tensors. config.json gives the rest, and must not contradict them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from erk_guid.common.errors import CheckpointError, ErkGuidError, MissingExtraError, printable
from erk_guid.models.checkpoints.build import SETTINGS, build_network
from erk_guid.models.encoders import Encoder, StabilityVAEEncoder, StandardRGBEncoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
UNET, VAE = "unet", "vae"

NAMES = {
    "sample_size": "img_resolution",
    "in_channels": "img_channels",
    "out_channels": "img_channels",
    "num_class_embeds": "label_dim",
}
"""Names of some settings in config.json, and our names for them."""

HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w.-]+))?")
"""A name on the hub: owner/name, a folder in it, a revision: owner/name/folder@revision."""


def weights_in(folder: Path) -> Path:
    """Return the path of the weights in a model's folder, or in its `unet` folder.

    Raises:
        ErkGuidError: there are none. If the folder holds models, the message names them.
    """
    for place in (folder / UNET, folder):
        if (place / WEIGHTS).is_file():
            return place / WEIGHTS
    inside = sorted(p.parent.parent.name for p in folder.glob(f"*/{UNET}/{WEIGHTS}"))
    hint = f"; it has models in {', '.join(inside[:8])}" if inside else ""
    raise ErkGuidError(
        f"{folder} is a folder without {UNET}/{WEIGHTS}; name a model's folder, or the .pkl or "
        f".safetensors file in it{hint}"
    )


def hub_name(name: str) -> re.Match[str] | None:
    """Return the parts of what may be a name on the Hugging Face hub, see `HUB`; else None."""
    if name.startswith((".", "~")) or os.path.exists(name.partition("/")[0]):
        return None  # meant as a local path, but not there
    if Path(name).suffix in (".pkl", ".safetensors", ".pt", ".pth", ".ckpt"):
        return None
    return HUB.fullmatch(name)


def fetch_from_hub(name: str) -> Path | None:
    """Fetch the weights of ``owner/name[/folder][@revision]`` from the Hugging Face hub.

    They are kept in the hub's own cache. Returns None if `name` is not a name on the hub.

    Raises:
        ErkGuidError: it cannot be fetched, or holds no network.
    """
    match = hub_name(name)
    if match is None:
        return None
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "diffusers", f"fetching {name}") from error
    folder = match["folder"].strip("/")
    wanted = [f"{part}/*" for part in (UNET, VAE)] + [WEIGHTS, CONFIG]
    try:
        root = snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=[f"{folder}/{one}" if folder else one for one in wanted],
        )
    except Exception as error:  # its client raises errors of several packages
        reason = str(error).strip().partition("\n")[0][:160]
        raise ErkGuidError(
            f"{printable(name, 200)!r} is no file and no preset, and cannot be fetched from the "
            f"Hugging Face hub ({type(error).__name__}: {reason})"
        ) from error
    return weights_in(Path(root) / folder)


def is_model(path: Path) -> bool:
    """Return whether a safetensors file has a config.json beside it."""
    return path.suffix == ".safetensors" and (path.parent / CONFIG).is_file()


def digest_of_settings(path: Path) -> str:
    """Return "+" and a digest of the settings beside weights, which the network depends on too.

    Raises:
        CheckpointError: their file is damaged.
    """
    settings = {key: value for key, value in _read_config(path).items() if key[:1] != "_"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"+{digest[:16]}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path.parent / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"its {CONFIG} is damaged ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"its {CONFIG} is no dict")
    return config


def read_model(path: Path) -> tuple[Any, Encoder]:
    """Read network and encoder from weights with a config.json beside them.

    Raises:
        CheckpointError: a file is damaged, or the network is not EDM2's.
    """
    config = _read_config(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"damaged, or not a safetensors file ({error})") from error
    settings = _settings(config, state)
    try:
        net = build_network("Precond", settings, state)
    except CheckpointError as error:
        if "channels_per_head" in config or "attn" not in str(error):
            raise
        raise CheckpointError(f"{error} ({CONFIG} does not say channels_per_head)") from error
    return net, _encoder(path, settings["img_channels"])


def _settings(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    found = shapes(state)
    unknown = []
    for name, value in config.items():
        ours = NAMES.get(name, name)
        if ours in found:
            told = 0 if ours == "label_dim" and value is None else value
            if isinstance(told, list) and len(set(map(str, told))) == 1:  # height and width
                told = told[0]
            # Channels may be given as factors of another base, with the same result.
            if ours in NAMES.values() and told != found[ours]:
                raise CheckpointError(f"{CONFIG} says {name} {told}, its tensors {found[ours]}")
        elif ours in SETTINGS["Precond"]:
            found[ours] = value
        elif not name.startswith("_"):
            unknown.append(name[:40])
    if unknown:
        warnings.warn(f"{CONFIG}: not known here: {', '.join(sorted(unknown))}", stacklevel=2)
    return found


def shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of `Precond` that the shapes of its tensors decide.

    Raises:
        CheckpointError: they are not those of an EDM2 network.
    """
    sizes = {name: list(tensor.shape) for name, tensor in state.items()}

    def size(name: str, axis: int = 0) -> int:
        if axis >= len(sizes.get(name, [])):
            raise CheckpointError(f"it is no EDM2 network: it lacks {name}")
        return sizes[name][axis]

    resolutions = sorted(
        {int(m[1]) for name in sizes if (m := re.match(r"unet\.enc\.(\d{1,5})x\1_", name))},
        reverse=True,
    )
    if not resolutions:
        raise CheckpointError("it is no EDM2 network: it lacks unet.enc")
    top = f"unet.enc.{resolutions[0]}x{resolutions[0]}"
    blocks = 0
    while f"{top}_block{blocks}.conv_res0.weight" in sizes:
        blocks += 1
    widths = [size(f"unet.enc.{r}x{r}_block0.conv_res0.weight") for r in resolutions]
    noise, emb = size("unet.emb_fourier.freqs"), size("unet.emb_noise.weight")
    base = math.gcd(*widths, noise, emb)
    return {
        "img_resolution": resolutions[0],
        "img_channels": size(f"{top}_conv.weight", 1) - 1,
        "label_dim": size("unet.emb_label.weight", 1) if "unet.emb_label.weight" in sizes else 0,
        "model_channels": base,
        "channel_mult": [width // base for width in widths],
        "channel_mult_noise": noise // base,
        "channel_mult_emb": emb // base,
        "num_blocks": blocks,
        "attn_resolutions": [
            r for r in resolutions if f"unet.enc.{r}x{r}_block0.attn_qkv.weight" in sizes
        ],
        "logvar_channels": size("logvar_fourier.freqs"),
    }


def _encoder(path: Path, channels: int) -> Encoder:
    if channels != 4:
        return StandardRGBEncoder()
    for folder in (path.parent.parent / VAE, path.parent / VAE):
        if (folder / CONFIG).is_file():
            return StabilityVAEEncoder(str(folder))
    return StabilityVAEEncoder()
