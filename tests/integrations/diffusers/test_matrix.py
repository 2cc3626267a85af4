"""Pipelines by schedulers: what `erk_guid.sample` gives by hand, or a refusal with a word.

The verdicts are here, once. The tests hold each of them to account, and the table in
docs/diffusers.md is written from them:

    UPDATE_TABLES=1 python -m pytest tests/integrations/diffusers/test_matrix.py -k docs
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from conftest import ROOT
from integrations.diffusers import by_hand
from integrations.diffusers.by_hand import Asked, Case, Ended
from integrations.diffusers.tiny import SD

import erk_guid
from erk_guid.guidance import Guidance
from erk_guid.integrations.diffusers import ModalScheduler, fit, for_pipeline
from erk_guid.integrations.flow import flow_process
from erk_guid.solvers import Euler, Heun, Modal, Solver

diffusers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Column:
    """A scheduler: what `for_pipeline` is told, and what `erk_guid.sample` is told."""

    kind: str
    options: Mapping[str, Any]
    solver: Solver
    guidance: Guidance | None = None


COLUMNS = {
    "modal": Column("modal", {}, Modal()),
    "modal, eta=0.5": Column("modal", {"eta": 0.5}, Modal(eta=0.5)),
    "Heun, w_stiff=0": Column("heun", {"w_stiff": 0}, Heun()),
    # Without a gate, which would leave some of these networks unguided.
    "Heun, w_stiff=0.5, w_con=0": Column(
        "heun", {"w_stiff": 0.5, "w_con": 0.0}, Heun(), erk_guid.ERKGuidance(0.5, 0.0)
    ),
    "Heun, auto": Column("heun", {}, Heun(), erk_guid.ParameterFreeGuidance()),
}
GUIDED = ("Heun, w_stiff=0.5, w_con=0", "Heun, auto")

EQUAL, NEAR, COARSE, NONE, REFUSED = "equal", "near", "coarse", "none", "refused"
NEAR_SHARE = 0.05
"""In bfloat16, largest distance to the float32 run that is "near", as a share of its norm."""


@dataclass(frozen=True)
class Row:
    """A pipeline.

    Attributes:
        build: makes it.
        tolerance: in float32, of the largest value. Where a run begins at t = 1 or sigma = 80,
            guidance amplifies rounding.
        half: verdicts in bfloat16 other than "near", by column.
    """

    build: Callable[[], Case]
    tolerance: float = 5e-5
    half: Mapping[str, str] = field(default_factory=dict)


def _edm() -> Any:
    return diffusers.EDMDPMSolverMultistepScheduler()


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**SD)


TASKS = {"text": "", "image": "Img2Img", "paint": "Inpaint"}
LOW = dict.fromkeys(GUIDED, COARSE)
ROWS: dict[str, Row] = {
    **{f"StableDiffusion{name}Pipeline": Row(functools.partial(by_hand.stable_diffusion, task))
       for task, name in TASKS.items()},
    "StableDiffusionPipeline, v-prediction": Row(
        lambda: by_hand.stable_diffusion("text", prediction_type="v_prediction")),
    "StableDiffusionInpaintPipeline, 9 channels": Row(
        lambda: by_hand.stable_diffusion("paint", nine=True)),
    **{f"StableDiffusionXL{name}Pipeline": Row(lambda task=task: by_hand.sdxl(task, _euler()))
       for task, name in TASKS.items()},
    **{f"StableDiffusionXL{name}Pipeline, EDM": Row(
        lambda task=task: by_hand.sdxl(task, _edm()), 1e-3, LOW) for task, name in TASKS.items()},
    "CosmosTextToWorldPipeline": Row(by_hand.cosmos, 1e-3, LOW),
    **{f"StableDiffusion3{name}Pipeline": Row(functools.partial(by_hand.sd3, task), 3e-4)
       for task, name in TASKS.items()},
    **{f"Flux{name}Pipeline": Row(functools.partial(by_hand.flux, task), 3e-4)
       for task, name in TASKS.items()},
    "DiTPipeline": Row(by_hand.dit),
    "DDPMPipeline": Row(lambda: by_hand.unconditional("DDPM")),
    "DDIMPipeline": Row(lambda: by_hand.unconditional("DDIM")),
    "LDMPipeline": Row(by_hand.ldm, half=dict.fromkeys(COLUMNS, NONE)),
}  # fmt: skip
REFUSALS: dict[str, tuple[Any, str]] = {
    "`LatentConsistencyModelPipeline`": (diffusers.LCMScheduler(), "belongs to a distilled model"),
    "`IFPipeline`": (
        diffusers.DDPMScheduler(variance_type="learned_range"), "does not honour variance_type",
    ),
    "any pipeline with TCD": (diffusers.TCDScheduler(), "belongs to a distilled model"),
}  # fmt: skip
"""Schedulers of pipelines that are refused, and a part of the error."""


@functools.lru_cache(maxsize=1)
def prepared(row: str, dtype: torch.dtype) -> tuple[Case, Asked]:
    case = by_hand.seeded(ROWS[row].build, dtype=dtype)
    return case, Asked(case)


def expected(row: str, column: str, dtype: torch.dtype = torch.float32) -> Ended:
    """What the pipeline should end with, in float32, from the noise that it draws in `dtype`."""
    case, asked = prepared(row, dtype)
    made = COLUMNS[column]
    process = flow_process(made.solver, made.guidance) if case.family == "flow" else None
    return by_hand.by_hand(case, asked, made.solver, made.guidance, process)


def found(row: str, column: str, dtype: torch.dtype = torch.float32) -> Ended:
    case, _ = prepared(row, dtype)
    made = COLUMNS[column]
    return by_hand.run(case, for_pipeline(case.pipe, made.kind, **made.options))


@pytest.mark.parametrize("row", ROWS)
def test_in_float32(row: str) -> None:
    tolerance, ends = ROWS[row].tolerance, {}
    # diffusers' own scheduler, and nothing of ours but Euler's method: catches a denoiser by hand
    # that is wrong in the same way as our schedulers. (With clipped data DDIM is not Euler's.)
    case, asked = prepared(row, torch.float32)
    if row != "DDPMPipeline":
        theirs, _ = by_hand.run(case, by_hand.euler(case))
        same, _ = by_hand.by_hand(case, asked, Euler(), None, None)
        assert by_hand.apart(theirs, same) <= 5e-5
    # Catches: a sign, a level or a factor of the scheduler's own; a history that is lost or that
    # holds what the pipeline edited; noise of another size; a call too many.
    for column in COLUMNS:
        (ours, calls), (right, count) = found(row, column), expected(row, column)
        assert calls == count, column
        assert by_hand.apart(ours, right) <= tolerance, column
        ends[column] = right
    # A cell that would pass with another column's scheduler shows nothing.
    for a in ends:
        assert all(by_hand.apart(ends[a], ends[b]) > 5 * tolerance for b in ends if b != a), a


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_in_bfloat16(row: str, column: str) -> None:
    # Catches: a step that computes in the pipeline's precision, or that measures its rounding.
    verdict = ROWS[row].half.get(column, NEAR)
    if verdict == NONE:  # the pipeline itself fails, with any scheduler
        case = by_hand.seeded(ROWS[row].build, dtype=torch.bfloat16)
        for scheduler in (by_hand.euler(case), for_pipeline(case.pipe)):
            with pytest.raises(RuntimeError, match="should be the same"):
                by_hand.run(case, scheduler)
        return
    (ours, calls), (right, count) = found(row, column, torch.bfloat16), expected(
        row, column, torch.bfloat16
    )  # fmt: skip
    assert (calls, ours.isfinite().all()) == (count, True)
    limit = NEAR_SHARE
    if verdict == COARSE:  # no further than our sampler with the same network in bfloat16
        _, asked = prepared(row, torch.bfloat16)
        asked.rounding = True
        try:
            rounded, _ = expected(row, column, torch.bfloat16)
        finally:
            asked.rounding = False
        limit += 2 * by_hand.relative(rounded, right)
    assert by_hand.relative(ours, right) <= limit


def test_a_short_run_in_bfloat16() -> None:
    # With three levels modal measures its trust in the past at the first step, which has none.
    # Catches a trust that is the rounding of the sample, 0 or 1 by chance: 15 % apart in the worst
    # of 32 samples, where rounding alone makes 4.5 %.
    scheduler = ModalScheduler()
    scheduler.set_timesteps(sigmas=[9.0, 3.0, 1.0, 0.0])

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x / (1 + sigma**2) ** 0.5)

    noise = torch.randn(32, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = start = (9 * noise).bfloat16()
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler.scale_model_input(x, time)
        output = (x.float() - denoised(x.float(), sigma)) / sigma
        x = scheduler.step(output.bfloat16(), time, x).prev_sample
    right = erk_guid.sample(denoised, start.float(), scheduler.sigmas, solver="modal")
    away = (x.float() - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    assert away.max() < 0.08


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", REFUSALS)
def test_refused(row: str, column: str) -> None:
    # Catches: a model that is sampled as what it is not.
    scheduler, words = REFUSALS[row]
    with pytest.raises(ValueError, match=words) as caught:
        for_pipeline(scheduler, COLUMNS[column].kind, **COLUMNS[column].options)
    assert "\n" not in str(caught.value)


def test_a_fit_for_cosmos_is_refused() -> None:
    # Its first call of `step` would be taken for the answer at the next point.
    case, _ = prepared("CosmosTextToWorldPipeline", torch.float32)
    with pytest.raises(ValueError, match="CosmosTextToWorldPipeline calls its scheduler twice"):
        fit(case.pipe, ["a cat"], steps=4)


@pytest.mark.parametrize("column", COLUMNS)
def test_cosmos_with_two_videos(column: str) -> None:
    # It asks for the clean data of both prompts at once, so with a batch of four, and undoes that.
    # Catches: a step of Heun that takes the four for its own (an error of shapes; with one video
    # the two were broadcast, and the result not used).
    case, _ = prepared("CosmosTextToWorldPipeline", torch.float32)
    made = COLUMNS[column]
    alone, calls = found("CosmosTextToWorldPipeline", column)
    two = Case(**vars(case) | {"call": case.call | {"num_videos_per_prompt": 2}})
    both, calls_of_two = by_hand.run(two, for_pipeline(case.pipe, made.kind, **made.options))
    assert len(both) == 2
    assert calls == calls_of_two
    assert not torch.equal(both[0], both[1])
    if "eta" not in made.options:  # the noise of two videos is drawn as one
        torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["modal", "heun"])
def test_noise_that_a_call_asks_for_is_refused(kind: str) -> None:
    # DDIM's own eta. Catches: noise that is left out in silence.
    case, _ = prepared("DDIMPipeline", torch.float32)
    case = Case(**vars(case) | {"call": case.call | {"eta": 0.5}})
    with pytest.raises(ValueError, match=r"eta of the call must be 0, got 0.5.*for_pipeline"):
        by_hand.run(case, for_pipeline(case.pipe, kind))


def table() -> str:
    """The matrix in Markdown."""
    rows = [["Pipeline", *(f"`{c}`" if "=" in c else c for c in COLUMNS)]]
    rows.append(["---"] * len(rows[0]))
    for name, row in ROWS.items():
        kind, _, note = name.partition(", ")
        cells = [f"{EQUAL}, {row.half.get(column, NEAR)}" for column in COLUMNS]
        rows.append([f"`{kind}`" + (f", {note}" if note else ""), *cells])
    rows += [[name, *[REFUSED] * len(COLUMNS)] for name in REFUSALS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_docs_show_this_matrix() -> None:
    # Catches: a page that says something else than the tests.
    page = ROOT / "docs" / "diffusers.md"
    before, begin, rest = page.read_text().partition("<!-- matrix -->\n\n")
    written, end, after = rest.partition("\n<!-- /matrix -->")
    assert begin
    assert end
    if os.environ.get("UPDATE_TABLES"):
        page.write_text(f"{before}{begin}{table()}\n{end}{after}")
        return
    assert written == f"{table()}\n"
