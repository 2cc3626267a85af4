"""The paper's rows, with the unguided baselines that its tables compare them with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.denoisers import check_interval
from erk_guid.generation.fits import FITTED, shipped_fits
from erk_guid.generation.settings import read_settings
from erk_guid.guidance import FORMS, PAPER_SETTINGS, ERKGuidance, settings_of
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.solvers import SOLVERS, name_of, options_of

Family = Literal["plain", "guid", "autog"]
"""Without model guidance, with classifier-free guidance, with autoguidance."""

PAPER_NUM = 50_000
FIRST_SEED = 100_000
PAPER_BATCH = 125


@dataclass(frozen=True)
class Row:
    """One run: what is generated, and the paper's results for it.

    Attributes:
        id: names the row in files and on the command line.
        table: '2', '3', '4', 'digits' or 'settings'.
        steps: noise levels.
        model: the paper's preset.
        family: which kind of model guidance it has.
        guidance: strength of model guidance, if it is not the preset's own.
        w_stiff: strength of ERK guidance; 0 for a baseline, 'auto' for the parameter-free form,
            None where it is not known.
        w_con: gate of ERK guidance.
        denoise_to_zero: whether it ends with a step to sigma = 0.
        options: further options of the command line, by name.
        paper: the paper's value by metric, as far as known.
        note: what else the paper says of it.
        settings: a settings file that says solver, noise levels and guidance; the fields above
            then repeat what it says.
    """

    id: str
    table: str
    steps: int
    model: str
    family: Family = "plain"
    guidance: float | None = None
    w_stiff: float | str | None = 0.0
    w_con: float | None = None
    solver: str = "heun"
    denoise_to_zero: bool = True
    options: Mapping[str, float | str] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    settings: str | None = None

    @property
    def guided(self) -> bool:
        return self.w_stiff != 0

    @property
    def settled(self) -> bool:
        """Whether nothing is left to choose."""
        return not self.guided or self.w_stiff in FORMS or None not in (self.w_stiff, self.w_con)

    @property
    def group(self) -> tuple[str, int, str, str]:
        """The row's group: its rows differ in ERK guidance only; the unguided is the baseline.

        A row of settings is a group of its own: noise levels differ, too.
        """
        return self.table, self.steps, self.family, self.settings or self.solver

    @property
    def evaluations(self) -> int:
        """Calls of the network that an image takes."""
        if self.fitted:
            return self.steps
        intervals = self.steps if self.denoise_to_zero else self.steps - 1
        if not SOLVERS[self.solver].two_stages:
            return intervals
        return 2 * intervals - self.denoise_to_zero  # the step to 0 is Euler's

    @property
    def fitted(self) -> bool:
        """Whether it runs at the levels that ship with the preset, for `steps` evaluations."""
        return self.options.get("schedule") == FITTED

    @property
    def title(self) -> str:
        if self.fitted:
            return f"{self.solver}, fitted levels"
        kinds = {"plain": "", "guid": "CFG, ", "autog": "autoguidance, "}
        kind = kinds[self.family] + ("" if self.solver == "heun" else f"{self.solver}, ")
        if self.settings is not None:
            kind = f"{Path(self.settings).name}: {kind}"
        if self.settings is None and not SOLVERS[self.solver].has_pair:
            return self.solver
        if not self.guided:
            return f"{kind}no ERK guidance"
        if self.w_stiff is None:
            return f"{kind}ERK-Guid ? / ?"
        if isinstance(self.w_stiff, str):
            return f"{kind}ERK-Guid {self.w_stiff}"
        return f"{kind}ERK-Guid {self.w_stiff:g} / {self.w_con:g}"


def _paper(fid: float | None = None, dino: float | None = None) -> dict[str, float]:
    return {k: v for k, v in (("fid", fid), ("fd_dinov2", dino)) if v is not None}


def _table2() -> list[Row]:
    model = "edm2-img512-s-fid"
    rows = [Row("2-32-plain", "2", 32, model, paper=_paper(2.58, 90.1))]
    for w_stiff in (0.5, 1.0, 1.5, 2.0, 2.5):
        best = w_stiff == 2.0
        rows.append(
            Row(
                f"2-32-w{w_stiff}",
                "2",
                32,
                model,
                w_stiff=w_stiff,
                w_con=0.5,
                paper=_paper(2.74, 82.8) if best else {},
            )
        )
    for steps, plain, guided in (
        (16, _paper(2.79, 97.4), _paper(2.68, 88.9)),
        (8, _paper(7.06, 161.2), _paper(4.91, 136.9)),
    ):
        w_stiff, w_con = PAPER_SETTINGS[steps]
        rows.append(Row(f"2-{steps}-plain", "2", steps, model, paper=plain))
        rows.append(
            Row(
                f"2-{steps}-w{w_stiff}",
                "2",
                steps,
                model,
                w_stiff=w_stiff,
                w_con=w_con,
                paper=guided,
            )
        )
    return rows


def _table3() -> list[Row]:
    rows = []
    families: tuple[tuple[Family, str], ...] = (
        ("guid", "edm2-img512-s-guid-fid"),
        ("autog", "edm2-img512-s-autog-fid"),
    )
    values = {
        (32, "guid"): (None, _paper(2.27, 88.5), _paper(2.27, 83.9)),
        (32, "autog"): (None, _paper(1.36, 50.4), _paper(1.36, 47.6)),
        (16, "guid"): (1.2, _paper(3.61), _paper(3.20)),
        (16, "autog"): (1.55, _paper(2.32), _paper(1.93)),
    }
    for steps, w_stiff in ((32, 1.0), (16, 0.75)):
        for family, model in families:
            strength, plain, guided = values[steps, family]
            stem = f"3-{steps}-{family}"
            rows.append(Row(f"{stem}-plain", "3", steps, model, family, strength, paper=plain))
            rows.append(
                Row(
                    f"{stem}-w{w_stiff}",
                    "3",
                    steps,
                    model,
                    family,
                    strength,
                    w_stiff=w_stiff,
                    w_con=0.5,
                    paper=guided,
                )
            )
    return rows


def _table4() -> list[Row]:
    rows = []
    # As in the toolbox that the paper used: from the first to the last of these noise levels,
    # without a step to 0. A step of Heun or DPM-Solver-2 takes two evaluations, one of DEIS one.
    # The unguided numbers are in that toolbox's README, DEIS's (tAB3) with this schedule.
    deis: Mapping[str, float | str] = {"order": 4, "schedule": "time_uniform", "rho": 2}
    settings: tuple[tuple[str, int, Mapping[str, float | str], float, float], ...] = (
        ("heun", 4, {}, 89.63, 85.19),
        ("dpm2", 4, {}, 44.83, 31.59),
        ("deis", 7, deis, 12.57, 9.56),
    )
    for solver, levels, options, plain, guided in settings:
        for name, w_stiff, fid in (("plain", 0.0, plain), ("erk", None, guided)):
            unknown = "; the paper's w_stiff and w_con are not known here"
            rows.append(
                Row(
                    f"4-{solver}-{name}",
                    "4",
                    levels,
                    "edm-imagenet-64x64-cond-adm",
                    w_stiff=w_stiff,
                    solver=solver,
                    denoise_to_zero=False,
                    options=options,
                    paper=_paper(fid),
                    note="6 network evaluations" + ("" if w_stiff == 0 else unknown),
                )
            )
    return rows


DIGITS_SWEEP: Mapping[int, Iterable[tuple[float, float]]] = {
    **{s: [*product((0.25, 0.5, 1.0, 2.0), (0.1, 0.5)), (0.5, 0.0)] for s in (5, 6, 8)},
    **{s: [*product((0.5, 1.0), (0.1, 0.5)), (2.0, 0.5)] for s in (12, 16)},
    32: [(0.5, 0.1), (0.5, 0.5), (1.0, 0.5), (2.0, 0.5)],
}
"""Steps to (w_stiff, w_con): the experiment on the shipped model."""


def _digits() -> list[Row]:
    rows = []
    for steps, settings in DIGITS_SWEEP.items():
        rows.append(Row(f"{steps:02d}-plain", "digits", steps, "digits"))
        for w_stiff, w_con in settings:
            name = f"{steps:02d}-w{w_stiff:g}-c{w_con:g}"
            rows.append(Row(name, "digits", steps, "digits", w_stiff=w_stiff, w_con=w_con))
        rows.append(Row(f"{steps:02d}-auto", "digits", steps, "digits", w_stiff="auto"))
    # At as many evaluations as Heun's runs above take.
    rows += [
        Row(f"{2 * steps - 1:02d}-modal", "digits", 2 * steps - 1, "digits", solver="modal")
        for steps in DIGITS_SWEEP
        if steps <= 16
    ]
    rows += [
        Row(f"{calls:02d}-fitted", "digits", calls, "digits", solver="modal",
            options={"schedule": FITTED})
        for calls in shipped_fits()["digits"]
    ]  # fmt: skip
    return rows


TABLES: Mapping[str, list[Row]] = {
    "2": _table2(),
    "3": _table3(),
    "4": _table4(),
    "digits": _digits(),
}
CAPTIONS = {
    "2": "Table 2: EDM2-S on ImageNet-512, Heun, no model guidance",
    "3": "Table 3: EDM2-S on ImageNet-512, Heun, with model guidance",
    "4": "Table 4: other solvers, EDM (ADM) on ImageNet-64, 6 network evaluations",
    "digits": "The shipped digits model",
    "settings": "Settings of your own",
}
NOTES = {
    "2": "The paper's best FID over the sweep of w_stiff at 32 steps is 2.56; it is not known of "
    "which row.",
}
PAPER_TABLES = ("2", "3", "4")


def settings_row(path: Path, model: str | None) -> Row:
    """Return the row of a settings file, as `erk-guid fit` and `calibrate` write them.

    Args:
        path: the file.
        model: what the user asks for in place of the network it was measured on.

    Raises:
        ErkGuidError: it cannot be read, or it does not say enough to run it.
    """
    found = read_settings(path)
    made_for, measured = found.made_for, found.measured
    net, interval = str(measured.get("net")), measured.get("guidance_interval")
    if model is None and net not in PRESETS:
        raise ErkGuidError(
            f"{path} was measured on {printable(net)}, which is no preset: name a model with "
            "--model"
        )
    if made_for.get("num_steps", 0) < 1:
        raise ErkGuidError(f"{path} does not say for how many steps it is")
    guidance = measured.get("guidance", 1)
    try:
        strength = float(guidance)
        if not math.isfinite(strength):
            raise ValueError(guidance)
        if interval is not None:
            check_interval(interval)
    except (TypeError, ValueError, OverflowError) as error:
        raise ErkGuidError(f"{path}: the model guidance it was measured with is none") from error
    gnet = measured.get("gnet")
    if model is None and strength != 1 and gnet != PRESETS[net].gnet:
        raise ErkGuidError(
            f"{path} was measured with the guiding network {printable(gnet)}, which is not that of "
            f"the preset {net}: name networks with --model and --gnet"
        )
    family: Family = "plain"
    if strength != 1:
        family = "autog" if "autog" in net else "guid"
    options: dict[str, float | str] = {}
    if interval is not None:
        options["guidance-interval"] = "{:g},{:g}".format(*interval)
    for name, kind in (("class", int), ("dtype", str), ("precision", str)):
        value = measured.get(name)
        usual = name == "dtype" and value == "float32"
        if isinstance(value, kind) and not isinstance(value, bool) and not usual:
            options[name] = value
    solver, erk = found.solver(), found.guidance
    chosen = settings_of(erk)
    said = {**options_of(solver), **{k: chosen[k] for k in ("bound", "gate") if erk.active}}
    return Row(
        f"settings-{path.stem}", "settings", made_for["num_steps"], net, family,
        None if strength == 1 else strength,
        w_stiff=chosen["w_stiff"],
        w_con=erk.w_con if isinstance(erk, ERKGuidance) and erk.active else None,
        solver=name_of(solver),
        denoise_to_zero=made_for.get("denoise_to_zero", True),
        options=options,
        note=", ".join(
            f"{name} {value}" for name, value in said.items()
            if name != "response" and value not in (None, ERKGuidance.gate)
        ),
        settings=str(path),
    )  # fmt: skip


def choose_rows(tables: Iterable[str], ids: Iterable[str] = ()) -> list[Row]:
    """Return the rows of these tables, or only those with these ids.

    Raises:
        ErkGuidError: there is no such row.
    """
    rows = [row for table in tables for row in TABLES[table]]
    ids = list(ids)
    if not ids:
        return rows
    everywhere = {row.id: row for table in TABLES.values() for row in table}
    for name in ids:
        if name not in everywhere:
            known = ", ".join(everywhere)
            raise ErkGuidError(f"there is no row {name!r}; there are {known}")
    return [everywhere[name] for name in dict.fromkeys(ids)]
