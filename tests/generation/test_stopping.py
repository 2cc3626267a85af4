"""SIGTERM, Ctrl-C and kills: real processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from erk_guid.generation.locks import LOCK_FILE
from erk_guid.generation.stopping import StoppedError, stopping
from erk_guid.generation.trace import part_files, read_trace

ROOT = Path(__file__).parents[2]
COUNT, STEPS = 60, 12


def command(outdir: Path, *more: object) -> list[str]:
    return [
        sys.executable, str(ROOT / "generate_images.py"), "--preset=digits", "--device=cpu",
        f"--seeds=0-{COUNT - 1}", "--batch=4", f"--steps={STEPS}", "--w_stiff=0.5",
        f"--outdir={outdir}", f"--trace={outdir}.csv", *map(str, more),
    ]  # fmt: skip


def started(args: list[str], **variables: object) -> subprocess.Popen[str]:
    shown = {k: str(v) for k, v in variables.items()}
    return subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **shown}, cwd=ROOT,
    )  # fmt: skip


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def pngs(outdir: Path) -> list[Path]:
    return sorted(outdir.glob("0*.png"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("undisturbed") / "o"
    subprocess.run(command(outdir), check=True, capture_output=True, timeout=300)
    return outdir


def check_whole(outdir: Path, undisturbed: Path) -> None:
    """Check images, trace and run.json against those of a run that nobody disturbed."""
    assert [p.name for p in pngs(outdir)] == [p.name for p in pngs(undisturbed)]
    for path in pngs(outdir):
        with Image.open(path) as ours, Image.open(undisturbed / path.name) as theirs:
            assert ours.tobytes() == theirs.tobytes(), path.name
    rows, expected = read_trace(Path(f"{outdir}.csv")), read_trace(Path(f"{undisturbed}.csv"))
    assert rows[["seed", "step"]].tolist() == expected[["seed", "step"]].tolist()
    for name in ("sigma", "stiffness", "step_size"):
        assert rows[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-3, nan_ok=True)
    assert json.loads((outdir / "run.json").read_text())["seeds"] == list(range(COUNT))
    hidden = [p for p in outdir.iterdir() if p.name.startswith(".")]
    assert hidden == part_files(outdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_in_the_middle(number: int, undisturbed: Path, tmp_path: Path) -> None:
    # Before: SIGTERM ended it without a word, Ctrl-C with exit 1, and the trace was lost.
    outdir = tmp_path / "o"
    process = started(command(outdir))
    wait_for(lambda: len(pngs(outdir)) >= 8)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert 8 <= len(pngs(outdir)) < COUNT
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert part_files(outdir)
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {signal.Signals(number).name}: " in err
        assert f"{len(pngs(outdir))} of {COUNT} images are in" in err
        assert "--resume" in err
        assert "Traceback" not in err
        # The trace has what there is.
        rows = read_trace(Path(f"{outdir}.csv"))
        assert {f"{seed:06d}.png" for seed in rows["seed"]} == {p.name for p in pngs(outdir)}
        assert not (outdir / LOCK_FILE).exists()
    before = {path: path.stat().st_ino for path in pngs(outdir)}
    subprocess.run(command(outdir, "--resume"), check=True, capture_output=True, timeout=300)
    check_whole(outdir, undisturbed)
    assert {path: path.stat().st_ino for path in before} == before  # none is made twice


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads(number: int, tmp_path: Path) -> None:
    # Before: Ctrl-C during the imports was a traceback.
    # Raised in there, it was swallowed where torch imports numpy.
    for delay in (0.0, 0.3, 0.6, 0.9, 1.2, 1.6):
        process = started(command(tmp_path / "o"))
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda maps=maps: "libtorch" in maps.read_text())
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, (delay, err)
        assert f"topped by {signal.Signals(number).name}" in err
        assert "Traceback" not in err, delay


@pytest.mark.slow
def test_torchrun_is_stopped(undisturbed: Path, tmp_path: Path) -> None:
    outdir = tmp_path / "o"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
        f"--master_port={port}",
    ]  # fmt: skip
    process = started([*torchrun, *command(outdir)[1:]])
    wait_for(lambda: len(pngs(outdir)) >= 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode
    assert err.count("stopped by SIGTERM: ") >= 1
    assert f"of {COUNT} images are in" in err
    assert len(pngs(outdir)) < COUNT
    subprocess.run(command(outdir, "--resume"), check=True, capture_output=True, timeout=300)
    check_whole(outdir, undisturbed)


@pytest.mark.slow
def test_one_rank_is_stopped_and_the_other_makes_the_rest(
    undisturbed: Path, tmp_path: Path
) -> None:
    # A node that is taken away: the job goes on without it.
    outdir = tmp_path / "o"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [started(command(outdir), RANK=rank, **common) for rank in (0, 1)]
    wait_for(lambda: (outdir / ".trace.1.part").exists() and len(pngs(outdir)) >= 8)
    ranks[1].send_signal(signal.SIGTERM)
    _, err = ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == 143
    assert "rank 1; ranks that go on make its batches" in err
    out, err = ranks[0].communicate(timeout=120)
    assert ranks[0].returncode == 0, err
    assert f"{COUNT} images made" in out
    check_whole(outdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    # Before: no image was made. And a file of the job could have got the number of standard
    # error, and what is written there.
    outdir = tmp_path / "o"
    line = f"{shlex.join([*command(outdir), '--seeds=0-3'])} {closed}"
    done = subprocess.run(["bash", "-c", line], timeout=120, capture_output=True, check=False)
    assert done.returncode == 0
    assert len(pngs(outdir)) == 4
    assert len(read_trace(Path(f"{outdir}.csv"))) == 4 * STEPS


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_waits_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def work() -> None:
        with stopping() as stop:
            with stop.deferred():
                term()
                reached.append(1)
                term()  # torchrun hands on what a terminal sent already
                reached.append(2)
                stop.check()
            reached.append(3)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as caught:
        work()
    assert reached == [1, 2]
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erk_guid.generation.stopping.HASTE", 0)
    reached = []

    def work(deferred: bool) -> None:
        with stopping() as stop:
            if deferred:
                with stop.deferred():
                    term()
                    term()
            else:
                term()
            reached.append(1)

    for deferred in (True, False):
        with pytest.raises(StoppedError):
            work(deferred)
    assert not reached


def test_a_swallowed_signal_is_seen_later() -> None:
    # Libraries catch what is raised while they load something.
    def work() -> None:
        with stopping() as stop:
            with contextlib.suppress(KeyboardInterrupt):
                term()
            with stop.deferred():
                raise AssertionError("not reached")

    with pytest.raises(StoppedError):
        work()


def test_a_program_that_handles_signals_keeps_its_handler() -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with stopping():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
