"""Images in a folder, a zip or an .npz: read one at a time, or whole sets with labels.

Only 8-bit RGB and greyscale are accepted, because a silent conversion changes a score. For
everything else the error names the file and says what to do.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from erk_guid.common.errors import ErkGuidError, printable, reason_of
from erk_guid.common.files import user_path
from erk_guid.common.npz import NpzError, npz_names, read_npz
from erk_guid.common.zips import ZipError, open_zip, read_member

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}
"""Formats that are read; Pillow knows more, some of which run other programs."""

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
LABELS = "dataset.json"
COMPANIONS = frozenset({"run.json", LABELS})
"""Other files that are expected among images."""

MAX_PIXELS = 1 << 24
MAX_BYTES = 1 << 26
"""Bounds on one image and on one file that is read; nothing larger is unpacked."""

MAX_LABEL = (1 << 63) - 1


class DatasetError(ErkGuidError, ValueError):
    """A set of images that cannot be used; the message names the file at fault."""


@dataclass(frozen=True)
class ImageSource:
    """Images that are read on request.

    Attributes:
        path: the folder (searched recursively), zip or .npz.
        names: their names, sorted; forward slashes on every system.
        ignored: files among them that are not images.
    """

    path: Path
    names: list[str]
    ignored: list[str]
    _read: Callable[[str], bytes] | None = field(repr=False)
    _arrays: dict[str, np.ndarray] | None = field(default=None, repr=False)
    _labelled: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, size: tuple[int, ...] | None = None) -> np.ndarray:
        """Return one image, uint8 [C, H, W] with C of 1 or 3.

        Args:
            size: (H, W) that it must have; an image of another size is not decoded.

        Raises:
            DatasetError: it cannot be read, is neither 8-bit RGB nor 8-bit greyscale, or has
                another size.
        """
        name = self.names[index]
        if self._arrays is not None:
            image: np.ndarray = self._arrays["images"][index]
            return image
        assert self._read is not None
        shown = printable(name, 100)
        try:
            return _decode(self._read(name), shown, size)
        except _OtherSizeError as error:
            raise DatasetError(
                f"{self.path}: {shown} is {error}, {printable(self.names[0], 100)} is "
                f"{size[1] if size else 0}x{size[0] if size else 0}; all images must have one size"
            ) from error
        except (DatasetError, ZipError) as error:
            raise DatasetError(f"{self.path}: {error}") from error
        except Exception as error:  # decoders raise many kinds for damaged files
            no_image = isinstance(error, UnidentifiedImageError)
            reason = "it is no image" if no_image else reason_of(error)
            raise DatasetError(f"{self.path}: cannot read the image {shown}: {reason}") from error

    def batches(self, parts: Sequence[Sequence[int]], workers: int = 0) -> Iterator[np.ndarray]:
        """Yield the images of each part (a list of indices), uint8 [n, C, H, W].

        Greyscale images among coloured ones are repeated to three channels. All images must
        have the size of the first of the whole set.

        Args:
            parts: which images go together.
            workers: threads that read ahead; 0 reads when the images are needed.

        Raises:
            DatasetError: an image cannot be used.
        """
        if not parts:
            return
        size = self.read(0).shape[1:]
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            ahead: deque[list[Future[np.ndarray]]] = deque()
            try:
                for part in parts:
                    ahead.append([pool.submit(self.read, i, size) for i in part])
                    if len(ahead) > (2 if workers else 0):
                        yield _together(ahead.popleft())
                while ahead:
                    yield _together(ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)


def _together(images: list[Future[np.ndarray]]) -> np.ndarray:
    arrays = [image.result() for image in images]
    if len({len(a) for a in arrays}) > 1:
        arrays = [a if len(a) == 3 else np.repeat(a, 3, axis=0) for a in arrays]
    return np.stack(arrays)


class _OtherSizeError(DatasetError):
    """An image of another size; the message is the size found."""


def open_images(path: str | Path) -> ImageSource:
    """List the images of a folder (recursively), a zip, or an .npz with an array `images`.

    Hidden files, and files in folders that begin with a dot, are skipped.

    Raises:
        DatasetError: `path` does not exist, is none of these, or holds no image.
    """
    path = user_path(path)
    try:
        if path.is_dir():
            return _listed(path, _files_in(path), lambda name: _read_file(path / name, name))
        if not path.exists():
            raise DatasetError(f"no such folder, zip or .npz: {path}")
        if not path.is_file():
            raise DatasetError(f"{path} is neither a folder nor a file")
        if path.suffix.lower() == ".npz":
            arrays = _arrays_of(path)
            names = [f"image {k}" for k in range(len(arrays["images"]))]
            return ImageSource(path, names, [], None, arrays)
        if zipfile.is_zipfile(path):
            archive = open_zip(path)
            names = [n for n in archive.namelist() if not n.endswith("/")]
            return _listed(path, names, lambda name: read_member(archive, name, MAX_BYTES))
    except DatasetError:
        raise
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise DatasetError(f"cannot read {path}: {reason_of(error)}") from error
    if path.suffix.lower() == ".zip":
        raise DatasetError(f"{path} is a damaged zip, or none; make or fetch it again")
    raise DatasetError(f"{path} is neither a folder nor a zip nor an .npz")


def _files_in(path: Path) -> Iterator[str]:
    """Yield the names of the files in a folder and in its folders, without hidden ones.

    Links to folders are followed; a folder that was seen is not entered again, so loops end.
    """
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> NoReturn:
        raise error  # os.walk would pass over the folder in silence

    for top, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        here = _identity(Path(top))
        if here is None or here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(folder for folder in folders if not _hidden(folder))
        above = Path(top).relative_to(path)
        for name in names:
            yield (above / name).as_posix()


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _read_file(path: Path, name: str) -> bytes:
    if not os.path.lexists(path):
        raise DatasetError(f"{printable(name, 100)} was removed while the folder was read")
    if not path.is_file():
        raise DatasetError(
            f"{printable(name, 100)} is no file, or a link that leads nowhere; remove it"
        )
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DatasetError(f"{printable(name, 100)} is larger than {MAX_BYTES:,} bytes")
    return data


def _listed(path: Path, names: Iterable[str], read: Callable[[str], bytes]) -> ImageSource:
    images, ignored, labelled = [], [], False
    for name in sorted(names):
        pure = PurePosixPath(name)
        if ".." in pure.parts:  # of a zip that wants to be unpacked elsewhere
            ignored.append(name)
            continue
        if any(map(_hidden, pure.parts)):
            continue
        if _is_image(pure.name):
            images.append(name)
        elif pure.name not in COMPANIONS:
            ignored.append(name)
        labelled = labelled or name == LABELS
    if not images:
        among = ""
        if ignored:
            among = f" among {len(ignored)} files (such as {printable(ignored[0], 100)})"
        raise DatasetError(
            f"no images in {path}{among}; readable are {', '.join(sorted(SUFFIXES))}"
        )
    return ImageSource(path, images, ignored, read, _labelled=labelled)


_UNUSABLE = {
    "RGBA": "an alpha channel", "LA": "an alpha channel", "PA": "an alpha channel",
    "La": "an alpha channel", "RGBa": "an alpha channel",
    "P": "a colour palette", "1": "one bit a pixel", "CMYK": "CMYK colours",
    "I": "more than 8 bits a channel", "F": "more than 8 bits a channel",
}  # fmt: skip


def _decode(data: bytes, name: str, size: tuple[int, ...] | None) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(f"{name} has {image.width}x{image.height} pixels, too many")
        if size is not None and (image.height, image.width) != size:
            raise _OtherSizeError(f"{image.width}x{image.height}")
        what = None
        if image.mode.startswith("I;"):
            what = _UNUSABLE["I"]
        elif image.mode not in ("L", "RGB"):
            what = _UNUSABLE.get(image.mode, f"mode {image.mode}")
        elif image.format == "PNG" and (data[12:16], data[24:25]) != (b"IHDR", b"\x08"):
            # Pillow would silently drop 8 of 16 bits, and would spread fewer than 8.
            what = "other than 8 bits a channel"
        elif "transparency" in image.info:
            what = "a transparent colour"
        elif getattr(image, "n_frames", 1) > 1:
            what = "more than one frame"
        if what is not None:
            raise DatasetError(f"{name} has {what}; convert it to 8-bit RGB or greyscale")
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def holds_images(path: Path) -> bool:
    """Return whether an .npz is a set of images (rather than features or statistics).

    Raises:
        ErkGuidError: it cannot be read.
    """
    return "images" in npz_names(path)


def _arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays `images` [N, C, H, W] and, if present, `labels` of an .npz."""
    try:
        arrays = read_npz(path, {"images": "biufc", "labels": "iu"}.get)
    except NpzError as error:
        raise DatasetError(str(error)) from error
    if "images" not in arrays:
        raise DatasetError(f"{path} lacks the array images")
    images = arrays["images"]
    arrays["images"] = images[:, None] if images.ndim == 3 else images
    shape = arrays["images"].shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
        raise DatasetError(
            f"{path}: images must be uint8 [N, C, H, W] with C of 1 or 3, got {images.dtype} "
            f"{list(images.shape)}"
        )
    return arrays


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 [N, C, H, W], and class numbers, int64 [N], in memory."""

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
    """Read a whole labelled set: a folder, a zip, or an .npz with `images` and `labels`.

    Labels come from an EDM-style ``dataset.json`` (``{"labels": [[file name, class], ...]}``)
    or, without one, from the folders the images lie in, numbered in alphabetical order.

    Raises:
        DatasetError: the content is not a set of equally large images; the message names the
            file at fault.
    """
    source = open_images(path)
    if source._arrays is not None:
        if "labels" not in source._arrays:
            raise DatasetError(f"{path} lacks the array labels")
        images, given = source._arrays["images"], source._arrays["labels"]
        if given.ndim != 1 or len(given) != len(images) or given.dtype.kind not in "iu":
            raise DatasetError(
                f"{path}: labels must be one whole number for each of {len(images)} images, got "
                f"{given.dtype} {list(given.shape)}"
            )
        if not 0 <= int(given.min()) <= int(given.max()) <= MAX_LABEL:
            raise DatasetError(
                f"{path}: labels must be whole numbers from 0 to {MAX_LABEL}, got "
                f"{given.min()} to {given.max()}"
            )
        return ImageSet(images, given.astype(np.int64))
    labels = _labels(source)
    try:
        (images,) = source.batches([range(len(source))])
    except MemoryError as error:
        raise DatasetError(f"{path}: its images do not fit into memory") from error
    return ImageSet(images, np.asarray(labels, dtype=np.int64))


def _labels(source: ImageSource) -> list[int]:
    if not source._labelled:
        parents = [PurePosixPath(n).parent.as_posix() for n in source.names]
        number = {parent: k for k, parent in enumerate(sorted(set(parents)))}
        return [number[parent] for parent in parents]
    assert source._read is not None
    try:
        classes = _classes(json.loads(source._read(LABELS)))
    except (DatasetError, ZipError) as error:
        raise DatasetError(f"{source.path}: {error}") from error
    except Exception as error:  # zipfile and the parser raise many kinds for damaged files
        raise DatasetError(f"{source.path}: {LABELS} is damaged ({reason_of(error)})") from error
    absent = next((n for n in source.names if n not in classes), None)
    if absent is not None:
        raise DatasetError(f"{source.path}: {LABELS} has no label for {printable(absent, 100)}")
    return [classes[n] for n in source.names]


def _classes(content: Any) -> dict[str, int]:
    """Return class numbers by file name, from the content of a `dataset.json`."""
    if not isinstance(content, dict):
        raise DatasetError(f"{LABELS} is damaged (it holds no names and values)")
    table = content.get("labels")
    layout = f'{LABELS} must hold {{"labels": [[file name, class], ...]}}'
    if not isinstance(table, list | None):
        raise DatasetError(layout)
    classes: dict[str, int] = {}
    for number, entry in enumerate(table or []):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise DatasetError(f"{layout}; entry {number} is something else")
        name, label = entry
        # In Python, true and false are whole numbers, too.
        if type(label) is not int or not 0 <= label <= MAX_LABEL:
            raise DatasetError(
                f"{layout}; the class of {printable(name, 100)} is no whole number from 0 to "
                f"{MAX_LABEL}"
            )
        if classes.setdefault(name, label) != label:
            raise DatasetError(f"{LABELS} gives {printable(name, 100)} two classes")
    return classes


def refuse_overwriting(outputs: Mapping[str, Path | None], inputs: Sequence[str | Path]) -> None:
    """Refuse an output that would replace an input, a file of a set of images, or another output.

    Links are followed. What is no regular file, such as /dev/null, may be written to.

    Args:
        outputs: files that will be written, by the option that names them; None for no file.
        inputs: files and folders of images. What does not exist, such as a preset, is passed over.

    Raises:
        ErkGuidError: two outputs are one file; an output is an input; or it lies in a folder of
            images and is one of its files, or has a name by which it would be taken for one.
    """
    sources = [Path(os.path.expanduser(source)) for source in inputs if str(source)]
    taken: dict[str, str] = {}
    for option, output in outputs.items():
        if output is None or (os.path.exists(output) and not os.path.isfile(output)):
            continue
        place = os.path.realpath(output)
        if place in taken:
            raise ErkGuidError(
                f"{taken[place]} and {option} are one file, {output}; write to two files"
            )
        taken[place] = option
        for source in sources:
            if os.path.isdir(source):
                refuse_in_folder(option, output, source)
            elif _is_same(source, _identity(output)):
                raise ErkGuidError(f"{option} {output} is an input; write to another file")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what is equal for all names of one file, or None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _is_same(path: Path, identity: tuple[int, int] | None) -> bool:
    return identity is not None and _identity(path) == identity


def refuse_in_folder(option: str, output: Path, folder: Path) -> None:
    """Refuse an output that is a file of the set of images in `folder`, or would become one.

    Raises:
        ErkGuidError: the message names `option`.
    """
    inside = os.path.realpath(folder)
    # A link in the folder counts as its file, and so does the file that a link leads to.
    for place in (
        Path(os.path.realpath(output.parent), output.name),
        Path(os.path.realpath(output)),
    ):
        if place.is_relative_to(inside) and _belongs_to_a_set(place.name):
            raise ErkGuidError(
                f"{option} {output} would be taken for a file of the images in {folder}; write it "
                "to another folder"
            )
    there = _identity(output)
    if there is None or not os.path.isdir(folder):
        return
    try:
        names = [n for n in _files_in(folder) if _belongs_to_a_set(PurePosixPath(n).name)]
    except OSError as error:
        raise DatasetError(f"cannot read {folder}: {reason_of(error)}") from error
    if any(_is_same(folder / name, there) for name in names):
        raise ErkGuidError(
            f"{option} {output} is a file of the images in {folder}; write to another file"
        )


def _belongs_to_a_set(name: str) -> bool:
    return name in COMPANIONS or _is_image(name)
