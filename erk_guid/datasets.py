"""Small labelled image sets held in memory: a folder, a zip or an .npz.

Labels come from an EDM-style ``dataset.json`` (``{"labels": [[file name, class], ...]}``) or,
without one, from the folders the images lie in, numbered in alphabetical order.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], and class numbers, int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, C, H, W], got {self.images.dtype} "
                f"{list(self.images.shape)}"
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be {len(self.images)} integers, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )

    def split(self, held_out: int) -> tuple[ImageSet, ImageSet]:
        """Cut off the last `held_out` images: (the rest, the held-out ones)."""
        if not 0 <= held_out < len(self.images):
            raise ValueError(f"cannot hold out {held_out} of {len(self.images)} images")
        cut = len(self.images) - held_out
        return (
            ImageSet(self.images[:cut], self.labels[:cut]),
            ImageSet(self.images[cut:], self.labels[cut:]),
        )


def load_image_set(path: str | Path) -> ImageSet:
    """Read a whole image set: a folder, a zip, or an .npz with `images` and `labels`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the content is not a set of equally large images; the message names the
            file at fault.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return _from_files(path, names, lambda name: (path / name).read_bytes())
    if not path.exists():
        raise FileNotFoundError(f"no such folder, zip or .npz: {path}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            missing = {"images", "labels"} - set(data.files)
            if missing:
                raise ValueError(f"{path} lacks the array {' and '.join(sorted(missing))}")
            images = data["images"]
            return ImageSet(images[:, None] if images.ndim == 3 else images, data["labels"])
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if not n.endswith("/"))
            return _from_files(path, names, archive.read)
    raise ValueError(f"{path} is neither a folder nor a zip nor an .npz")


def _from_files(root: Path, names: list[str], read: Callable[[str], bytes]) -> ImageSet:
    files = [n for n in names if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"no images in {root}")
    if "dataset.json" in names:
        pairs = json.loads(read("dataset.json")).get("labels") or []
        table = {str(name): int(label) for name, label in pairs}
        absent = [n for n in files if n not in table]
        if absent:
            raise ValueError(f"{root}: dataset.json has no label for {absent[0]}")
        labels = [table[n] for n in files]
    else:
        parents = [PurePosixPath(n).parent.as_posix() for n in files]
        number = {parent: k for k, parent in enumerate(sorted(set(parents)))}
        labels = [number[parent] for parent in parents]

    arrays: list[np.ndarray] = []
    for name in files:
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                grey = image.mode in ("1", "L", "I", "I;16", "F")
                pixels = np.asarray(image.convert("L" if grey else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read the image {name} in {root}: {error}") from error
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if arrays and pixels.shape != arrays[0].shape:
            raise ValueError(
                f"{name} in {root} is {list(pixels.shape)}, {files[0]} is {list(arrays[0].shape)}: "
                "all images must have one size"
            )
        arrays.append(pixels)
    return ImageSet(np.stack(arrays), np.asarray(labels, dtype=np.int64))
