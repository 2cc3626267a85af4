"""Ranks that are stopped, hang, or lose their launcher: real processes with short time limits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from erk_guid.generation.identity import process_began

pytestmark = pytest.mark.slow

GENERATE = """
import functools, os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[2]
import erk_guid.generation.images as images
import erk_guid.generation.jobs as jobs
jobs.workers = functools.partial(jobs.workers, patience=4)
sample, made = images._Generation.sample, 0
def faulty(self, indices):
    global made
    if rank and made == 2 and what == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank and made == 2 and what == "hangs":
        time.sleep(1e6)
    if what == "launcher" and made == 2:
        time.sleep(1e6)
    made += 1
    time.sleep(0.2)
    return sample(self, indices)
images._Generation.sample = faulty
job = jobs.GenerationJob(
    net="digits", outdir=jobs.Path(sys.argv[1]), seeds=range(40), batch=2, num_steps=2,
    device="cpu", rank_timeout=6 if what == "hangs" else 600,
)
print("total", jobs.run_job(job))
"""

SCORE = """
import os, signal, sys, time
import torch
from erk_guid.cli.common import reporting_errors
from erk_guid.generation.process_groups import process_group
@reporting_errors
def main():
    with process_group(torch.device("cpu"), patience=4) as group:
        print("joined", flush=True)
        if sys.argv[1] == "agree" and group.rank == 0 or sys.argv[1] == "sum" and group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        print(group.agree(lambda: 3))
        print(group.sum(torch.ones(2)))
main()
"""


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_hand(script: Path, *args: object) -> list[subprocess.Popen[str]]:
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port()}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, args)], env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def by_torchrun(script: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         f"--master_port={port()}", str(script), *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def count(folder: Path) -> int:
    return len(list(folder.glob("0*.png")))


@pytest.mark.parametrize(("what", "line"), [
    ("stops", "rank 1 gave no sign of life for 4 seconds: its batches are made by the others"),
    ("hangs", "rank 1 made no progress for 6 seconds"),
])  # fmt: skip
def test_a_rank_is_done_without(what: str, line: str, tmp_path: Path) -> None:
    # Before: a rank that was stopped or hung was waited for without a word.
    ranks = by_hand(written(tmp_path / "p.py", GENERATE), tmp_path / "o", what)
    out, err = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 0, err
    assert "total 40" in out
    assert count(tmp_path / "o") == 40
    _, other = ranks[1].communicate(timeout=30)
    assert line in (err if what == "stops" else other)
    if what == "stops":
        assert "killed" in err
        assert ranks[1].returncode == -signal.SIGKILL
    else:
        assert ranks[1].returncode == 1
        assert "--rank-timeout" in other


def test_torchrun_ends_though_a_rank_is_stopped(tmp_path: Path) -> None:
    # torchrun waits for the stopped process for good, unless somebody kills it.
    process = by_torchrun(written(tmp_path / "p.py", GENERATE), tmp_path / "o", "stops")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err  # torchrun's word on the killed rank
    assert "total 40" in out
    assert count(tmp_path / "o") == 40


def test_workers_end_with_their_launcher(tmp_path: Path) -> None:
    # Before: they went on, and waited for each other for good.
    process = by_torchrun(written(tmp_path / "p.py", GENERATE), tmp_path / "o", "launcher")
    until = time.monotonic() + 90
    while count(tmp_path / "o") < 4 and time.monotonic() < until:
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) >= 2
    process.kill()
    _, err = process.communicate(timeout=30)  # when they have closed its streams, too
    # Who waits for the store, which torchrun keeps, finds out by that.
    assert "torchrun, which started it, is gone" in err or "or torchrun, has ended" in err
    until = time.monotonic() + 30  # they close their streams a moment before they end
    while any(process_began(int(child)) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    for child in children:
        assert process_began(int(child)) is None


@pytest.mark.parametrize(("what", "dead", "line"), [
    ("agree", 0, "who keeps the store, rank 0 or torchrun, has not answered for 4 seconds"),
    ("sum", 1, "rank 1 gave no sign of life for 4 seconds"),
])  # fmt: skip
def test_scores_end_with_the_name_of_the_dead_rank(
    what: str, dead: int, line: str, tmp_path: Path
) -> None:
    # Before: the others waited for a stopped rank for two days.
    ranks = by_hand(written(tmp_path / "s.py", SCORE), what)
    living = ranks[1 - dead]
    try:
        _, err = living.communicate(timeout=60)
        assert living.returncode == 1
        assert line in err
        assert "Traceback" not in err
    finally:
        ranks[dead].kill()
        ranks[dead].communicate()


def test_a_process_that_sleeps_as_a_whole_does_not_hang() -> None:
    # A job that is paused (Ctrl-Z, a closed laptop) goes on.
    code = """
import sys, time
from erk_guid.generation.peers import watched
with watched(0, 1.5) as progress:
    print("begun", flush=True)
    for _ in range(12):
        time.sleep(0.25)
        progress()
    print("over", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    assert out == "over\n", err
    assert process.returncode == 1
    assert "rank 0 made no progress for 1.5 seconds" in err
