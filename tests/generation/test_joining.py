"""Ranks that come late or never, and ends of jobs: real processes with short time limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.peers import FAILED, OwnStore, Signs
from erk_guid.generation.process_groups import _group_beside
from erk_guid.generation.workers import Queue, Workers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time.monotonic tells."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_rank_that_has_not_come_yet_is_waited_for(clock: list[float]) -> None:
    # Catches: patience, which is for ranks that have shown life, ending ranks whose rank 0 takes
    # longer to start.
    me = Workers(1, 2, store := OwnStore(), Signs(store, 5))
    me.check(0)
    clock[0] = 100
    me.check(0)
    store.add("beat/0", 1)
    me.check(0)
    clock[0] = 106
    with pytest.raises(ErkGuidError, match="rank 0 gave no sign of life for 5 seconds"):
        me.check(0)


def test_a_rank_that_never_comes_is_said(clock: list[float]) -> None:
    me = Workers(1, 2, store := OwnStore(), Signs(store, 5))
    me.check(0)
    clock[0] = 301
    with pytest.raises(ErkGuidError, match="rank 0 has not joined within 301 seconds"):
        me.check(0)


def test_a_rank_does_not_take_itself_for_dead(capsys: pytest.CaptureFixture[str]) -> None:
    # Catches: a rank whose own signs came late telling of itself, and taking its own batches.
    me = Workers(0, 2, store := OwnStore(), Signs(store, 0))
    queue = Queue(me, 1)
    store.set("owner/0", "0")
    taken: list[int] = []

    def waiting() -> None:
        if len(taken) == 3:
            queue.done(0, 1)
        taken.append(0)

    assert list(queue.abandoned(waiting)) == []
    assert "rank 0 gave no sign" not in capsys.readouterr().err


def test_a_second_group_of_a_script_begins_anew() -> None:
    # Catches: keys in the script's own store, where the failure of an earlier group stays.
    store = dist.HashStore()  # type: ignore[attr-defined]
    for _ in range(2):
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        group = _group_beside(dist.group.WORLD)
        group.check()
        group.store.set(FAILED, "0")
        dist.destroy_process_group()


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def started(args: list[str], **variables: object) -> subprocess.Popen[str]:
    shown = {k: str(v) for k, v in variables.items()}
    return subprocess.Popen(
        [sys.executable, *args], env={**os.environ, "OMP_NUM_THREADS": "1", **shown}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def by_hand(script: Path, *args: str) -> list[subprocess.Popen[str]]:
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    return [started([str(script), *args], RANK=rank, **common) for rank in (0, 1)]


def both(program: str, common: list[str], unlike: tuple[str, str]) -> list[tuple[int, str]]:
    """Run a program as two ranks, each with its own option; return exit codes and errors."""
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    ranks = [
        started([program, *common, more], RANK=rank, **shared) for rank, more in enumerate(unlike)
    ]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    return [(process.returncode, err) for process, err in zip(ranks, said, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unlike", "named"),
    [
        (("--steps=3", "--steps=4"), "num_steps is 3 there, 4 here"),
        (("--w_stiff=0.5", "--w_stiff=auto"), 'w_stiff is 0.5 there, "auto" here'),
        (("--seeds=0-7", "--seeds=4-11"), 'seeds is "8 from 0 to 7'),
        (("--batch=2", "--batch=4"), "batch is 2 there, 4 here"),
        (("--net=digits", "--net=erk_guid/data/digits-weak.safetensors"), "net_sha256 is"),
    ],
)
def test_ranks_that_were_given_unlike_options(
    unlike: tuple[str, str], named: str, tmp_path: Path
) -> None:
    # Catches: two nodes whose commands differ. Their images lay in one folder, and all said that
    # they were of the settings of rank 0.
    common = [f"--outdir={tmp_path / 'o'}", "--device=cpu"]
    for option in ("--net=digits", "--steps=3", "--seeds=0-7", "--batch=2"):
        if option.partition("=")[0] not in unlike[0]:
            common.append(option)
    (first, _), (second, err) = both("generate_images.py", common, unlike)
    assert (first, second) == (1, 1)
    assert "rank 1 was not given what rank 0 was given" in err
    assert named in err
    assert err.count("\n") <= 3


@pytest.mark.slow
def test_ranks_that_score_unlike_things(tmp_path: Path) -> None:
    common = ["gen", "--net=digits", "--ref=digits", "--metrics=fd_digits", "--num=8",
              "--device=cpu"]  # fmt: skip
    for rank in range(2):  # two folders with the same names in them
        (tmp_path / str(rank)).mkdir()
        for k in range(4):
            picture = np.random.default_rng(10 * rank + k).integers(0, 256, (32, 32), np.uint8)
            Image.fromarray(picture).save(tmp_path / str(rank) / f"{k}.png")
    scored = ["calc", "--ref=digits", "--metrics=fd_digits", "--num=4", "--device=cpu"]
    unlike = (f"--images={tmp_path / '0'}", f"--images={tmp_path / '1'}")
    (first, _), (second, err) = both("calculate_metrics.py", scored, unlike)
    assert (first, second) == (1, 1)
    assert "rank 1 was not given what rank 0 was given: images is" in err
    (first, _), (second, err) = both("calculate_metrics.py", common, ("--steps=3", "--steps=4"))
    assert (first, second) == (1, 1)
    assert "num_steps is 3 there, 4 here" in err


QUEUE = """
import os, signal, sys, time
import erk_guid.generation.workers as w
from erk_guid.cli.common import reporting_errors
from erk_guid.generation.peers import watched
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "late" and rank == 0:
    time.sleep(7)
