"""One job a folder, by real processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import erk_guid.generation.locks as locks
from erk_guid.common.errors import ErkGuidError
from erk_guid.generation import images
from erk_guid.generation.jobs import GenerationJob, run_job
from erk_guid.generation.locks import LOCK_FILE, locked

HOLDER = """
import sys, time
from pathlib import Path
from erk_guid.generation.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_a_killed_one_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(ErkGuidError, match=rf"at work in .*process {process.pid} on"):
            run_job(GenerationJob(net="digits", outdir=tmp_path, seeds=[0], num_steps=1))
        process.send_signal(signal.SIGSTOP)  # asleep is not gone
        with pytest.raises(ErkGuidError, match="at work"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path) as lock:
        lock.check()
    assert "took over" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_holder_elsewhere_is_gone_when_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCHED", 0.5)
    path = tmp_path / LOCK_FILE
    about = {"host": "far", "machine": "far", "pid": 1, "token": "t", "beat": 0, "began": "then"}
    path.write_text(json.dumps(about))
    beats = iter(range(1, 100))
    real = locks._read

    def living(path: Path) -> Any:
        found = real(path)
        return {**found, "beat": next(beats)} if found else found

    with monkeypatch.context() as patch:
        patch.setattr(locks, "_read", living)
        with pytest.raises(ErkGuidError, match="process 1 on far, since then"), locked(tmp_path):
            pass
    with locked(tmp_path) as lock:
        lock.check()
        # A holder that was taken over notices.
        path.write_text(json.dumps(about))
        with pytest.raises(ErkGuidError, match="taken over by another job"):
            lock.check()


def test_a_damaged_lock_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WATCHED", 0.3)
    (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
    with locked(tmp_path) as lock:
        lock.check()


def test_a_folder_that_vanishes_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before: exit 0, "4 images made", and the folder held the last ones only.
    outdir = tmp_path / "o"
    calls = []

    sample = images._Generation.sample

    def moving(*args: Any) -> images.Sampled:
        calls.append(1)
        if len(calls) == 3:
            outdir.rename(tmp_path / "moved")
        return sample(*args)

    monkeypatch.setattr(images._Generation, "sample", moving)
    job = GenerationJob(net="digits", outdir=outdir, seeds=range(4), batch=1, num_steps=1)
    with pytest.raises(ErkGuidError, match="4 of 4 images are missing"):
        run_job(job)
    assert not outdir.exists()
    shutil.rmtree(tmp_path / "moved")
