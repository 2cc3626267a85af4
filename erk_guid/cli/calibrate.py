"""``erk-guid calibrate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from erk_guid.cli.common import PathType, SeedList, compact, refuse_inputs, reporting_errors
from erk_guid.cli.options import chosen_options
from erk_guid.cli.sampler import config_fields
from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.common.files import check_writable, write_bytes
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.locks import locked
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.generation.seeds import SeededNoise
from erk_guid.guidance import ERKGuidance
from erk_guid.solvers import name_of, names_of_solvers
from erk_guid.studies.fitting.calibration import (
    FEWEST,
    OBJECTIVES,
    REFERENCE_ERROR,
    Calibration,
    Trial,
    is_published,
    written,
)

MADE_FOR = ("solver", "order", "r", "deis_mode", "num_steps", "sigma_min", "sigma_max", "rho")
"""Options, besides the schedule, that the settings are made for."""


NETWORK = ("net", "gnet", "guidance")
"""Options that name a denoiser, besides a preset."""


@click.command()
@chosen_options("preset", "net", "gnet", "guidance", "guidance_interval", "class_idx")
@chosen_options("num_steps", "solver", "order", "r", "deis_mode")
@chosen_options("schedule", "sigma_min", "sigma_max", "rho", "bound", "gate")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=OBJECTIVES[0],
    show_default=True,
    help="Error to minimize: that of the end points, or that of each step on its own.",
)
@click.option(
    "--auto/--no-auto",
    default=True,
    show_default=True,
    help="Try the parameter-free form too, where the solver has it.",
)
@click.option(
    "--seeds",
    metavar="LIST",
    type=SeedList(),
    default="50000-50063",
    show_default=True,
    help=f"Seeds of the images; at least {FEWEST}. Better not those that will be scored.",
)
@chosen_options("batch", "device", "dtype", "precision", "compile", "trust_pickle")
@click.option(
    "--outdir",
    type=PathType(file_okay=False, path_type=Path),
    default=Path("output/calibration"),
    show_default=True,
    help="For settings.json, trials.csv, calibration.md and calibration.svg.",
)
@reporting_errors
def calibrate_command(
    objective: str, auto: bool, seeds: list[int], outdir: Path, **options: Any
) -> None:
    """Find the settings of ERK guidance for a model, a solver and a number of steps.

    A few dozen images are computed by a fine solution. The search looks for the setting that
    ends nearest to them, from the same noise. This measures fidelity to the ODE. FID mostly
    follows it; a score that rewards sharpness, such as FD-DINOv2, may prefer stronger guidance.

    \b
    Examples:
      erk-guid calibrate --net=digits --steps=8
      python generate_images.py --net=digits --outdir=out \\
          --settings=output/calibration/settings.json
    \b
      # with model guidance, and without the parameter-free form
      erk-guid calibrate --preset=edm2-img512-s-guid-fid --steps=16 --no-auto --seeds=50000-50031
    """
    from tqdm import tqdm

    from erk_guid.denoisers import guided_denoiser
    from erk_guid.generation.images import draw
    from erk_guid.generation.settings import Settings
    from erk_guid.schedules import make_sigmas
    from erk_guid.studies.fitting import calibrate
    from erk_guid.studies.fitting.calibration_files import BEGINS, FILES, trials_csv, write_trials

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "the plot")
    guided = names_of_solvers(has_pair=True)
    if options["solver"] not in guided:
        raise click.UsageError(
            f"--solver {options['solver']} has no embedded pair to guide with; solvers that have "
            f"one: {', '.join(guided)}"
        )
    if len(seeds) < FEWEST:
        raise click.UsageError(f"--seeds lists {len(seeds)}; a calibration needs at least {FEWEST}")
    # Any strength will do: the checks of the options are the same.
    config = GenerationConfig(**config_fields(w_stiff=1.0, w_con=None, **options))
    for name in FILES:
        refuse_inputs(outdir=outdir / name)
        check_writable(outdir / name, BEGINS.get(name, ()))
    click.get_current_context().with_resource(locked(outdir))
    models = config.open(config.choose_device(), ProcessGroup(), decoding=False)
    noise, labels = draw(models.loaded.net, SeededNoise(seeds, models.device), config.class_idx)
    if isinstance(config.schedule, str):
        sigmas = make_sigmas(
            config.schedule, config.num_steps, config.sigma_min, config.sigma_max, config.rho
        )
    else:
        sigmas = torch.tensor(config.schedule, dtype=torch.float64)
    network = guided_denoiser(
        models.loaded.net, models.guide.net if models.guide else None, config.guidance,
        config.guidance_interval,
    )  # fmt: skip
    x = noise.to(getattr(torch, config.dtype)) * float(sigmas[0])
    with tqdm(desc="Network evaluations, at most", unit="image", file=sys.stderr) as bar:

        def show(done: int, most: int) -> None:
            bar.total = most
            bar.update(done - bar.n)

        def keep(trials: Sequence[Trial]) -> None:
            write_bytes(outdir / FILES[1], trials_csv(trials).encode())

        assert isinstance(config.erk, ERKGuidance)  # w_stiff is a number, above
        try:
            found = calibrate(
                network, x, sigmas, labels=labels,
                solver=config.solver, guidance=config.erk, objective=objective, auto=auto,
                batch=config.batch, progress=show, note=keep,
            )  # fmt: skip
        except ValueError as error:
            raise ErkGuidError(str(error)) from error
        bar.total = bar.n
        bar.refresh()

    heading = _heading(config, found, len(seeds))
    click.echo(f"{heading}\n\n{found.table()}")
    recorded = config.record()
    made_for = {name: recorded[name] for name in MADE_FOR}
    spaced = config.schedule if isinstance(config.schedule, str) else list(config.schedule)
    chosen = found.chosen
    Settings(
        found.guidance,
        {**made_for, "schedule": spaced},
        {
            "net": config.net, "net_sha256": models.loaded.fingerprint, "gnet": config.gnet,
            "guidance": config.guidance, "guidance_interval": config.guidance_interval,
            "class": config.class_idx, "dtype": config.dtype,
            "precision": models.used.precision,
            "seeds": compact(seeds), "objective": objective, "error": chosen.error,
            "ratio": chosen.ratio, "ratio_error": chosen.ratio_error,
            "reference_error": found.reference_error, "evaluations": found.nfe,
            "torch": torch.__version__,
        },
    ).write(outdir / FILES[0])  # fmt: skip
    write_trials(found, outdir, heading.splitlines()[0], heading)
    click.echo(f"Written to {outdir}: {', '.join(FILES)}")
    click.echo(
        f"Use it: python generate_images.py {network_options(config, options)} "
        f"--settings={outdir / FILES[0]} --outdir=..."
    )


def network_options(config: GenerationConfig, given: Mapping[str, Any]) -> str:
    """Return the options that name the same denoiser."""
    if given["preset"] is not None:
        # The other options given, too: they override the preset's own.
        said = {"preset": given["preset"], **{name: given[name] for name in NETWORK}}
    else:
        said = {"net": config.net}
        if config.guidance != 1:
            said |= {"gnet": config.gnet, "guidance": f"{config.guidance:g}"}
    said["class"] = config.class_idx
    if config.guidance_interval is not None:
        said["guidance_interval"] = ",".join(f"{level:g}" for level in config.guidance_interval)
    shown = {name: value for name, value in said.items() if value is not None}
    return " ".join(f"--{name.replace('_', '-')}={value}" for name, value in shown.items())


def _heading(config: GenerationConfig, found: Calibration, samples: int) -> str:
    """Return in words what was measured and what was found."""
    chosen = found.chosen
    g = chosen.guidance
    if not isinstance(g, ERKGuidance):
        said = f"w_stiff {written(g)[0]}, the parameter-free form"
    elif g.active:
        said = f"w_stiff {g.w_stiff:g}, w_con {g.w_con:g}"
    else:
        said = "no guidance: nothing was found that is better beyond doubt"
    lines = [
        f"Calibration of {name_of(config.solver)} at {config.num_steps} steps on {config.net}",
        "",
        f"Recommended: {said}.",
    ]
    if g.active:
        lines.append(
            f"Its error is {chosen.ratio:.3f} ± {chosen.ratio_error:.3f} times that without "
            "guidance."
        )
    published = [t for t in found.trials if is_published(t.guidance)]
    if published and not isinstance(g, ERKGuidance):
        best = published[0]
        w_stiff, w_con = written(best.guidance)
        lines.append(
            f"The best of the published form: w_stiff {w_stiff}, w_con {w_con}, "
            f"{best.ratio:.3f} ± {best.ratio_error:.3f} times (--no-auto)."
        )
    lines += [
        f"{samples} images, {found.nfe} network evaluations, those of the fine solution "
        f"included, whose own error is about {found.reference_error:.1%} of plain's.",
        "Settings are ranked by the ratio plus two standard errors.",
        "What was measured is fidelity to the ODE, not how images look or score.",
    ]
    if found.reference_error > REFERENCE_ERROR:
        lines.append("The fine solution is too coarse to trust this: calibrate for more steps.")
    return "\n".join(lines)
