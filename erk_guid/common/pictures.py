"""PNG files and contact sheets."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from erk_guid.common.files import OWN, replacing, write_bytes

RUN_TEXT = "erk_guid run"
"""Name of the text in an image that says which run's it is."""
MARGIN = 12
PNG_START = b"\x89PNG\r\n\x1a\n"
INK, PAPER, GREY = (24, 24, 27), (255, 255, 255), (113, 113, 122)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Turn uint8 [C, H, W] with 1 or 3 channels into a picture (of others: the first, or 3)."""
    if pixels.shape[0] in (1, 2):
        return Image.fromarray(pixels[0], "L")
    return Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)), "RGB")


def save_png(
    path: Path, pixels: np.ndarray, text: str = "", make_folder: bool = True, run: str = ""
) -> None:
    """Write uint8 [C, H, W] as PNG, whole or not at all, with `text` in its metadata.

    `make_folder` makes a missing folder; `run` is which run's image it is.
    """
    info = PngImagePlugin.PngInfo()
    if run:
        info.add_text(RUN_TEXT, run)
    if text:
        info.add_text("parameters", text)
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue(), make_folder)


def is_whole_png(path: Path, text: str = "", run: str = "", sure: bool = False) -> bool:
    """Return whether `path` begins and ends like a PNG; finds truncated and empty files cheaply.

    Args:
        path: the file.
        text: what the text in it must begin with, see `save_png`.
        run: which run's it must be, where it says so; earlier versions did not.
        sure: whether it must say so.
    """
    head, tail = _ends(path)
    if not head.startswith(PNG_START) or tail[4:8] != b"IEND":
        return False
    if text and f"parameters\0{text}".encode("latin-1") not in head:
        return False
    said = f"{RUN_TEXT}\0".encode()
    return not run or (said not in head and not sure) or said + run.encode() in head


def says_seed(path: Path) -> bool:
    """Return whether a file says that it is the image of a seed."""
    return b"parameters\0seed " in _ends(path)[0]


def is_somebodys(path: Path) -> bool:
    """Return whether `path` is a whole PNG, or a file that never was one: no image cut off."""
    head, tail = _ends(path)
    if head.startswith(PNG_START):
        return tail[4:8] == b"IEND"
    return bool(head.strip(b"\0")) and not PNG_START.startswith(head)


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Return the first KiB and the last 12 bytes of a file; nothing of what cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b"", b""  # a named pipe would be waited for
        with open(path, "rb") as file:
            head = file.read(1024)
            file.seek(-min(12, len(head)), 2)
            return head, file.read()
    except OSError:
        return b"", b""


def tile(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 2) -> Image.Image:
    """Tile pictures of one size in rows of `columns`, enlarged `scale` times without smoothing."""
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return sheet


@dataclass(frozen=True)
class Panel:
    """One sheet of a figure, with a title and smaller lines under it."""

    sheet: Image.Image
    title: str
    lines: list[str] = field(default_factory=list)


def figure(panels: Sequence[Panel], footer: Sequence[str] = ()) -> Image.Image:
    """Draw panels side by side, each under its title and lines; the footer is below them all."""
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [
        max(
            p.sheet.width,
            int(measure.textlength(p.title, large)) + 1,
            *(int(measure.textlength(line, small)) + 1 for line in p.lines),
        )
        for p in panels
    ]
    header = 28 + 20 * max((len(p.lines) for p in panels), default=0) + 6
    width = sum(widths) + 2 * MARGIN * len(panels)
    width = max(width, *(int(measure.textlength(t, small)) + 2 * MARGIN for t in footer), 1)
    height = header + max(p.sheet.height for p in panels) + 2 * MARGIN
    page = Image.new("RGB", (width, height + (20 * len(footer) + MARGIN if footer else 0)), PAPER)
    draw = ImageDraw.Draw(page)
    left = MARGIN
    for panel, panel_width in zip(panels, widths, strict=True):
        draw.text((left, MARGIN), panel.title, INK, large)
        for k, line in enumerate(panel.lines):
            draw.text((left, MARGIN + 26 + 20 * k), line, GREY, small)
        page.paste(panel.sheet, (left, MARGIN + header))
        left += panel_width + 2 * MARGIN
    for k, text in enumerate(footer):
        draw.text((MARGIN, height + 20 * k), text, INK, small)
    return page


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a figure as PNG or JPEG, by its suffix, whole or not at all.

    It says that it is ours, see `check_writable`.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", OWN)
    with replacing(path) as partial:
        picture.save(partial, pnginfo=info, comment=OWN)
