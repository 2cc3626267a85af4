"""The readers, each with valid inputs to begin with and a way to change them.

An input is the content of a file. What a reader fails on can so be given to the command itself.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from erk_guid import load
from erk_guid.cli.options import sampler_options
from erk_guid.cli.sampler import config_fields
from erk_guid.common.datasets import load_image_set, open_images
from erk_guid.common.errors import ErkGuidError
from erk_guid.common.npz import npz_names, read_npz
from erk_guid.generation import folders
from erk_guid.generation.seeds import seeds_in
from erk_guid.generation.settings import Settings, read_settings
from erk_guid.generation.trace import (
    COLUMNS,
    KEYS,
    PART,
    ROW,
    read_parts,
    read_trace,
    united,
    with_checks,
)
from erk_guid.guidance import ERKGuidance
from erk_guid.metrics.statistics.moments import Statistics
from erk_guid.metrics.statistics.references import read_reference, write_reference
from erk_guid.models.checkpoints.native import save_network
from erk_guid.models.checkpoints.safe_pickle import read_pickle
from erk_guid.models.networks.edm import EDMPrecond
from erk_guid.models.networks.edm2 import Precond
from erk_guid.studies.fitting.journal import Journal
from erk_guid.studies.reproduce import Reproduction, choose_rows, plan, write_report
from erk_guid.studies.reproduce.runner import RESULTS
from scripts.fuzz import archives, pickles
from scripts.fuzz.mutations import Mutator, mutate_json, mutate_lines, mutator_of_text, scramble

TINY: dict[str, Any] = {
    "img_resolution": 2, "img_channels": 1, "label_dim": 2, "model_channels": 4,
    "channel_mult": [1], "num_blocks": 1, "channels_per_head": 4, "attn_resolutions": [2],
    "logvar_channels": 4, "channel_mult_noise": 1, "channel_mult_emb": 1,
}  # fmt: skip
TINY_EDM: dict[str, Any] = {
    "img_resolution": 4, "img_channels": 1, "label_dim": 2, "model_channels": 4,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channel_mult_emb": 1,
}  # fmt: skip
"""The smallest networks that have every kind of layer."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: what the command line calls it.
        file: name of the file that an input becomes in the temporary folder.
        seeds: makes valid inputs; the argument is an empty folder for files on the way.
        mutate: changes an input.
        read: reads the file.
        allowed: what the reader may raise, besides `ErkGuidError`.
        minutes: how long it is fuzzed by default.
        runs: inputs in a short run, about three seconds.
        longest: bytes of the longest input.
        allowance: MiB of memory that it may take, whatever the input's size.
    """

    name: str
    file: str
    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Mutator
    read: Callable[[Path], object]
    allowed: tuple[type[Exception], ...] = ()
    minutes: float = 5
    runs: int = 1500
    longest: int = 1 << 14
    allowance: int = 64

    @property
    def may_raise(self) -> tuple[type[Exception], ...]:
        return (ErkGuidError, *self.allowed)


# --- networks and references -----------------------------------------------------------------


@functools.cache
def _tiny() -> Precond:
    torch.manual_seed(0)
    return Precond(**TINY).eval().requires_grad_(False)


def _snapshots(folder: Path) -> list[bytes]:
    torch.manual_seed(0)
    edm = EDMPrecond(**TINY_EDM).eval().requires_grad_(False)
    return [pickles.network_pickle(_tiny(), TINY), pickles.network_pickle(edm, TINY_EDM)]


def _plain_pickles(folder: Path) -> list[bytes]:
    array = np.ones((2, 2), np.float32)
    return [pickles.network_pickle(torch.nn.Linear(2, 1), {"bias": True, "array": array})]


def _native(folder: Path) -> list[bytes]:
    save_network(folder / "net.safetensors", _tiny())
    return [(folder / "net.safetensors").read_bytes()]


def _models(folder: Path) -> list[bytes]:
    config = {
        "sample_size": 2, "in_channels": 1, "num_class_embeds": 2, "channels_per_head": 4,
        "_class_name": "EDM2",
    }  # fmt: skip
    state = {name: value.contiguous() for name, value in _tiny().state_dict().items()}
    return [json.dumps(config).encode() + archives.SEPARATOR + save(state)]


def _read_model(path: Path) -> None:
    config, _, weights = path.read_bytes().partition(archives.SEPARATOR)
    (path.parent / "config.json").write_bytes(config)
    (path.parent / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    load(path.parent)


def _references(suffix: str) -> Callable[[Path], list[bytes]]:
    def make(folder: Path) -> list[bytes]:
        one = Statistics(np.array([0.5, 2.0]), np.eye(2), 10)
        path = folder / f"reference{suffix}"
        features = {"fid": np.ones((3, 2), np.float32)} if suffix == ".npz" else None
        write_reference(path, {"fid": one, "fd_dinov2": one}, features, {"by": "fuzz"})
        content = path.read_bytes()
        return [archives.undated(content) if suffix == ".npz" else content]

    return make


def _read_reference(path: Path) -> None:
    found = read_reference(path)
    for metric in found.statistics:
        found.of(metric)
    json.dumps(found.record())


# --- arrays and pictures ---------------------------------------------------------------------


def _arrays(folder: Path) -> list[bytes]:
    return [archives.npz(f=np.ones((2, 3)), i=np.arange(4), U=np.array("text"))]


def _read_arrays(path: Path) -> None:
    npz_names(path)
    read_npz(path, {"f": "f", "i": "iu", "U": "U"}.get)


def _picture(mode: str, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).convert(mode).save(data, kind)
    return data.getvalue()


def _pictures(folder: Path) -> list[bytes]:
    kinds = [("RGB", "PNG"), ("L", "PNG"), ("RGB", "BMP"), ("RGB", "JPEG"), ("RGB", "WEBP")]
    return [_picture(mode, kind) for mode, kind in kinds]


def _read_picture(path: Path) -> None:
    source = open_images(path.parent)
    source.read(0)
    source.read(0, (8, 8))
    list(source.batches([[0]]))


def _image_arrays(folder: Path) -> list[bytes]:
    images = np.zeros((2, 1, 4, 4), np.uint8)
    labels = np.arange(2)
    return [archives.npz(images=shaped, labels=labels) for shaped in (images, images[:, 0])]


def _image_zips(folder: Path) -> list[bytes]:
    pictures = [("a/0.png", _picture("L")), ("b/1.png", _picture("RGB"))]
    labels = json.dumps({"labels": [["a/0.png", 0], ["b/1.png", 1]]}).encode()
    return [archives.zip_of(pictures), archives.zip_of([*pictures, ("dataset.json", labels)])]


def _read_images(path: Path) -> None:
    source = open_images(path)
    for index in range(min(len(source), 4)):
        source.read(index)
    load_image_set(path)


# --- records of runs -------------------------------------------------------------------------


NOW: dict[str, Any] = {"solver": "heun", "num_steps": 8, "rho": 7.0, "erk": {"w_stiff": 0.5}}
"""Settings of the run that is continued."""


def _runs(folder: Path) -> list[bytes]:
    run = {"settings": NOW, "net": "digits", "gnet": None, "seeds": [0, 1], "versions": {}}
    return [json.dumps(run).encode()]


def _read_run(path: Path) -> None:
    before = folders.read_run(path)
    if before is not None:
        folders.refuse_mixture(path.parent, before["settings"], NOW)


ROWS = np.array(
    [(s, k, 80.0, 5.0, 0.1, 1.0, 1.0, 2.0, 0.1, 0.05) for s in (0, 1) for k in (0, 1)], ROW
)


def _traces(suffix: str) -> Callable[[Path], list[bytes]]:
    def make(folder: Path) -> list[bytes]:
        if suffix == ".npz":
            whole = {name: ROWS[name] for name in COLUMNS}
            # Seeds and steps were real numbers once.
            return [
                archives.npz(**whole),
                archives.npz(**{**whole, **{n: ROWS[n] + 0.0 for n in KEYS}}),
            ]
        lines = [",".join(COLUMNS), *(",".join(f"{v:g}" for v in row) for row in ROWS.tolist())]
        return ["\n".join(lines).encode(), "\r\n".join(lines).encode()]

    return make


def _read_parts(path: Path) -> None:
    data = path.read_bytes()
    united(read_parts(path.parent, "fuzz"))
    # Rows whose checksum is wrong are left out: the others are to be read, too.
    size = ROW.itemsize
    rows = np.frombuffer(data[: len(data) // size * size], ROW)
    path.write_bytes(with_checks(rows, "fuzz").tobytes() + data[len(rows) * size :])
    united(read_parts(path.parent, "fuzz"))


def _settings(folder: Path) -> list[bytes]:
    shipped = Path(folders.__file__).parents[1] / "data" / "fits" / "digits-6.json"
    made_for = {"solver": "heun", "num_steps": 4, "sigma_min": 0.002, "sigma_max": 80, "rho": 7,
                "schedule": "polynomial", "denoise_to_zero": True}  # fmt: skip
    Settings(ERKGuidance(0.5, 0.4), made_for, {"net": "digits"}).write(folder / "settings.json")
    levels = {"solver": "deis", "order": 2, "schedule": [80.0, 5.0, 0.1], "num_steps": 3}
    Settings(ERKGuidance(), levels).write(folder / "levels.json")
    mine = [(folder / name).read_bytes() for name in ("settings.json", "levels.json")]
    return [*mine, shipped.read_bytes()]


def _read_settings(path: Path) -> None:
    found = read_settings(path)
    solver = found.solver()
    schedule = found.made_for.get("schedule")
    if isinstance(schedule, tuple):
        _planned(["--settings", str(path)])
    found.write(path.parent / "again.json")
    assert read_settings(path.parent / "again.json").solver() == solver


def _journals(folder: Path) -> list[bytes]:
    journal = Journal.open(folder / "journal", ("a search",))
    for key in (("loss", 1), ("loss", 2)):
        journal.numbers(key, lambda: [1.0, 2.5])
    return [(folder / "journal" / "trials.jsonl").read_bytes()]


def _read_journal(path: Path) -> None:
    # Its first line says which search it is of; without the right one nothing else is read.
    (head,) = _head_of_journal(path.parent / "other")
    rest = path.read_bytes().partition(b"\n")[2]
    path.write_bytes(head + b"\n" + rest)
    for _ in range(2):  # the second time, what the first one wrote
        journal = Journal.open(path.parent, ("a search",))
        journal.numbers(("loss", 1), lambda: [1.0])


def _head_of_journal(folder: Path) -> list[bytes]:
    Journal.open(folder, ("a search",))
    return (folder / "trials.jsonl").read_bytes().splitlines()


def _journal_arrays(folder: Path) -> list[bytes]:
    journal = Journal(folder)
    journal.tensor("values", torch.zeros(2, 3), lambda: torch.ones(2, 3))
    return [archives.undated((folder / "values.npz").read_bytes())]


def _read_journal_array(path: Path) -> None:
    Journal(path.parent).tensor(path.stem, torch.zeros(2, 3), lambda: torch.ones(2, 3))


def _job(folder: Path) -> Reproduction:
    rows = choose_rows([], ["2-8-plain", "2-8-w0.5"])
    return Reproduction(rows=rows, outdir=folder, model="digits", num=24, device="cpu", gpus=1)


def _results(folder: Path) -> list[bytes]:
    job, lines = _job(folder), []
    for row, score in zip(job.rows, (3.0, 2.5), strict=True):
        result = {
            "key": plan(job, row).key, "scores": {"fd_digits": score},
            "standard_errors": {"fd_digits": 0.1}, "num": 24, "commands": ["generate"],
            "device": "cpu", "processes": 1,
            "detectors": [{"name": "fd_digits", "preprocessing": "none"}],
            "versions": {"torch": "2"}, "reference": {"source": "digits", "sha256": "0" * 64},
            "quality": {"asked": {"real": "digits", "detector": "fd_digits"},
                        "scores": {"precision": 0.5, "recall": 0.5, "inception_score_mean": 2.0,
                                   "inception_score_std": 0.1}},
        }  # fmt: skip
        lines.append(json.dumps(result))
    return ["\n".join(lines).encode()]


def _read_results(path: Path) -> None:
    write_report(_job(path.parent))


# --- options ---------------------------------------------------------------------------------


def _planned(args: Sequence[str]) -> None:
    """Parse options as the command that makes images does, and plan its steps."""

    @click.command()
    @sampler_options
    def command(**options: Any) -> None:
        config_fields(**options)

    command.main(["--preset", "digits", *args], standalone_mode=False)


def _read_schedule(path: Path) -> None:
    _planned(["--schedule", str(path)])


def _read_schedule_text(path: Path) -> None:
    text = path.read_bytes().decode(errors="surrogateescape")
    steps = ["--steps", "8"] if text == "fitted" else []  # a count beside a list is refused
    _planned([*steps, "--schedule", text])


_mutate_levels = mutator_of_text(
    (",", "\n", " "), ("80", "5", "0.1", "0", "1e-3", "1e3", "polynomial", "fitted", "-1")
)


def _read_seeds(path: Path) -> None:
    seeds_in(path.read_bytes().decode(errors="surrogateescape"))


TARGETS = (
    Target("pickle", "any.pkl", _plain_pickles, pickles.mutate_pickle, read_pickle, minutes=20,
           runs=1000, longest=1 << 15),
    Target(
        "pickle-snapshot", "net.pkl", _snapshots, pickles.mutate_pickle, load,
        minutes=20, runs=40, longest=1 << 17,
    ),
    Target(
        "pickle-reference", "reference.pkl", _references(".pkl"), pickles.mutate_pickle,
        _read_reference, minutes=20,
    ),
    Target("safetensors", "net.safetensors", _native, archives.mutate_safetensors, load, runs=150,
           longest=1 << 16),
    Target("diffusers", "model", _models, archives.mutate_model, _read_model, runs=300,
           longest=1 << 16),
    Target("npz", "arrays.npz", _arrays, archives.mutate_npz, _read_arrays, allowance=160),
    Target("reference-npz", "reference.npz", _references(".npz"), archives.mutate_npz,
           _read_reference, allowance=160),
    Target("images-npz", "images.npz", _image_arrays, archives.mutate_npz, _read_images,
           allowance=160),
    Target("images-zip", "images.zip", _image_zips, archives.mutator_of_zip(archives.mutate_member),
           _read_images, runs=800, allowance=400),
    Target("image", "picture.png", _pictures, archives.mutate_image, _read_picture, allowance=400),
    Target("run", "run.json", _runs, mutate_json, _read_run),
    Target("settings", "settings.json", _settings, mutate_json, _read_settings,
           (click.UsageError,), runs=1000),
    Target("journal", "trials.jsonl", _journals, mutate_lines, _read_journal),
    Target("journal-npz", "values.npz", _journal_arrays, archives.mutate_npz, _read_journal_array,
           allowance=160),
    Target("trace-csv", "trace.csv", _traces(".csv"),
           mutator_of_text((",", "\n"), (*COLUMNS, "0", "1", '"', "\r")), read_trace),
    Target("trace-npz", "trace.npz", _traces(".npz"), archives.mutate_npz, read_trace,
           runs=800, allowance=160),
    Target("trace-part", PART.format(rank=0),
           lambda _: [ROWS.tobytes(), with_checks(ROWS, "fuzz").tobytes()], scramble, _read_parts,
           allowance=160),
    Target("schedule", "levels.txt", lambda _: [b"80, 5\n0.1 0", b"80\n1\n0.002"], _mutate_levels,
           _read_schedule, (click.UsageError,), runs=800),
    Target("schedule-text", "text", lambda _: [b"80,5,0.1", b"fitted", b"polynomial"],
           _mutate_levels, _read_schedule_text, (click.UsageError,), runs=800, longest=4096),
    Target("seeds", "seeds.txt", lambda _: [b"1,2,5-10", b"0-63"],
           mutator_of_text((",", "-"), ("0", "9999999", "18", "5-10", " ")), _read_seeds,
           (ValueError,), longest=4096, allowance=500),
    Target("results", RESULTS, _results, mutate_lines, _read_results, runs=60, longest=1 << 15,
           allowance=160),
)  # fmt: skip
"""In the order in which they are fuzzed."""