@reporting_errors
def main():
    with w.workers(patience=3) as group:
        group.agree(lambda: 7)
        queue, made = group.queue(20), 0
        with watched(rank, 4) as progress:
            for index in queue.fresh():
                made += 1
                if made == 2 and what == f"stop {rank}":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if made == 2 and what == f"hang {rank}":
                    time.sleep(1e6)
                time.sleep(0.2)
                progress()
                queue.done(index, 1)
            for index in queue.abandoned(progress):
                queue.done(index, 1)
    time.sleep(1 if rank == 0 else 0)  # whoever wrote the images has more to do
    print(f"rank {rank}: all {queue.count} done", flush=True)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code", "said", "unsaid"), [
    # Before: rank 1 gave rank 0 up after its patience.
    ("late", 0, "rank 0: all 20 done", "sign of life"),
    # Before: rank 1 ended well, and torchrun waited for rank 0 for good.
    ("stop 0", 1, "rank 1 ends: rank 0 gave no sign of life", "all 20 done"),
    # Before: torchrun saw the kill, and ended rank 0 before its last words.
    ("stop 1", 1, "rank 0: all 20 done", "rank 1: all"),
    # Before: it said that the others make its batches. torchrun ends them.
    ("hang 1", 1, "torchrun ends the others, too; --resume goes on", "all 20 done"),
])  # fmt: skip
def test_torchrun_ends_with_them(
    what: str, code: int, said: str, unsaid: str, tmp_path: Path
) -> None:
    (tmp_path / "q.py").write_text(QUEUE)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port()}"]
    process = started([*launcher, str(tmp_path / "q.py"), what])
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.terminate()
    assert process.returncode == code, err
    assert said in out + err
    assert unsaid not in out + err


@pytest.mark.slow
def test_a_store_that_nobody_keeps_is_one_line(tmp_path: Path) -> None:
    # Before: pages of C++ frames.
    (tmp_path / "n.py").write_text(
        "import datetime, erk_guid.generation.peers as peers\n"
        "peers.JOINING = datetime.timedelta(seconds=2)\n" + QUEUE
    )
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (free := port())}
    process = started([str(tmp_path / "n.py"), ""], RANK=1, WORLD_SIZE=2, **address)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.startswith(f"Error: nobody answers at 127.0.0.1:{free} (MASTER_ADDR, MASTER_PORT)")
    assert err.count("\n") == 1


ORPHAN = """
import os, sys, time
first = os.getppid()
import BEFORE
assert ("torch" in sys.modules) == ("peers" in "BEFORE")
print("imported", flush=True)
while os.getppid() == first:
    time.sleep(0.05)
from erk_guid.generation.peers import ending_with_launcher
with ending_with_launcher(1):
    time.sleep(60)
print("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["erk_guid.cli", "erk_guid.generation.peers"])
def test_a_launcher_that_dies_before_the_job_began(before: str, tmp_path: Path) -> None:
    # Catches: looking for the parent when the job begins, or when torch, which takes seconds, is
    # imported. It is another one by then.
    (tmp_path / "o.py").write_text(ORPHAN.replace("BEFORE", before))
    launcher = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]])"
    process = started(["-c", launcher, str(tmp_path / "o.py")], TORCHELASTIC_RUN_ID="a")
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    process.kill()
    out, err = process.communicate(timeout=30)  # until the worker has closed its streams
    assert out == ""
    assert "rank 1 ends: torchrun, which started it, is gone" in err


SCORE = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from erk_guid.cli.common import reporting_errors
from erk_guid.generation.process_groups import process_group
rank, what = int(os.environ["RANK"]), sys.argv[1]
def stop(*args, **options):
    os.kill(os.getpid(), signal.SIGSTOP)
@reporting_errors
def main():
    with process_group(torch.device("cpu"), patience=3) as group:
        if what == "collective":
            if rank:
                dist.all_reduce = stop
            group.sum(torch.ones(2))
        else:
            time.sleep(2 * rank)
            print(group.agree(lambda: "agreed"))
    sys.stdout.flush()
    os._exit(0)
main()
"""


@pytest.mark.slow
def test_a_rank_that_stops_in_a_collective_operation(tmp_path: Path) -> None:
    # Before: Gloo waited for it, up to two days.
    (tmp_path / "s.py").write_text(SCORE)
    living, stopped = by_hand(tmp_path / "s.py", "collective")
    try:
        _, err = living.communicate(timeout=60)
        assert living.returncode == 1
        assert err == "Error: rank 0 ends: rank 1 gave no sign of life for 3 seconds\n"
    finally:
        stopped.send_signal(signal.SIGKILL)
        stopped.communicate()
        living.kill()


@pytest.mark.slow
def test_rank_0_keeps_the_store_until_the_others_have_read_it(tmp_path: Path) -> None:
    # Before: rank 1 lost the store when rank 0 had ended.
    (tmp_path / "s.py").write_text(SCORE)
    for process in by_hand(tmp_path / "s.py", "agree"):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "agreed\n"), err
