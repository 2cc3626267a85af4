"""Every output of every command, where somebody else's file has its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from erk_guid.cli import main

IMAGES = "--images={made}/images --ref=digits --metrics=fd_digits --num=4 --device=cpu"
SHORT = "--preset=digits --device=cpu"
COMMANDS = {
    "generate": f"generate {SHORT} --seeds=0-2 --steps=3 --w_stiff=0.5 --outdir={{out}}/images "
                "--grid={out}/grid.png --trace={out}/trace.csv",
    "generate, npz": f"generate {SHORT} --seeds=0-2 --steps=3 --w_stiff=0.5 "
                     "--outdir={out}/images --trace={out}/trace.npz",
    "calc": f"metrics calc {IMAGES} --json={{out}}/scores.json --features={{out}}/f.npz",
    "ref": "metrics ref --data={made}/images --metrics=fd_digits --device=cpu "
           "--dest={out}/ref.npz",
    "ref, pkl": "metrics ref --data={made}/images --metrics=fd_digits --device=cpu "
                "--dest={out}/ref.pkl",
    "precision-recall": "precision-recall {made}/images --real={made}/images "
                        "--detector=fd_digits --device=cpu --k=2 --metrics=precision,recall "
                        "--json={out}/pr.json",
    "accuracy": "accuracy --problem=gauss --num=4 --evaluations=4 --methods=heun,modal "
                "--no-outside --as-near-as=3 --outdir={out}",
    "toy": "toy --outdir={out} --steps=3 --paths=4",
    "toy, page": "toy --html={out}/page.html --paths=2",
    "plot-trace": "plot-trace {made}/trace.csv --dest={out}/plot.png",
    "convert": "convert digits {out}/net.safetensors",
    "demo": "demo --device=cpu --outdir={out}",
    "fit": f"fit {SHORT} --seeds=0-15 --evaluations=3 --solver=euler --trials=1 --samples=2 "
           "--outdir={out}",
    "calibrate": f"calibrate {SHORT} --seeds=0-7 --steps=3 --outdir={{out}}",
    "reproduce": "reproduce --model=digits --row=05-plain --num=3 --skip-quality --bootstrap=0 "
                 "--device=cpu --outdir={out}",
}  # fmt: skip
SLOW = ("accuracy", "toy", "toy, page", "demo", "fit", "calibrate", "reproduce")
JOINED = ("result.txt",)
"""Outputs that are appended to."""


def foreign(path: Path) -> None:
    """Write somebody's file of the kind that a name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.new("RGB", (9, 9), "red").save(path)
    elif path.suffix == ".npz":
        np.savez(path, mine=np.arange(3))
    elif path.suffix == ".safetensors":
        save_file({"mine": torch.ones(3)}, path)
    elif path.suffix == ".pkl":
        path.write_bytes(b"\x80\x04}\x94.")  # an empty dictionary
    else:
        texts = {
            ".csv": "name,age\n", ".json": '{"mine": 1}\n', ".jsonl": '{"mine": 1}\n',
            ".svg": '<svg xmlns="http://www.w3.org/2000/svg"></svg>\n', ".md": "# Mine\n",
            ".html": "<!DOCTYPE html>\n<title>mine</title>\n", ".txt": "mine\n",
        }  # fmt: skip
        path.write_text(texts[path.suffix])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    done = CliRunner().invoke(
        main, f"generate {SHORT} --seeds=0-3 --steps=3 --w_stiff=0.5 --outdir={folder}/images "
        f"--trace={folder}/trace.csv".split(),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS]
)
def test_every_output_over_somebodys_file(name: str, made: Path, tmp_path: Path) -> None:
    # Catches: a kind of output that nobody thought of: Markdown, pages, the demo's files and JSON
    # were all found by attack, one after the other.
    def run(out: Path) -> tuple[int, str]:
        done = CliRunner().invoke(main, COMMANDS[name].format(out=out, made=made).split())
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.exit_code, done.output

    code, said = run(tmp_path / "first")
    assert code == 0, said
    outputs = [
        path.relative_to(tmp_path / "first")
        for path in sorted((tmp_path / "first").rglob("*"))
        if path.is_file() and not path.name.startswith(".") and "journal" not in path.parts
    ]
    assert outputs
    for output in outputs:
        out = tmp_path / "again"
        shutil.rmtree(out, ignore_errors=True)
        foreign(out / output)
        before = (out / output).read_bytes()
        code, said = run(out)
        if output.name == "results.jsonl":
            assert (out / "dropped.jsonl").read_bytes() == before
            continue
        if output.name in JOINED:
            assert (out / output).read_bytes().startswith(before), output
            continue
        assert (out / output).read_bytes() == before, (output, said)
        assert code == 1, (output, said)
    code, said = run(tmp_path / "first")  # its own may be written again
    assert code == 0 or (name == "convert" and "is there already" in said), said
