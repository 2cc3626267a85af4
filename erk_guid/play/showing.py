"""Answers as pictures and HTML. All that is drawn is inside the text: no file, no address."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from erk_guid._version import __version__
from erk_guid.common.pictures import tile, to_pil
from erk_guid.generation.trace_plot import draw_trace, summarize
from erk_guid.models.encoders import StandardRGBEncoder
from erk_guid.play.session import Answer, Run, Session
from erk_guid.solvers import name_of, names_of_solvers

WIDTH = 128
"""Pixels across that small images are enlarged to, as far as whole multiples go."""

STYLE = """
.play-panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr));
  gap: 16px; }
.play-panels figure { margin: 0; }
.play-panels figcaption { line-height: 1.45; padding-top: 6px; }
.play-panels img, .play-trace img { width: 100%; height: auto; border-radius: 4px; }
.play-panels img { image-rendering: pixelated; }
.play-trace img { max-width: 760px; }
.play-distance { font-size: 1.35em; font-weight: 600; }
.play-small { opacity: 0.8; font-size: 0.92em; }
.play-error { border-left: 4px solid #dc2626; padding: 8px 12px; }
"""


@dataclass(frozen=True)
class Column:
    """One of the three columns.

    Attributes:
        key: for programs that read the page.
        title: what it is called.
        run: what it shows; None while it is computed.
    """

    key: str
    title: str
    run: Run | None


def panels(answer: Answer) -> str:
    """Return the three columns as HTML, each with its distance and its evaluations."""
    columns = (
        Column("plain", "Plain Heun, as many evaluations", answer.plain),
        Column("chosen", "Your choice", answer.chosen),
        Column("reference", "Fine reference", answer.reference),
    )
    return (
        f'<div class="play-panels">{"".join(_figure(c, answer.reference) for c in columns)}</div>'
    )


def about_distance(session: Session) -> str:
    """Return in words what the distances are."""
    net = session.models.loaded.net
    elements = net.img_channels * net.img_resolution**2
    pixels = isinstance(session.models.encoder, StandardRGBEncoder)
    unit = "pixels, from -1 (black) to 1 (white)" if pixels else "latents, before the decoder"
    return (
        "Distance: the Euclidean distance between an image and the same seed's image in the "
        f"reference, over all {elements:,} values ({unit}); the mean over the images ± its "
        "standard error. It says how exactly the ODE was solved, not how good the images look."
    )


def trace_picture(run: Run) -> str:
    """Return what guidance saw and did as HTML, or why there is nothing to see."""
    name = name_of(run.config.solver)
    if np.isnan(run.rows["stiffness"]).all():
        having = ", ".join(names_of_solvers(has_pair=True))
        return _note(f"{name} has no pair of solutions to measure stiffness with ({having} have).")
    title = f"{name}, {run.config.num_steps} steps, {len(run.seeds)} images"
    png = draw_trace(summarize(run.rows), title)
    alt = "Stiffness, step times stiffness, open gates and size of the correction at each step"
    return f'<div class="play-trace"><img alt="{alt}" src="{_inline(png)}"></div>'


def error(message: object) -> str:
    """Return an error as HTML."""
    return f'<div class="play-error" role="alert">{escape(str(message))}</div>'


def _figure(column: Column, reference: Run | None) -> str:
    head = f'<figure data-run="{column.key}"><strong>{column.title}</strong>'
    run = column.run
    if run is None:
        return f"{head}{_note('is being computed ...')}</figure>"
    settings = _said(run)
    alt = f"{column.title}: {len(run.seeds)} images, {settings}"
    if run is reference:
        distance = "0 by definition"
    else:
        distance = "..." if reference is None else str(run.distance_to(reference))
    guide = f" and {run.guide_evaluations} of the guide" if run.guide_evaluations else ""
    return (
        f'{head}<img alt="{escape(alt)}" src="{_inline(sheet(run.images))}"><figcaption>'
        f'distance <span class="play-distance">{distance}</span><br>'
        f'<span class="play-evaluations">{run.evaluations}</span> evaluations{guide}<br>'
        f'<span class="play-small">{escape(settings)}</span></figcaption></figure>'
    )


def _said(run: Run) -> str:
    """Return the settings that tell the columns apart."""
    config = run.config
    if not isinstance(config.schedule, str):
        config = replace(config, schedule=tuple(float(f"{s:.3g}") for s in config.schedule))
    # The line of each image, without the network's name and the version.
    said = config.describe().removeprefix(f"model {config.net}, ")
    return said.removesuffix(f", erk_guid {__version__}")


def sheet(images: Tensor) -> bytes:
    """Return images uint8 [N, C, H, W] as one picture in PNG."""
    pictures: list[Image.Image] = [to_pil(image) for image in images.numpy()]
    columns = int(np.ceil(np.sqrt(len(pictures))))
    scale = max(1, WIDTH // pictures[0].width)
    buffer = io.BytesIO()
    tile(pictures, columns, scale).save(buffer, "PNG")
    return buffer.getvalue()


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _note(text: str) -> str:
    return f'<p class="play-small">{escape(text)}</p>'
