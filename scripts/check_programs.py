#!/usr/bin/env python3
"""Run other programs' own checkouts beside this package, on the same files, and compare.

    python scripts/check_programs.py --diff-sampler PATH [--edm2 PATH] [--erk-guid PATH] \\
        [--comfyui PATH]

Each PATH is a checkout of that program (git clone), or an unpacked archive of it. It runs as it is,
in its own process, on the CPU. Only its calls for CUDA devices and process groups are replaced
while it runs. Nothing in it is changed, and nothing is downloaded. The networks are small and
random, made from this checkout's `tests/data`.

diff-sampler: its driver, sample.py, with its own sampler functions and with ours in their place.
EDM2 and ERK-Guid: `generate_images` of their generate_images.py and of ours on the same files, the
command line, and reference statistics written by one and read by the other. ComfyUI: the nodes and
samplers inside the real program and over its server, see `scripts/check_comfyui`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path.append(str(ROOT))  # after a checkout that has modules of the same names


@dataclass(frozen=True)
class Row:
    """One comparison: what was run, and how far apart the two programs are."""

    program: str
    what: str
    found: str
    agrees: bool | None
    """None: the other program did not complete it."""


# --- files that both programs read ------------------------------------------------------------


def tiny_network(name: str) -> Any:
    """Load one of EDM's (2022) networks in the size of tests/data, with random weights."""
    import erk_guid

    return erk_guid.load(DATA / f"edm_{name}.pkl", freeze=False).net


class _Persistent:
    """A module that is pickled, with its children, as the published programs' objects are."""

    def __init__(self, source: str, module: Any) -> None:
        state = {**module.__dict__, "_init_args": (), "_init_kwargs": {}}
        state["_modules"] = {name: _persistent(source, m) for name, m in module._modules.items()}
        if hasattr(module, "config"):
            state["_init_kwargs"] = dict(module.config)
        self.meta = {
            "type": "class", "version": 6, "module_src": source,
            "class_name": type(module).__name__, "state": state,
        }  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _published_name(), (self.meta,)


def _persistent(source: str, module: Any) -> Any:
    if module is None:
        return None
    if type(module).__module__.startswith("torch."):  # containers
        children = {name: _persistent(source, m) for name, m in module._modules.items()}
        module.__dict__["_modules"] = children
        return module
    return _Persistent(source, module)


def _published_name() -> Any:
    return importlib.import_module("torch_utils.persistence")._reconstruct_persistent_obj


@contextlib.contextmanager
def _stand_in_names() -> Iterator[None]:
    """Provide modules whose names a pickle needs while it is written."""
    import types

    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
        raise RuntimeError("only a name")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module.__dict__["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    names = {"torch_utils": package, "torch_utils.persistence": module}
    with mock.patch.dict(sys.modules, names):
        yield


EDM_SOURCE = """
import torch
from erk_guid.models.networks.edm import Block, Conv2d, EDMPrecond as Base
from erk_guid.models.networks.edm import FourierEmbedding, GroupNorm
from erk_guid.models.networks.edm import Linear, PositionalEmbedding, SongUNet


class EDMPrecond(Base):
    # What the toolbox's 'discrete' schedule asks of a network.
    def sigma(self, t):
        return torch.as_tensor(t)

    def sigma_inv(self, sigma):
        return torch.as_tensor(sigma)
"""


def write_snapshot(path: Path, net: Any, source: str) -> None:
    """Write a snapshot of `net` in the published format; `net` cannot be used afterwards.

    Args:
        source: text of the module that the file carries; it makes this package's classes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _stand_in_names(), open(path, "wb") as file:
        pickle.dump({"ema": _persistent(source, net)}, file, protocol=4)


# --- running a checkout's program -------------------------------------------------------------


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Replace what only makes sense with CUDA: devices and process groups."""
    cpu, device = torch.device("cpu"), torch.device

    class Device:
        """Stand-in for torch.device while a module is imported: CUDA defaults become the CPU."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made = device(*args, **kwargs)
            return cpu if made.type == "cuda" else made

    with (
        mock.patch.object(torch, "device", Device),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.distributed, "init_process_group"),
        mock.patch.object(torch.distributed, "barrier"),
    ):
        yield


def imported(name: str) -> Any:
    """Import a module of the checkout, with its CUDA defaults turned to the CPU."""
    with on_the_cpu():
        return importlib.import_module(name)


@contextlib.contextmanager
def no_process_group() -> Iterator[None]:
    with (
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.distributed, "init_process_group"),
        mock.patch.object(torch.distributed, "barrier"),
    ):
        yield


def run_cases(command: Any, cases: Sequence[Sequence[str]], out: Path) -> list[str | None]:
    """Call a program's command for each case, each in a new folder; return its error or None."""
    errors: list[str | None] = []
    for number, case in enumerate(cases):
        folder = out / f"{number:04d}"
        try:
            with no_process_group(), contextlib.redirect_stdout(io.StringIO()):
                command.main([*case, f"--outdir={folder}"], standalone_mode=False)
            errors.append(None)
        except (Exception, SystemExit):
            errors.append(traceback.format_exc(limit=-1).strip().splitlines()[-1][:200])
            shutil.rmtree(folder, ignore_errors=True)
    return errors


def in_a_process(
    checkout: Path, work: Path, mode: str, cases: Sequence[Sequence[str]], out: Path
) -> list[str | None]:
    """Call `run_cases` in its own process, in the folder `work`, with `checkout` on its path."""
    out.mkdir(parents=True)
    (out / "cases.json").write_text(json.dumps(cases))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(checkout), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "inside", mode, str(out)],
        cwd=work, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise click.ClickException(f"{checkout} ({mode}) could not be run:\n{tail}")
    found: list[str | None] = json.loads((out / "errors.json").read_text())
    return found


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Read all PNGs below a folder, by their path in it."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = np.asarray(image).astype(int)
    return found


