"""The queue that processes share: slow ranks, late ones, dead ones; and its single-process form."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image

from erk_guid.common.errors import ErkGuidError
from erk_guid.generation.peers import OwnStore, Signs
from erk_guid.generation.workers import Queue, Workers, workers


def test_a_single_process_takes_everything_in_order() -> None:
    with workers() as group:
        assert (group.rank, group.world_size) == (0, 1)
        assert group.agree(lambda: [1, 2]) == [1, 2]
        queue = group.queue(3)
        for index in queue.fresh():
            queue.done(index, 10 + index, notes=index if index != 1 else None)
        assert list(queue.abandoned()) == []
        assert queue.made() == 33
        assert queue.notes() == [0, 2]


def test_a_batch_that_is_done_twice_counts_once() -> None:
    queue = Workers().queue(2)
    assert list(queue.fresh()) == [0, 1]
    for index in (0, 0, 1):
        queue.done(index, 5)
    assert queue.made() == 10
    assert list(queue.abandoned()) == []


def test_what_dead_ranks_left_is_retaken_and_what_living_ones_do_is_not() -> None:
    # Rank 1 died after taking batch 1, rank 2 before it signed batch 2; rank 3 lives, with batch
    # 0, and gives signs of life.
    store = OwnStore()
    me = Workers(0, 4, store, Signs(store, patience=0.5))
    for index, rank in ((0, 3), (1, 1), (3, 0)):
        me.store.set(f"owner/{index}", str(rank))
    me.store.add("next", 4)
    queue = Queue(me, 4)
    queue.done(3, 1)
    taken = []
    stop = threading.Event()

    def beating() -> None:
        while not stop.wait(0.05):
            for rank in (0, 3):
                me.store.add(f"beat/{rank}", 1)

    thread = threading.Thread(target=beating)
    thread.start()
    try:
        for index in queue.abandoned():
            taken.append(index)
            queue.done(index, 1)
            if len(taken) == 2:
                queue.done(0, 1)  # by rank 3
    finally:
        stop.set()
        thread.join()
    assert taken == [1, 2]
    assert queue.made() == 4


def test_an_incomplete_launch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ErkGuidError, match="MASTER_ADDR"), workers():
        pass


def test_an_error_of_rank_0_reaches_those_that_come_later() -> None:
    first = Workers(0, 2)
    with pytest.raises(ErkGuidError, match="no such file"):
        first.agree(lambda: (_ for _ in ()).throw(ErkGuidError("no such file")))
    later = Workers(1, 2, first.store)
    with pytest.raises(ErkGuidError, match="no such file"):
        later.agree(lambda: None)
    assert pickle.loads(first.store.get("agreed/0")) == (None, "no such file")


def test_a_batch_is_done_without_the_count_of_its_images() -> None:
    # A rank was killed between the two records: nobody may wait for the second.
    queue = Workers().queue(1)
    list(queue.fresh())
    queue.workers.store.add("done/0", 1)
    assert list(queue.abandoned()) == []


PROGRAM = """
import functools, os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[3]
if what == "late" and rank:
    time.sleep(3)
import erk_guid.generation.images as images
import erk_guid.generation.jobs as jobs
jobs.workers = functools.partial(jobs.workers, patience=4)
sample, made = images._Generation.sample, 0
def slowly(self, indices):
    global made
    if what == "dead" and rank and made == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    made += 1
    time.sleep(0.9 if what == "slow" and rank else 0.6 if what == "late" else 0.3)
    return sample(self, indices)
images._Generation.sample = slowly
job = jobs.GenerationJob(
    net=sys.argv[1], outdir=jobs.Path(sys.argv[2]), seeds=range(48), batch=2, num_steps=2,
    device="cpu", trace=jobs.Path(sys.argv[2] + ".csv"),
)
print("total", jobs.run_job(job))
print("batches", made)
"""


def together(tmp_path: Path, what: str) -> list[tuple[int, str, str]]:
    """Run two ranks without torchrun, which would stop one when the other dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(DATA / "edm2_cond.pkl"), str(tmp_path / what), what],
            env={**common, "RANK": str(rank), "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append((process.returncode, out, err))
    return results


def images(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).astype(int)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "bounds"), [("slow", (15, 21)), ("late", (12, 23)), ("dead", (22, 23))]
)
def test_two_ranks_share_by_speed(what: str, bounds: tuple[int, int], tmp_path: Path) -> None:
    # 24 batches. A rank slowed by 3 makes a quarter of them, one that dies in its third one or two.
    (code, out, err), other = together(tmp_path, what)
    assert code == 0, err
    assert "total 48" in out
    made = int(re.search(r"batches (\d+)", out)[1])  # type: ignore[index]
    low, high = bounds
    assert low <= made <= high, (out, other)
    if what == "dead":
        assert other[0] < 0
    else:
        assert other[0] == 0, other
        assert f"batches {24 - made}" in other[1]
    # The seeds keep their images, and the trace has a row for each of them and each step.
    found = images(tmp_path / what)
    assert sorted(found) == [f"{seed:06d}.png" for seed in range(48)]
    assert not [p for p in (tmp_path / what).glob(".*") if not p.name.startswith(".trace.")]
    assert len((tmp_path / f"{what}.csv").read_text().splitlines()) == 1 + 48 * 2
    from erk_guid.generation.jobs import GenerationJob, run_job

    job = GenerationJob(
        net=str(DATA / "edm2_cond.pkl"), outdir=tmp_path / "alone", seeds=range(48), batch=2,
        num_steps=2, device="cpu",
    )  # fmt: skip
    assert run_job(job) == 48
    for name, alone in images(tmp_path / "alone").items():
        assert np.abs(found[name] - alone).max() <= 1


TWICE = """
import os, sys, time
import erk_guid.generation.workers as w
from erk_guid.common.errors import ErkGuidError
def fail():
    raise ErkGuidError("no such network")
rank = int(os.environ["RANK"])
if sys.argv[1] == "twice":
    for job in range(2):
        with w.workers() as group:
            assert group.agree(lambda: job) == job
            queue = group.queue(4)
            for index in queue.fresh():
                queue.done(index, 1)
            list(queue.abandoned())
            assert queue.made() == 4
else:
    if rank:
        time.sleep(3)
    try:
        with w.workers() as group:
            group.agree(fail)
    except ErkGuidError as error:
        print("error:", error)
        sys.exit(1)
print("good")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["twice", "failing"])
def test_jobs_in_a_row_and_a_failure_before_the_other_rank_came(what: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(TWICE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), what], env={**common, "RANK": str(rank)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=60)
        if what == "twice":
            assert (process.returncode, out.strip()) == (0, "good"), err
        else:
            # Both know why, though rank 0 had failed when the other came.
            assert (process.returncode, out.strip()) == (1, "error: no such network"), err
