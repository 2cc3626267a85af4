"""What the controls say, as options of the command line: nothing is lost, and no file is named."""

from __future__ import annotations

from typing import Any

import pytest

from erk_guid.cli.play import config_of, first_choice, fits_of
from erk_guid.common.errors import ErkGuidError
from erk_guid.guidance import ERKGuidance, ParameterFreeGuidance
from erk_guid.play.choice import MOST_IMAGES, MOST_STEPS, Choice, number
from erk_guid.play.page import RANDOM, choice_of
from erk_guid.solvers import DEIS, Heun, Modal

NET = ["--preset=digits", "--gnet=uncond:digits"]


def config(**said: Any) -> Any:
    return config_of([*NET, *Choice(**said).arguments(True, fits_of("digits", None))])


def test_every_control_reaches_the_config() -> None:
    # Catches a control that is forgotten, or put under another name: each is away from its default.
    made = config(
        solver="deis", steps=9, w_stiff=0.3, w_con=0.7, gate="step", bound=0.25, strength=1.7,
        schedule="logsnr", class_idx=4,
    )  # fmt: skip
    assert made.solver == DEIS()
    assert made.num_steps == 9
    assert made.erk == ERKGuidance(0.3, 0.7, "step", 0.25)
    assert made.guidance == 1.7
    assert made.schedule == "logsnr"
    assert made.class_idx == 4
    assert made.gnet == "uncond:digits"
    assert config(solver="modal", form="none", eta=0.35).solver == Modal(eta=0.35)
    assert config(form="auto").erk == ParameterFreeGuidance()
    assert config(form="none", w_stiff=0.5).erk == ERKGuidance()


def test_the_defaults_are_those_of_the_command_line() -> None:
    # Catches a default that is written a second time, here, and differs.
    plain = config_of([*NET, "--guidance=1"])
    made = config(form="none", steps=32)
    assert made == plain
    assert made.solver == Heun()


def test_the_first_choice_is_what_was_measured_for_the_preset() -> None:
    # The digits preset has settings of its own (docs/digits.md), other networks get the paper's.
    assert (first_choice("digits", 1).w_stiff, first_choice("digits", 1).w_con) == (0.5, 0.5)
    assert (first_choice(None, 1).w_stiff, first_choice(None, 1).w_con) == (0.5, 0.1)
    assert first_choice("digits-autog", 1.5).strength == 1.5


def test_a_fit_says_solver_and_guidance() -> None:
    # Catches options of the controls that are passed beside a fit, which would contradict it.
    fits = fits_of("digits", None)
    given = Choice(schedule="fitted", solver="heun", eta=0.5).arguments(True, fits)
    assert given == ["--guidance=1", "--schedule=fitted", "--steps=8"]
    made = config_of([*NET, *given])
    assert isinstance(made.solver, Modal)
    assert len(made.schedule) == 9


def test_fits_are_offered_where_there_are_some() -> None:
    # Catches a prefix taken for a name: 'digits' must not get the fits of 'digits-autog' alone.
    assert list(fits_of("digits", None)) == ["fitted"]
    assert list(fits_of("digits-autog", None)) == ["fitted"]
    assert fits_of("digits-guid", None) == {}
    assert fits_of(None, None) == {}


@pytest.mark.parametrize(
    "said",
    [
        {"schedule": "/etc/passwd"}, {"schedule": "80,5,1"}, {"schedule": "settings file"},
        {"solver": "--settings=x"}, {"solver": ["heun"]}, {"form": "paper"}, {"gate": None},
    ],
)  # fmt: skip
def test_a_visitor_names_no_file(said: dict[str, Any]) -> None:
    # On the command line --schedule takes a file. A request need not come from the page's controls.
    with pytest.raises(ErkGuidError, match=r"cannot be .*; choose from"):
        Choice(**said).arguments(True, fits_of("digits", None))


@pytest.mark.parametrize(
    "said",
    [
        {"steps": 0}, {"steps": MOST_STEPS + 1}, {"steps": 8.5}, {"steps": None},
        {"count": MOST_IMAGES + 1}, {"count": True}, {"first_seed": -1}, {"first_seed": 2**32 - 1},
        {"w_stiff": None}, {"w_stiff": float("nan")}, {"w_con": "0.5"}, {"eta": float("inf")},
        {"strength": True}, {"bound": "x"}, {"class_idx": "3"}, {"class_idx": -1},
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(said: dict[str, Any]) -> None:
    with pytest.raises(ErkGuidError, match=r"cannot be .*; give a"):
        Choice(**said)


def test_what_sliders_say() -> None:
    # Sliders give whole numbers as either kind, and 0 for no bound.
    said = {
        "steps": 8.0, "first_seed": 3, "count": 4.0, "bound": 0.0, "class_idx": RANDOM,
        "w_stiff": 0.5,
    }  # fmt: skip
    made = choice_of(said)
    assert made == Choice(steps=8, first_seed=3, count=4, w_stiff=0.5)
    assert made.seeds == range(3, 7)


def test_a_strength_needs_a_guide() -> None:
    with pytest.raises(ErkGuidError, match="needs a guiding network: begin the playground with"):
        Choice(strength=2.0).arguments(False, {})
    assert "--guidance=1" not in Choice().arguments(False, {})


@pytest.mark.parametrize("value", [0.5, 1, 1 / 3, 0.1 + 0.2, 1e-7, 123456.789, 2.0])
def test_numbers_are_read_as_they_were(value: float) -> None:
    # '%g' has six digits: a copied line with 0.333333 would make other images.
    assert float(number(value)) == value
