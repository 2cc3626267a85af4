"""The attack on the command line finds what it is for, and the program stands a short one."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by /proc")

PLANTED = """
import atexit
import sys
from pathlib import Path

def leave(folder):
    if folder.exists():
        (folder / "left.txt").touch()

for arg in sys.argv:
    if arg.startswith("--outdir="):
        atexit.register(leave, Path(arg.partition("=")[2]))
"""
"""What makes the package, however it is begun, leave a file behind."""


def soak(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.soak", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )


@LINUX
@pytest.mark.slow
def test_the_program_stands_a_short_attack(tmp_path: Path) -> None:
    done = soak("--short", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert told["kills"] > 0
    assert {"process", "folder"} <= told["scenarios"].keys()
    assert (tmp_path / "out" / "soak.md").exists()


@LINUX
@pytest.mark.slow
def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    # Catches: an attack that finds nothing because it looks at nothing.
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "erk_guid", checkout / "erk_guid")
    shutil.copy(ROOT / "generate_images.py", checkout)
    with open(checkout / "erk_guid" / "__init__.py", "a") as package:
        package.write(PLANTED)
    done = soak("--short", "--output", tmp_path / "out", "--checkout", checkout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left at the end: left.txt" in done.stderr
    assert "--seed=1 --short" in done.stderr


@pytest.fixture(scope="module")
def parts() -> Any:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return {name: importlib.import_module(f"scripts.soak.{name}") for name in PARTS}


PARTS = ("checks", "jobs", "programs", "servers")


def test_exit_codes_and_messages_are_judged(parts: Any) -> None:
    # Catches: a check that lets pass what a user would be misled by.
    checks, programs = parts["checks"], parts["programs"]

    def found(
        code: int | None, err: str, number: int = signal.SIGTERM, ending: bool = False
    ) -> list[str]:
        sent = (programs.Sent(number, 1.0, True, True, ending),)
        return list(checks.after_signal(programs.Ended("one", code, "", err, sent)))

    told = "Error: stopped by SIGTERM: the same command with --resume makes the others"
    assert not found(143, told)
    assert not found(-9, "", signal.SIGKILL)
    assert "exit code -15 after SIGTERM" in found(-15, told)[0]
    assert not found(-15, "", ending=True)  # a rank that left because another one did
    assert "how to go on" in found(143, "Error: stopped")[0]
    assert "exit code 143 after SIGINT" in found(143, told, signal.SIGINT)[0]
    assert found(None, told) == ["no end after SIGTERM"]
    trace = f"{checks.TRACEBACK}:\n  File ...\nValueError: of no use\n{told}"
    assert found(143, trace) == ["traceback: ValueError: of no use"]


def test_a_process_that_python_itself_ends_is_known(parts: Any, tmp_path: Path) -> None:
    # Before: exit code -15 of a process that had ended in silence, while Python still took its
    # modules down, was a finding of the soak's.
    code = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: None)\n"
        "pathlib.Path('handled').touch(); time.sleep(1)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"  # as Python does at its end
        "pathlib.Path('ending').touch(); time.sleep(30)\n"
    )
    programs = parts["programs"]
    running = programs.Process([sys.executable, "-c", code], tmp_path, {}, "one", tmp_path)
    assert running.when((tmp_path / "handled").exists)
    assert running.when((tmp_path / "ending").exists)
    assert running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == -signal.SIGTERM
    assert ended.sent[0].ending
    assert not parts["checks"].after_signal(ended)


def test_a_finished_job_is_compared(parts: Any, tmp_path: Path) -> None:
    # Catches: an image, a row, a seed or a file that nobody looks at.
    checks, jobs = parts["checks"], parts["jobs"]
    settings = jobs.Settings("none", ())

    def made(name: str) -> Any:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        job = jobs.Job(settings, (1, 2**53 + 1), folder / "images", trace=folder / "trace.csv")
        for seed in job.seeds:
            shutil.copyfile(ROOT / "docs" / "images" / "demo.png", job.image(seed))
        run = {"settings": {"steps": 1, "subdirs": False}, "seeds": list(job.seeds)}
        (job.outdir / "run.json").write_text(json.dumps(run))
        rows = "".join(f"{seed},0,0.5\n" for seed in job.seeds)
        job.trace.write_text(f"seed,step,sigma\n{rows}")
        return job, run

    undisturbed, run = made("undisturbed")
    rows = jobs.rows_of(undisturbed.trace)
    reference = jobs.Undisturbed(undisturbed, run, rows)
    assert not checks.finished(made("same")[0], reference).findings

    def findings(name: str, damage: Any) -> str:
        job, _ = made(name)
        damage(job)
        return " ".join(checks.finished(job, reference).findings)

    assert "missing" in findings("missing", lambda job: job.image(1).unlink())
    assert "differ" in findings("differs", lambda job: job.image(1).write_bytes(b"no image"))
    assert "too many" in findings("more", lambda job: (job.outdir / "000003.png").touch())
    assert ".a.partial" in findings("left", lambda job: (job.outdir / ".a.partial").touch())
    assert "run.json" in findings("run", lambda job: (job.outdir / "run.json").write_text("{}"))
    text = undisturbed.trace.read_text()
    for number, (what, new) in enumerate(
        {
            "lacks rows": text.replace("1,0,0.5\n", "", 1),
            "other values": text.replace("0.5", "0.6", 1),
            "rows too many": text.replace(str(2**53 + 1), str(2**53)),
            "invalid literal": text.replace("\n1,", "\n1.0,"),
            "there twice": text + "1,0,0.5\n",
        }.items()
    ):
        assert what in findings(f"trace{number}", lambda job, new=new: job.trace.write_text(new))
