"""The fuzzer finds what it is for, and the readers stand a short run of it."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

ENGINES = ["plain", pytest.param("atheris", marks=pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris is not installed"))]  # fmt: skip

PLANTED = """
import os, pickle, sys
from pathlib import Path
from scripts.fuzz.targets import Target

def divide(path): 1 / (path.read_bytes() == b"sound")
def write(path): path.read_bytes() == b"sound" or open(path.parents[2] / "outside", "w")
def swallow(path):
    try:
        write(path)
    except Exception:
        pass
def take(path): path.read_bytes() == b"sound" or len(b"x" * (200 << 20))
def claim(path):
    if path.read_bytes() != b"sound":
        try:
            bytearray(1 << 40)
        except MemoryError as error:
            raise ValueError("too large") from error
def unpickle(path):
    path.read_bytes() == b"sound" or pickle.loads(b"cerk_guid_canary\\nsing\\n)R.")
def shell(path): path.read_bytes() == b"sound" or os.system("true")
def stop(path): path.read_bytes() == b"sound" or os._exit(3)
def refuse(path):
    if path.read_bytes() != b"sound": raise ValueError("as documented")

TARGETS = [
    Target(f.__name__, "input", lambda _: [b"sound"], lambda data, rng: None, f, (ValueError,))
    for f in (divide, write, swallow, take, claim, unpickle, shell, stop, refuse)
]
"""


def fuzz(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.fuzz", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )


@pytest.fixture
def planted(tmp_path: Path) -> list[Any]:
    path = tmp_path / "planted.py"
    path.write_text(PLANTED)
    return ["--also", path, "--output", tmp_path / "out", "--runs", 12]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_planted_bug_is_reported(engine: str, planted: list[Any], tmp_path: Path) -> None:
    # Catches: a fuzzer that finds nothing because it looks at nothing.
    done = fuzz("--target", "divide", "--engine", engine, *planted)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "divide: ZeroDivisionError in planted.py" in done.stdout
    kept = [p for p in (tmp_path / "out" / "divide").glob("finding-*") if p.suffix != ".txt"]
    assert len(kept) == 1  # one fault, one input, however often it was met
    assert kept[0].read_bytes() != b"sound"
    assert "ZeroDivisionError" in kept[0].with_name(kept[0].name + ".txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_each_kind_of_finding_and_no_other(planted: list[Any], tmp_path: Path) -> None:
    # Catches: a kind that passes for a refusal, and a target that ends the others with itself.
    expected = {
        "divide": "ZeroDivisionError in planted.py",
        "write": "forbidden: open",
        "swallow": "forbidden: open",
        "take": "memory: returned",
        "claim": "refused for want of memory in planted.py",
        "unpickle": "forbidden: pickle.find_class",
        "shell": "forbidden: os.system",
        "stop": "the process ended with code 3",
    }
    chosen = [part for name in (*expected, "refuse") for part in ("--target", name)]
    done = fuzz(*chosen, "--engine", "plain", *planted)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines.keys() == expected.keys(), done.stdout
    assert all(lines[name].startswith(what) for name, what in expected.items()), lines
    assert not list(tmp_path.rglob("outside"))


def test_the_readers_stand_the_kept_corpus_and_a_few_inputs(tmp_path: Path) -> None:
    # Catches: what was found before, come back; and a target that cannot be run any more.
    done = fuzz("--engine", "plain", "--runs", 20, "--output", tmp_path, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [line.split() for line in done.stdout.splitlines()[1:]]
    assert all(int(count[2].replace(",", "")) > 20 for count in counts)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_readers_stand_a_short_run(engine: str, tmp_path: Path) -> None:
    done = fuzz("--short", "--engine", engine, "--output", tmp_path, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def parts() -> Any:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    names = ("targets", "pickles", "archives")
    return {name: importlib.import_module(f"scripts.fuzz.{name}") for name in names}


def test_inputs_depend_on_the_seed_alone(parts: Any, tmp_path: Path) -> None:
    # Catches: state that is kept between calls, so that a finding could not be made again.
    for target in parts["targets"].TARGETS:
        folder = tmp_path / target.name
        folder.mkdir()
        seed = target.seeds(folder)[0]
        first, again = ([target.mutate(seed, Random(k)) for k in range(8)] for _ in range(2))
        assert first == again
        assert any(made not in (None, seed) for made in first)


def test_pickles_are_put_together_as_they_were(parts: Any) -> None:
    # Catches: a disassembler that damages all it touches; then only refusals would be tried.
    pickles = parts["pickles"]
    content = {"a": [1, 2.5, b"x" * 300, "text", None], "b": (True, {3: -(2**70)})}
    for protocol in range(2, 6):
        data = pickle.dumps(content, protocol)
        ops, end = pickles.ops_of(data)
        assert end == len(data)
        assert pickle.loads(b"".join(op.raw for op in ops)) == content


def test_changed_pickles_stay_pickles(parts: Any, tmp_path: Path) -> None:
    # Most inputs must pass the parser, or the machine behind it is never tried.
    pickles = parts["pickles"]
    data = next(t for t in parts["targets"].TARGETS if t.name == "pickle").seeds(tmp_path)[0]
    parsed = 0
    for seed in range(100):
        try:
            pickles.ops_of(pickles.mutate_pickle(data, Random(seed)))
        except ValueError:
            continue
        parsed += 1
    assert parsed > 60


def test_changed_zips_stay_zips(parts: Any, tmp_path: Path) -> None:
    archives = parts["archives"]
    data = archives.zip_of([("a.png", b"1"), ("b.png", b"2")])
    whole = 0
    for seed in range(50):
        made = tmp_path / "made.zip"
        made.write_bytes(archives.mutator_of_zip(lambda d, r: d + b"x")(data, Random(seed)))
        whole += zipfile.is_zipfile(made)
    assert whole > 30
