"""The answer to a choice, against samplers called by hand; and what is copied, to the pixel."""

from __future__ import annotations

import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import erk_guid
from erk_guid.cli.generate import generate_command
from erk_guid.cli.play import config_of, fits_of
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.seeds import SeededNoise
from erk_guid.play import page, session, showing
from erk_guid.play.choice import Choice
from erk_guid.play.copying import as_command_line, as_python
from erk_guid.play.session import Answer, Distance, Run, Session

NET = ["--preset=digits", "--gnet=uncond:digits"]
SMALL = Choice(steps=3, count=2, first_seed=5, w_stiff=0.5, w_con=0.5)


@pytest.fixture(scope="module")
def digits() -> Session:
    return Session.open(NET, config_of, True, fits_of("digits", None))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let references be coarse, where only their bookkeeping is looked at."""
    monkeypatch.setattr(session, "FINEST", 4)
    monkeypatch.setattr(session, "FINER", 1)


def answered(digits: Session, choice: Choice) -> Answer:
    *_, last = digits.answer(choice)
    return last


def by_hand(choice: Choice, **options: Any) -> torch.Tensor:
    """The latents of the seeds, by `edm_sampler` itself."""
    random = SeededNoise(choice.seeds, torch.device("cpu"))
    net = erk_guid.load("digits").net
    noise = random.randn([1, 32, 32])
    labels = torch.nn.functional.one_hot(random.randint(10), 10).float()
    with torch.no_grad():
        return erk_guid.edm_sampler(net, noise, labels, **options)


def test_the_columns_are_the_seeds_by_these_samplers(digits: Session) -> None:
    # Catches another seed, class, ending or guidance in a column, or a distance of other things:
    # pixels, squares, a mean over elements.
    answer = answered(digits, SMALL)
    assert answer.reference is not None
    assert answer.plain is not None
    erk = erk_guid.ERKGuidance(0.5, 0.5)
    chosen = by_hand(SMALL, num_steps=3, erk=erk)
    plain = by_hand(SMALL, num_steps=3)
    fine = by_hand(SMALL, num_steps=64, solver="modal")
    for run, latents in (
        (answer.chosen, chosen), (answer.plain, plain), (answer.reference, fine),
    ):  # fmt: skip
        torch.testing.assert_close(run.latents, latents, rtol=0, atol=1e-5)
    distances = [(chosen - fine)[k].square().sum().sqrt().item() for k in range(2)]
    found = answer.chosen.distance_to(answer.reference)
    assert found.mean == pytest.approx(np.mean(distances), rel=1e-4)
    assert found.error == pytest.approx(np.std(distances, ddof=1) / 2**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("said", "evaluations", "to_zero"),
    [
        ({"steps": 4}, 7, True),  # Heun's own
        ({"steps": 5, "solver": "modal", "form": "none"}, 5, True),
        ({"steps": 4, "solver": "modal", "form": "none"}, 4, False),  # Heun to 0: 3 or 5
        ({"steps": 1, "form": "none"}, 1, True),
        ({"steps": 6, "schedule": "fitted"}, 6, False),
    ],
)
@pytest.mark.usefixtures("coarse")
def test_plain_heun_gets_as_many_evaluations(
    said: dict[str, Any], evaluations: int, to_zero: bool, digits: Session
) -> None:
    answer = answered(digits, replace(SMALL, count=1, **said))
    assert answer.plain is not None
    assert answer.chosen.evaluations == answer.plain.evaluations == evaluations
    assert answer.plain.config.denoise_to_zero is to_zero


@pytest.mark.usefixtures("coarse")
def test_runs_are_compared_where_they_end(digits: Session) -> None:
    # A run that stops at sigma 0.002 keeps noise of that size. Compared with a reference at 0 it
    # would seem to err by it.
    fine = answered(digits, replace(SMALL, steps=4, solver="modal", form="none")).reference
    assert fine is not None
    stopped = digits._run((*fine.arguments, "--no-denoise-to-zero"), fine.seeds)
    assert stopped.distance_to(fine).mean == pytest.approx(0, abs=1e-5)
    assert fine.distance_to(fine).mean == 0
    apart = (fine.latents - fine.before_zero).flatten(1).norm(dim=1)
    assert apart.mean() > 0.02


def test_the_reference_is_fine_enough(digits: Session) -> None:
    # It must not be coarser than what it judges, and a fit's noise levels bound it.
    run = digits.run(replace(SMALL, count=1, steps=20, form="none", class_idx=2, strength=1.5))
    given = config_of([*NET, *digits._reference(run)])
    assert run.evaluations == 39
    assert given.num_steps >= session.FINER * 39
    assert (given.class_idx, given.guidance) == (2, 1.5)
    levels = config_of([*NET, "--schedule=10,1,0.1", "--solver=modal", "--guidance=1"])
    other = digits._reference(replace(run, config=levels))
    assert {"--sigma_max=10", "--sigma_min=0.1"} <= set(other)


@pytest.mark.usefixtures("coarse")
def test_what_was_made_is_kept_and_the_oldest_forgotten(
    digits: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []
    whole = digits._make

    def counting(arguments: tuple[str, ...], seeds: range) -> Run:
        made.append(arguments)
        return whole(arguments, seeds)

    monkeypatch.setattr(Session, "_make", lambda self, *args: counting(*args))
    fresh = Session(digits.models, digits.network, config_of, digits.fits)
    choice = replace(SMALL, count=1)
    answered(fresh, choice)
    assert len(made) == 3
    # Another strength of guidance: the reference and plain Heun are there.
    answered(fresh, replace(choice, w_stiff=0.3))
    assert len(made) == 4
    # Another class and other seeds: a reference of their own.
    answered(fresh, replace(choice, class_idx=1))
    answered(fresh, replace(choice, first_seed=9))
    assert len(made) == 10
    for k in range(session.KEPT):
        fresh.run(replace(choice, steps=3, w_stiff=k / 100))
    assert fresh._run.cache_info().currsize == session.KEPT
    before = len(made)
    answered(fresh, choice)
    assert len(made) == before + 3


CHOICES = [
    SMALL,
    replace(SMALL, form="auto", schedule="logsnr", class_idx=7),
    replace(SMALL, solver="modal", form="none", eta=0.5, strength=2.3),
    replace(SMALL, solver="deis", steps=5, gate="step", bound=0.2, w_stiff=1 / 3),
    replace(SMALL, schedule="fitted", steps=6),
    replace(SMALL, count=1, solver="dpm2"),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_command_line_makes_the_same_pixels(
    choice: Choice, digits: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches an option that is left out, rounded or misspelt.
    run = digits.run(choice)
    python, script, *args = shlex.split(as_command_line(run, digits.network))
    assert (python, script) == ("python", "generate_images.py")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(generate_command, args)
    assert done.exit_code == 0, done.output
    for seed, image in zip(choice.seeds, run.images, strict=True):
        with Image.open(tmp_path / "out" / f"{seed:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), image[0].numpy())


@pytest.mark.parametrize("choice", CHOICES)
def test_the_program_makes_the_same_pixels(choice: Choice, digits: Session) -> None:
    run = digits.run(choice)
    scope: dict[str, Any] = {}
    exec(as_python(run), scope)
    assert torch.equal(scope["images"], run.images)


def test_names_with_spaces_survive_the_shell(digits: Session) -> None:
    run = digits.run(SMALL)
    line = as_command_line(run, ("--net=/a b/it's.pkl",))
    assert shlex.split(line)[2] == "--net=/a b/it's.pkl"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"solver": "modal"}, "has no embedded pair to guide with"),
        ({"eta": 0.5}, "has no option 'eta'"),
        ({"solver": "deis", "form": "auto"}, "has no parameter-free form"),
        ({"schedule": "fitted", "steps": 7}, "nothing was fitted for digits and 7 steps"),
        ({"class_idx": 10}, "class 10 is outside 0 to 9"),
        ({"strength": 1e39}, "guidance must be a number of at most"),
        ({"w_stiff": -1.0}, "w_stiff must not be negative"),
        ({"steps": 99}, "steps cannot be 99"),
        ({"steps": None}, "steps cannot be None"),  # an emptied box
        ({"w_stiff": None}, "w_stiff cannot be None"),
        ({"strength": 3e38}, "NaN or infinity"),
    ],
)
def test_mistakes_are_shown_in_the_page(
    said: dict[str, Any], message: str, digits: Session
) -> None:
    # Catches an exception that would end in a traceback, and a page that keeps old images.
    values = {**vars(SMALL), **said}
    shown = list(page.respond(digits, list(values), list(values.values())))
    assert len(shown) == 1
    assert message in unescape(shown[0][0])
    assert 'role="alert"' in shown[0][0]
    assert shown[0][1:] == ("", "", "")


def test_messages_are_text_and_not_html() -> None:
    assert "<script>" not in showing.error("<script>alert(1)</script>")


@pytest.mark.usefixtures("coarse")
def test_the_page_fills_step_by_step(digits: Session) -> None:
    # Catches a page that waits for the reference before it shows the visitor's own images.
    values = vars(replace(SMALL, first_seed=31))
    shown = list(page.respond(digits, list(values), list(values.values())))
    images = [columns.count("<img") for columns, *_ in shown]
    assert images == [1, 2, 3, 3]
    assert [bool(trace) for _, trace, *_ in shown] == [False, False, False, True]
    assert "..." in shown[0][0]
    assert shown[-1][0].count("distance") >= 3
    assert "data:image/png;base64," in shown[-1][1]
    assert "http" not in shown[-1][0] + shown[-1][1]


def test_a_solver_without_a_pair_has_no_trace(digits: Session) -> None:
    # An empty plot would look like stiffness 0.
    said = showing.trace_picture(digits.run(replace(SMALL, solver="modal", form="none")))
    assert "modal has no pair of solutions" in said
    assert "<img" not in said


def test_distances_are_written_with_their_error() -> None:
    assert str(Distance(2.6549, 0.4971)) == "2.65 ± 0.50"
    assert str(Distance(123.4, 12.3)) == "123 ± 12"
    assert str(Distance(0.0012345, 0.0000123)) == "0.00123 ± 1.2e-05"
    assert str(Distance(2.6549, float("nan"))) == "2.65"


def test_a_file_of_settings_is_checked_at_once(tmp_path: Path) -> None:
    # Catches a page that begins, and says only later that the file is none.
    path = tmp_path / "settings.json"
    path.write_text("[]")
    with pytest.raises(ErkGuidError, match="is no file of settings"):
        Session.open(NET, config_of, True, fits_of("digits", path))