def compare(theirs: Path, ours: Path) -> tuple[str, bool]:
    """Return the share of identical pixels and the largest difference, and whether they agree."""
    a, b = pictures(theirs), pictures(ours)
    if a.keys() != b.keys() or not a:
        return f"other files: {sorted(a)[:3]}... and {sorted(b)[:3]}...", False
    apart = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    same, worst = float((apart == 0).mean()), int(apart.max())
    return f"{same:.4%} of pixels identical, off by {worst} at most", same >= 0.999 and worst <= 1


# --- diff-sampler -----------------------------------------------------------------------------


SAMPLE_SOLVERS = ("euler", "heun", "dpm", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc")
"""The driver's names of its solvers."""


def diff_sampler_cases() -> list[list[str]]:
    """Return the driver's options except the network's: each solver, with what concerns it."""
    cases: list[list[str]] = []

    def add(solver: str, **options: Any) -> None:
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        cases.append([f"--solver={solver}", *given])

    schedules = [("polynomial", 7), ("logsnr", 7), ("time_uniform", 2), ("discrete", 1)]
    orders = {"ipndm": 4, "ipndm_v": 4, "deis": 4, "dpmpp": 3, "unipc": 3}
    solvers = SAMPLE_SOLVERS
    for solver, (kind, rho) in product(solvers, schedules):
        for afs, to_zero in product((False, True), repeat=2):
            add(
                solver, num_steps=6, schedule_type=kind, schedule_rho=rho, afs=afs,
                denoise_to_zero=to_zero, max_order=min(3, orders.get(solver, 3)),
            )  # fmt: skip
    for solver, order in orders.items():
        for max_order, steps in product(range(1, order + 1), (2, 3, 4, 5, 8)):
            if solver == "deis":
                for mode in ("tab", "rhoab"):
                    add(solver, num_steps=steps, max_order=max_order, deis_mode=mode)
            elif solver in ("dpmpp", "unipc"):
                for x0, lower in product((True, False), repeat=2):
                    for variant in ("bh1", "bh2") if solver == "unipc" else (None,):
                        add(
                            solver, num_steps=steps, max_order=max_order, predict_x0=x0,
                            lower_order_final=lower, variant=variant,
                        )  # fmt: skip
            else:
                add(solver, num_steps=steps, max_order=max_order)
    for solver in solvers:
        add(solver, t_steps="[80.0,10.0,2.5,0.6,0.05]", max_order=2)
        add(solver, num_steps=12, max_order=3)
    # Beyond what the toolbox takes: the report says so, and nothing is compared.
    for solver in ("dpmpp", "unipc", "deis"):
        add(solver, num_steps=5)
        add(solver, num_steps=6, max_order=4)
    return cases


def check_diff_sampler(path: Path, work: Path) -> Iterator[Row]:
    """Compare the toolbox's driver, sample.py, with its own sampler functions and with ours."""
    checkout = path / "diff-solvers-main" if (path / "diff-solvers-main").is_dir() else path
    if not (checkout / "sample.py").is_file():
        raise click.ClickException(f"{path} has no sample.py; name a checkout of diff-sampler")
    # It looks for networks in ./src and beside it; ours get two of its own names.
    here = work / "diff-sampler" / "run"
    for place, network in (
        ("cifar10/edm-cifar10-32x32-uncond-vp.pkl", "ddpmpp"),
        ("imagenet64/edm-imagenet-64x64-cond-adm.pkl", "ncsnpp"),  # with class labels
    ):
        write_snapshot(here / "src" / place, tiny_network(network), EDM_SOURCE)
    cases = [["--dataset_name=cifar10", *case] for case in diff_sampler_cases()]
    cases += [
        [
            "--dataset_name=imagenet64", f"--solver={solver}", "--num_steps=6", "--max_order=3",
            f"--predict_x0={predict_x0}",
        ]
        for solver in SAMPLE_SOLVERS
        for predict_x0 in (True, False)
    ]  # fmt: skip
    full = [[*case, "--seeds=0-3", "--batch=4"] for case in cases]
    outs = {mode: work / "diff-sampler" / mode for mode in ("theirs", "ours")}
    errors = {
        mode: in_a_process(checkout, here, f"diff-sampler-{mode}", full, out)
        for mode, out in outs.items()
    }
    for number, case in enumerate(cases):
        theirs, ours = errors["theirs"][number], errors["ours"][number]
        what = " ".join(option.removeprefix("--") for option in case)
        if theirs is not None:
            also = "ours does" if ours is None else f"nor does ours: {ours}"
            yield Row("diff-sampler", what, f"does not complete ({theirs}); {also}", None)
        elif ours is not None:
            yield Row("diff-sampler", what, f"ours does not complete: {ours}", False)
        else:
            name = f"{number:04d}"
            yield Row("diff-sampler", what, *compare(outs["theirs"] / name, outs["ours"] / name))


def inside_diff_sampler(ours: bool) -> Any:
    if ours:
        # The line that the README puts into the checkout's solvers.py.
        solvers = imported("solvers")
        exec("from erk_guid.integrations.diff_sampler import *", solvers.__dict__)
    return imported("sample").main


# --- EDM2 and ERK-Guid ------------------------------------------------------------------------

EDM2_SOURCE = "from erk_guid.models.networks.edm2 import Block, MPConv, MPFourier, Precond, UNet"

EDM2_CASES: list[dict[str, Any]] = [
    {"num_steps": 6},
    {"num_steps": 2},
    {"num_steps": 18, "sigma_min": 0.01, "sigma_max": 40, "rho": 5},
    {"num_steps": 6, "guidance": 1.7},
    {"num_steps": 6, "class_idx": 2},
    {"num_steps": 8, "S_churn": 20},
    {"num_steps": 8, "S_churn": 40, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
]
ERK_CASES: list[dict[str, Any]] = [
    {"num_steps": 6},
    {"num_steps": 6, "guidance": 1.7},
    {"num_steps": 8, "w_stiff": 0.5, "w_con": 0.1},
    {"num_steps": 8, "w_stiff": 0.5},
    {"num_steps": 8, "w_stiff": -0.5, "w_con": 0.5},
    {"num_steps": 8, "guidance": 1.7, "w_stiff": 1.0, "w_con": 0.5},
]
EDM2_COMMAND = ["--seeds=3,5-7", "--steps=5", "--batch=2"]


def check_edm2(path: Path, work: Path) -> Iterator[Row]:
    yield from _check_edm2("edm2", EDM2_CASES, path, work)


def check_erk_guid(path: Path, work: Path) -> Iterator[Row]:
    yield from _check_edm2("erk-guid", ERK_CASES, path, work)


def _check_edm2(program: str, cases: list[dict[str, Any]], path: Path, work: Path) -> Iterator[Row]:
    import erk_guid
    from erk_guid.metrics import read_reference, write_reference

    if not (path / "generate_images.py").is_file():
        raise click.ClickException(
            f"{path} has no generate_images.py; name a checkout of {program}"
        )
    here = work / program
    for name in ("cond", "guide"):
        net = erk_guid.load(DATA / f"edm2_{name}.pkl", freeze=False).net
        write_snapshot(here / f"{name}.pkl", net, EDM2_SOURCE)
    outs = {}
    for mode, checkout in (("theirs", path), ("ours", ROOT)):
        outs[mode] = here / mode
        in_a_process(checkout, here, "edm2", [[json.dumps(case)] for case in cases], outs[mode])
    for number, case in enumerate(cases):
        what = "generate_images(" + ", ".join(f"{k}={v}" for k, v in case.items()) + ")"
        yield _compare_latents(program, what, *(outs[mode] / f"{number:04d}" for mode in outs))
    yield Row(program, "the command line", *compare(*(outs[mode] / "command" for mode in outs)))
    statistics = read_reference(DATA / "edm2_ref.pkl").statistics
    write_reference(here / "ref.pkl", statistics)
    for mode, checkout in (("theirs", path), ("ours", ROOT)):
        in_a_process(checkout, here, "edm2-stats", [], here / f"stats-{mode}")
    theirs, ours = (here / f"stats-{mode}" for mode in ("theirs", "ours"))
    for what in ("read.npz", "written.npz"):
        with np.load(theirs / what) as a, np.load(ours / what) as b:
            same = a.files == b.files and all(np.array_equal(a[n], b[n]) for n in a.files)
        yield Row(program, f"statistics, {what.removesuffix('.npz')}", f"equal: {same}", same)


def _compare_latents(program: str, what: str, theirs: Path, ours: Path) -> Row:
    files = [folder / "latents.npz" for folder in (theirs, ours)]
    if not files[0].exists():
        return Row(program, what, f"does not complete ({(theirs / 'error').read_text()})", None)
    if not files[1].exists():
        return Row(program, what, f"ours does not complete: {(ours / 'error').read_text()}", False)
    with np.load(files[0]) as a, np.load(files[1]) as b:
        apart = float(np.abs(a["latents"] - b["latents"]).max() / np.abs(a["latents"]).max())
        inputs = all(np.array_equal(a[name], b[name]) for name in ("noise", "labels"))
        pixels = np.abs(a["images"].astype(int) - b["images"].astype(int))
    found = (
        f"noise and labels {'equal' if inputs else 'DIFFERENT'}, latents {apart:.1e} apart, "
        f"{float((pixels == 0).mean()):.4%} of pixels identical, off by {pixels.max()} at most"
    )
    agrees = inputs and (pixels == 0).mean() >= 0.999 and pixels.max() <= 1
    return Row(program, what, found, bool(agrees))


def inside_edm2(cases: Sequence[Sequence[str]], out: Path) -> None:
    """Run the cases with EDM2's generate_images.py, or ours, as the module of that name."""
    program = imported("generate_images")
    for number, (text,) in enumerate(cases):
        folder = out / f"{number:04d}"
        folder.mkdir()
        options = json.loads(text)
        gnet = {"gnet": "guide.pkl"} if options.get("guidance", 1) != 1 else {}
        try:
            with no_process_group():
                batches = [
                    (r.images.numpy(), r.latents.numpy(), r.noise.numpy(), r.labels.numpy())
                    for r in program.generate_images(
                        net="cond.pkl", **gnet, seeds=[3, 5, 6, 7], max_batch_size=2,
                        verbose=False, device=torch.device("cpu"), **options,
                    )
                ]  # fmt: skip
        except Exception as error:
            (folder / "error").write_text(f"{type(error).__name__}: {error}"[:200])
            continue
        names = ("images", "latents", "noise", "labels")
        arrays: dict[str, Any] = {
            name: np.concatenate([batch[k] for batch in batches]) for k, name in enumerate(names)
        }
        np.savez(folder / "latents.npz", **arrays)
    argv = ["generate_images.py", "--net=cond.pkl", f"--outdir={out / 'command'}", *EDM2_COMMAND]
    with mock.patch.object(sys, "argv", argv), on_the_cpu(), contextlib.suppress(SystemExit):
        runpy.run_path(str(program.__file__), run_name="__main__")


def inside_edm2_statistics(out: Path) -> None:
    """Read statistics that ours wrote; write them with this program, and read them with ours."""
    program = imported("calculate_metrics")
    with no_process_group():
        found = program.load_stats("ref.pkl", verbose=False)
        np.savez(out / "read.npz", **_flat(found))
        program.save_stats(found, str(out / "written.pkl"), verbose=False)
    from erk_guid.metrics import read_reference
    from erk_guid.metrics.statistics.references import edm2_layout

    np.savez(
        out / "written.npz", **_flat(edm2_layout(read_reference(out / "written.pkl").statistics))
    )


def _flat(stats: Any) -> dict[str, Any]:
    flat = {"num_images": np.asarray(stats["num_images"])}
    for metric in ("fid", "fd_dinov2"):
        flat |= {f"{metric}/{name}": np.asarray(stats[metric][name]) for name in ("mu", "sigma")}
    return flat


# --- ComfyUI ----------------------------------------------------------------------------------


def check_comfyui(path: Path, work: Path) -> Iterator[Row]:
    """Run `scripts.check_comfyui`, in ComfyUI's process and over its server."""
    from scripts.check_comfyui import server

    if not (path / "comfy" / "k_diffusion" / "sampling.py").is_file():
        raise click.ClickException(f"{path} has no comfy/k_diffusion; name a checkout of ComfyUI")
    out = work / "comfyui"
    in_a_process(path, path, "comfyui", [], out)
    for what, found, agrees in json.loads((out / "found.json").read_text()):
        yield Row("comfyui", what, found, agrees)
    for what, found, agrees in server.everything(path, work / "server"):
        yield Row("comfyui", what, found, agrees)


def inside_comfyui(out: Path) -> None:
    from scripts.check_comfyui import inside

    (out / "found.json").write_text(json.dumps(list(inside.everything(out))))


def golden_cases() -> list[dict[str, Any]]:
    """Return calls of the toolbox's functions whose end points the tests keep."""
    cases: list[dict[str, Any]] = []
    for solver, x0, steps in product(("dpmpp", "unipc"), (True, False), (2, 3, 4, 7)):
        cases += [
            {"solver": solver, "num_steps": steps, "max_order": order, "predict_x0": x0}
            for order in range(1, 4)
        ]
        more = {"num_steps": steps, "max_order": 3, "predict_x0": x0, "lower_order_final": False}
        cases.append({"solver": solver, **more})
    names = ("euler", "heun", "dpm", "ipndm", "ipndm_v", "dpmpp", "unipc")
    cases += [{"solver": name, "num_steps": 6} for name in names]  # their own defaults
    cases += [{"solver": name, "num_steps": 6, "afs": True} for name in names]
    cases += [{"solver": name, "num_steps": 6, "denoise_to_zero": True} for name in names]
    return cases


FUNCTIONS = {
    "euler": "euler_sampler", "heun": "heun_sampler", "dpm": "dpm_2_sampler",
    "deis": "deis_sampler", "ipndm": "ipndm_sampler", "ipndm_v": "ipndm_v_sampler",
    "dpmpp": "dpm_pp_sampler", "unipc": "unipc_sampler",
}  # fmt: skip


def inside_golden(out: Path) -> None:
    """Write end points of the toolbox's own functions, in float32, on the mixture of tests/data.

    The mixture is three times as large as there, so that dynamic thresholding has an effect.
    """
    solvers = imported("solvers")
    with np.load(DATA / "diff_sampler_solvers.npz") as data:
        mu, std, weight, latents = (
            torch.from_numpy(data[name]) for name in ("mu", "std", "weight", "latents")
        )
    mu, std = 3 * mu.flatten(1), 3 * std

    def net(x: torch.Tensor, t: torch.Tensor, class_labels: None = None) -> torch.Tensor:
        wide, sigma = x.double().flatten(1), t.double()
        variance = std**2 + sigma**2
        apart = wide[:, None] - mu
        score = weight.log() - mu.shape[1] / 2 * variance.log()
        p = (score - 0.5 * apart.square().sum(2) / variance).softmax(1)
        means = mu + (std**2 / variance)[:, None] * apart
        return torch.einsum("nk,nkd->nd", p, means).reshape(x.shape).to(x.dtype)

    arrays: dict[str, Any] = {}
    for number, case in enumerate(golden_cases()):
        options = {k: v for k, v in case.items() if k != "solver"}
        with torch.no_grad():
            end = getattr(solvers, FUNCTIONS[case["solver"]])(net, latents.float(), **options)
        arrays[f"case{number}"] = end.numpy()
    np.savez_compressed(out / "golden.npz", cases=np.array(repr(golden_cases())), **arrays)


# --- the command ------------------------------------------------------------------------------

Check = Callable[[Path, Path], Iterator[Row]]
CHECKS: dict[str, Check] = {
    "diff_sampler": check_diff_sampler,
    "edm2": check_edm2,
    "erk_guid": check_erk_guid,
    "comfyui": check_comfyui,
}


def checkout_option(name: str, what: str) -> Callable[[Any], Any]:
    kind = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.option(f"--{name}", type=kind, help=f"Checkout of {what}.")


@click.group(invoke_without_command=True)
@checkout_option("diff-sampler", "zju-pi/diff-sampler")
@checkout_option("edm2", "NVlabs/edm2")
@checkout_option("erk-guid", "mlvlab/ERK-Guid")
@checkout_option("comfyui", "Comfy-Org/ComfyUI (its requirements must be installed)")
@click.option("--all", "show_all", is_flag=True, help="Print every row, not only what differs.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write all rows to a file."
)
@click.pass_context
def main(
    context: click.Context, /, show_all: bool, json_path: Path | None, **checkouts: Path | None
) -> None:
    """Compare this package with other programs' own checkouts; exit code 1 if they differ."""
    if context.invoked_subcommand:
        return
    chosen = {name: path for name, path in checkouts.items() if path is not None}
    if not chosen:
        raise click.UsageError("name at least one checkout, e.g. --diff-sampler=PATH")
    if json_path is not None and not json_path.parent.is_dir():
        raise click.UsageError(f"--json {json_path}: there is no folder {json_path.parent}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in chosen.items():
            click.echo(f"Running {path} ...", err=True)
            for row in CHECKS[name](path.resolve(), Path(folder)):
                rows.append(row)
                if show_all or row.agrees is False:
                    click.echo(_line(row))
    if json_path is not None:
        json_path.write_text(json.dumps([row.__dict__ for row in rows], indent=1) + "\n")
    for program in dict.fromkeys(row.program for row in rows):
        mine = [row.agrees for row in rows if row.program == program]
        click.echo(
            f"{program}: {mine.count(True)} of {len(mine) - mine.count(None)} agree; "
            f"{mine.count(None)} that it does not complete itself"
        )
    if any(row.agrees is False for row in rows):
        sys.exit(1)


def _line(row: Row) -> str:
    mark = {True: "agrees ", False: "DIFFERS", None: "-      "}[row.agrees]
    return f"{mark}  {row.program}  {row.what}: {row.found}"


@main.command("golden-diff-sampler", hidden=True)
@click.argument("checkout", type=click.Path(exists=True, path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
def golden_diff_sampler(checkout: Path, dest: Path) -> None:
    """Write tests/data/diff_sampler_more.npz from the checkout's own functions."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        in_a_process(checkout.resolve() / "diff-solvers-main", Path(folder), "golden", [], out)
        shutil.copyfile(out / "golden.npz", dest)


@main.command("inside", hidden=True)
@click.argument("mode")
@click.argument("out", type=click.Path(path_type=Path))
def inside(mode: str, out: Path) -> None:
    """Run one mode in a checkout's process."""
    torch.set_num_threads(1)
    cases = json.loads((out / "cases.json").read_text())
    others: dict[str, Callable[[], None]] = {
        "golden": lambda: inside_golden(out),
        "edm2": lambda: inside_edm2(cases, out),
        "comfyui": lambda: inside_comfyui(out),
        "edm2-stats": lambda: inside_edm2_statistics(out),
    }
    if mode in others:
        others[mode]()
        (out / "errors.json").write_text("[]")
        return
    commands: dict[str, Callable[[], Any]] = {
        "diff-sampler-theirs": lambda: inside_diff_sampler(False),
        "diff-sampler-ours": lambda: inside_diff_sampler(True),
    }
    errors = run_cases(commands[mode](), cases, out)
    (out / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
