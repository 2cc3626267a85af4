"""Fitted noise levels against the best published solver with either usual spacing.

Fits the shipped model plain, with CFG 3 and with autoguidance, then measures on the samples that
the fit did not see. Writes the settings files that the package ships, and a table.

    python benchmarks/fits.py --outdir output/fits [--device cuda] [--trials 180]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from erk_guid import load, sample
from erk_guid.denoisers import guided_denoiser, in_batches
from erk_guid.generation.images import draw
from erk_guid.generation.seeds import SeededNoise
from erk_guid.models.checkpoints.presets import PRESETS
from erk_guid.norms import norm
from erk_guid.schedules import make_sigmas
from erk_guid.solvers import DEIS, IPNDM, IPNDMV, RES, DPMpp, Heun, Modal, Solver, UniPC
from erk_guid.studies.fitting import fit_each
from erk_guid.studies.fitting.fit_files import fits_csv, settings_of_fit, table
from erk_guid.studies.fitting.results import bootstrap_mean, bootstrap_ratio
from erk_guid.studies.fitting.trials import Method

PUBLISHED: tuple[Solver, ...] = (
    Heun(), DEIS(2), DEIS(3), DEIS(4), DEIS(2, "log"), DEIS(3, "log"), IPNDM(3), IPNDM(4),
    IPNDMV(2), IPNDMV(3), IPNDMV(4), DPMpp(2), DPMpp(2, lower_order_final=False), DPMpp(3),
    DPMpp(3, predict_x0=False), UniPC(2), UniPC(3), UniPC(2, predict_x0=False),
    UniPC(3, predict_x0=False), RES(2),
)  # fmt: skip
CASES = {"digits": ("digits", None), "digits-guid": ("digits-guid", 3.0),
         "digits-autog": ("digits-autog", None)}  # fmt: skip
SEEDS = range(50000, 50128)
FINE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outdir", type=Path, default=Path("output/fits"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--evaluations", default="6,8,10,14")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--num", type=int, default=len(SEEDS))
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    counts = [int(count) for count in args.evaluations.split(",")]
    args.outdir.mkdir(parents=True, exist_ok=True)
    for name in args.cases.split(","):
        preset, strength = CASES[name]
        measure(name, preset, strength, counts, args)


def measure(
    name: str, preset: str, strength: float | None, counts: list[int], args: argparse.Namespace
) -> None:
    """Fit one case, compare it, write the files."""
    given = PRESETS[preset]
    strength = given.guidance if strength is None else strength
    main_net = load(preset, device=args.device)
    guide = load(given.gnet, device=args.device).net if given.gnet else None
    denoiser = guided_denoiser(main_net.net, guide, strength)
    seeds = list(SEEDS)[: args.num]
    noise, labels = draw(main_net.net, SeededNoise(seeds, torch.device(args.device)), None)
    x = noise * 80
    began = time.time()
    with torch.no_grad():
        fits = fit_each(
            denoiser, x, evaluations=counts, labels=labels, batch=args.batch, trials=args.trials
        )
    seconds = time.time() - began
    held = slice(2 * min(32, args.num // 4), args.num)
    denoise = in_batches(denoiser, None if labels is None else labels[held], args.batch)
    start = x[held]

    def errors(solver: Solver, sigmas: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return norm(sample(denoise, start, sigmas, solver=solver) - end).double().cpu()

    with torch.no_grad():  # by another solver than any that is compared as modal is
        end = sample(denoise, start, make_sigmas("polynomial", FINE + 1, 0.002, 80, 7)[:-1],
                     solver=DEIS(4, "rhoab"))  # fmt: skip
    lines = [f"## {name}, model guidance {strength:g}: {seconds:.0f} s on {args.device}", "",
             table(fits), "",
             "| evaluations | best published | its error | modal | fitted | times |",
             "|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for fitted, count in zip(fits, counts, strict=True):
        rivals = {}
        for solver in PUBLISHED:
            for spacing in ("polynomial", "logsnr"):
                levels = Method(solver).intervals(count, False) + 1
                sigmas = make_sigmas(spacing, levels, 0.002, 80, 7)[:-1]
                rivals[f"{Method(solver)} {spacing}"] = errors(solver, sigmas)
        best = min(rivals, key=lambda rival: float(rivals[rival].nan_to_num(torch.inf).mean()))
        ours = min(
            float(errors(Modal(), make_sigmas(s, count + 1, 0.002, 80, 7)[:-1]).mean())
            for s in ("polynomial", "logsnr")
        )
        after = errors(fitted.solver, fitted.sigmas)
        lines.append(
            f"| {count} | {best} | {bootstrap_mean(rivals[best])} | {ours:.3g} | "
            f"{bootstrap_mean(after)} | {bootstrap_ratio(after, rivals[best])} |"
        )
        order = sorted(rivals, key=lambda rival: float(rivals[rival].nan_to_num(torch.inf).mean()))
        lines.append(
            f"<!-- {count}: {fitted.solver}; "
            + "; ".join(f"{rival} {float(rivals[rival].mean()):.3g}" for rival in order[:5])
            + " -->"
        )
        record = {
            "net": preset, "net_sha256": main_net.fingerprint, "gnet": given.gnet,
            "guidance": strength, "seeds": f"{seeds[0]}-{seeds[-1]}", "dtype": "float32",
            "torch": torch.__version__, "device": args.device,
        }  # fmt: skip
        settings_of_fit(fitted, record).write(args.outdir / f"{name}-{count}.json")
    heun = {}
    for steps in (8, 12, 16, 20, 24, 32):
        sigmas = make_sigmas("polynomial", steps, 0.002, 80, 7)[:-1]
        heun[2 * steps - 2] = float(errors(Heun(), sigmas).mean())
    lines += ["", f"plain Heun by evaluations: {json.dumps(heun)}", ""]
    (args.outdir / f"{name}.md").write_text("\n".join(lines))
    (args.outdir / f"{name}.csv").write_text(fits_csv(fits))
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
