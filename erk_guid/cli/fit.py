"""``erk-guid fit``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from erk_guid.cli.calibrate import network_options
from erk_guid.cli.common import PathType, SeedList, compact, reporting_errors
from erk_guid.cli.options import SOLVER_OPTIONS, chosen_options
from erk_guid.cli.sampler import config_fields
from erk_guid.common.errors import ErkGuidError, MissingExtraError
from erk_guid.common.files import check_writable
from erk_guid.common.signals import number_of
from erk_guid.generation.config import GenerationConfig
from erk_guid.generation.locks import locked
from erk_guid.generation.process_groups import ProcessGroup
from erk_guid.generation.seeds import SeededNoise
from erk_guid.generation.settings import SETTINGS_START
from erk_guid.generation.stopping import StoppedError
from erk_guid.solvers import SOLVERS

BEST = "best"
MOST = 1000
"""Largest number of evaluations that levels are fitted for."""
SEEDS = "50000-50127"
TOO_COARSE = 0.1
"""Part of the result's error that the fine solution's own may be."""


@click.command()
@chosen_options("preset", "net", "gnet", "guidance", "guidance_interval", "class_idx")
@click.option(
    "--evaluations",
    metavar="LIST",
    type=SeedList(),
    default="8",
    show_default=True,
    help="Network evaluations that a run may take, e.g. 6,8,10; each is fitted.",
)
@click.option(
    "--solver",
    type=click.Choice([BEST, *sorted(SOLVERS)]),
    default=BEST,
    show_default=True,
    help="Solver to fit for; 'best' finds that, too, among those that won somewhere.",
)
@chosen_options(*(name for name in SOLVER_OPTIONS if name not in ("response", "eta")))
@chosen_options("w_stiff", "w_con", "bound", "gate", "sigma_min", "sigma_max")
@click.option(
    "--denoise-to-zero/--no-denoise-to-zero",
    default=False,
    show_default=True,
    help="End with an Euler step to sigma = 0, which takes one of the evaluations.",
)
@click.option(
    "--seeds",
    metavar="LIST",
    type=SeedList(),
    default=SEEDS,
    show_default=True,
    help="Seeds of the images; a quarter to search, a quarter to choose, half for the report.",
)
@click.option(
    "--trials",
    metavar="INT",
    type=click.IntRange(min=1),
    help="Budget of the search, in runs on a quarter of the images.  [default: 60, best: 180]",
)
@click.option(
    "--samples",
    metavar="INT",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="Images drawn to samples.png: before, fitted, and the fine solution; 0 draws none, and "
    "needs no VAE.",
)
@chosen_options("batch", "device", "dtype", "precision", "compile", "trust_pickle")
@click.option(
    "--outdir",
    type=PathType(file_okay=False, path_type=Path),
    default=Path("output/fit"),
    show_default=True,
    help="For fit-N.json (settings), fit.md, fit.csv, levels.svg, errors.svg, samples.png; and "
    "journal/, from which an interrupted fit goes on.",
)
@reporting_errors
def fit_command(
    evaluations: list[int],
    solver: str,
    denoise_to_zero: bool,
    seeds: list[int],
    trials: int | None,
    samples: int,
    outdir: Path,
    **options: Any,
) -> None:
    """Find the noise levels and the solver with which a model needs the fewest evaluations.

    A few images are computed by a fine solution. The search moves the noise levels until short
    runs end as near to them as they can, from the same noise. What is reported is measured on
    images that the search did not see. It is fidelity to the ODE, not how images look or score.

    \b
    Examples:
      erk-guid fit --preset=digits --evaluations=6,8,10
      python generate_images.py --preset=digits --outdir=out --settings=output/fit/fit-8.json
    \b
      # for one solver, with model guidance in an interval
      erk-guid fit --preset=digits-autog --guidance-interval=0.2,5 --solver=unipc --order=2
    """
    from tqdm import tqdm

    from erk_guid.common.pictures import save_picture
    from erk_guid.denoisers import guided_denoiser, in_batches
    from erk_guid.generation.images import draw
    from erk_guid.studies.fitting import fit_each
    from erk_guid.studies.fitting.fit_files import (
        BEGINS,
        FILES,
        SAMPLES_FILE,
        draw_samples,
        settings_name,
        settings_of_fit,
        table,
        write_fits,
    )
    from erk_guid.studies.fitting.journal import TRIALS
    from erk_guid.studies.fitting.levels import FEWEST

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "plots", "the plots")
    given = {name: options[name] for name in SOLVER_OPTIONS if options.get(name) is not None}
    if solver == BEST and given:
        name = next(iter(given))
        raise click.UsageError(f"--{name} belongs to one solver: name it with --solver")
    if solver == BEST and options["w_stiff"] != 0:
        raise click.UsageError(
            f"--w_stiff {options['w_stiff']} guides one solver: name it with --solver (heun, dpm2)"
        )
    for count in evaluations:
        if not 2 <= count <= MOST:
            raise click.UsageError(f"--evaluations: {count} is not a number of 2 to {MOST}")
    config = GenerationConfig(
        **config_fields(
            solver="heun" if solver == BEST else solver,
            response=None, eta=None, schedule="polynomial", num_steps=2, rho=GenerationConfig.rho,
            denoise_to_zero=denoise_to_zero, **options,
        )
    )  # fmt: skip
    if len(seeds) < FEWEST:
        raise click.UsageError(f"--seeds lists {len(seeds)}; a fit needs at least {FEWEST}")
    if samples > len(seeds) // 2 >= FEWEST // 2:
        raise click.UsageError(
            f"--samples {samples}: the images of the report are drawn, half of {len(seeds)}"
        )
    files = (*FILES, *([SAMPLES_FILE] if samples else []))
    for name in files:
        check_writable(outdir / name, BEGINS.get(name, ()))
    for count in evaluations:
        check_writable(outdir / settings_name(count), SETTINGS_START)
    click.get_current_context().with_resource(locked(outdir))
    models = config.open(config.choose_device(), ProcessGroup(), decoding=samples > 0)
    noise, labels = draw(models.loaded.net, SeededNoise(seeds, models.device), config.class_idx)
    network = guided_denoiser(
        models.loaded.net, models.guide.net if models.guide else None, config.guidance,
        config.guidance_interval,
    )  # fmt: skip
    x = noise.to(getattr(torch, config.dtype)) * config.sigma_max
    record = {
        "net": config.net, "net_sha256": models.loaded.fingerprint, "gnet": config.gnet,
        "guidance": config.guidance, "guidance_interval": config.guidance_interval,
        "class": config.class_idx, "dtype": config.dtype,
        "precision": models.used.precision, "seeds": compact(seeds),
    }  # fmt: skip
    journal = outdir / "journal"
    if (journal / TRIALS).exists():
        click.echo(f"{journal} is there: its trials are taken if they are this search's", err=True)
    with tqdm(desc="Network evaluations", unit="image", file=sys.stderr, smoothing=0.05) as bar:

        def show(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        def denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return network(x, sigma, labels)

        try:
            fits = fit_each(
                denoiser, x, evaluations=evaluations,
                solver=BEST if solver == BEST else config.solver,
                guidance=config.erk if config.erk.active else None, labels=labels,
                sigma_min=config.sigma_min, sigma_max=config.sigma_max,
                denoise_to_zero=denoise_to_zero, trials=trials, batch=config.batch,
                progress=show, journal=journal, journal_of=repr(record),
            )  # fmt: skip
        except ValueError as error:
            raise ErkGuidError(str(error)) from error
        except KeyboardInterrupt as error:
            number = number_of(error)
            raise StoppedError(number, f"the same command goes on from {journal}") from None
    for fitted, count in zip(fits, evaluations, strict=True):
        settings_of_fit(fitted, {**record, "torch": torch.__version__}).write(
            outdir / settings_name(count)
        )
    guide = (
        ""
        if config.guidance == 1
        else f", model guidance {config.guidance:g}"
        + (f" in {config.guidance_interval}" if config.guidance_interval else "")
    ) + ("" if config.class_idx is None else f", class {config.class_idx}")
    searched, chosen, reported = fits[0].samples
    heading = (
        f"# Noise levels for {config.net}{guide}\n\n"
        f"Searched on {searched} images, chosen on {chosen} others, reported on {reported} others. "
        "Errors are mean distances to a fine solution from the same noise, with 95 % bootstrap "
        "intervals. This is fidelity to the ODE, not how images look or score."
    )
    write_fits(fits, outdir, heading)
    if samples:
        some = slice(-samples, None)
        of_some = None if labels is None else labels[some]
        with torch.no_grad():
            picture = draw_samples(
                fits, in_batches(network, of_some, config.batch), x[some], models.encoder.decode
            )
        save_picture(outdir / SAMPLES_FILE, picture)
    click.echo(f"{heading}\n\n{table(fits)}")
    for fitted in fits:
        cost = fitted.cost
        click.echo(
            f"{fitted.evaluations} evaluations: searched by {cost.search} image evaluations and "
            f"{cost.reference} of the fine solution, in {cost.seconds:.0f} s; the fine solution's "
            f"own error is about {fitted.reference_error:.1%} of the result's"
        )
        if fitted.reference_error > TOO_COARSE:
            click.echo(
                "The fine solution is too coarse to trust this: its own error is large beside the "
                "result's",
                err=True,
            )
    click.echo(f"Written to {outdir}: " + ", ".join([*map(settings_name, evaluations), *files]))
    click.echo(
        f"Use it: python generate_images.py {network_options(config, options)} "
        f"--settings={outdir / settings_name(evaluations[-1])} --outdir=..."
    )
