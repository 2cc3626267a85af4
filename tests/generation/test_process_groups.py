"""Real processes: torchrun, killed runs, ranks that fail."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image

SCRIPT = ROOT / "generate_images.py"
NET = str(DATA / "edm2_cond.pkl")

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    # One thread each: more ranks than cores would only wait for each other.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(
    processes: int, *args: Any, script: Path = SCRIPT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["--"]  # or torchrun takes --num for an abbreviation of one of its options
    command += [str(script), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT
    )


def names(folder: Path) -> list[str]:
    """Return the files of a folder, without rows of a trace: each rank has its own."""
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    return sorted(name for name in files if not name.startswith(".trace."))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


EDM2_SCRIPT = """
import os, sys
import torch
from calculate_metrics import calculate_stats_for_iterable
from generate_images import generate_images

torch.distributed.init_process_group("gloo")
for k in range(3):
    images = generate_images("digits", seeds=range(11), max_batch_size=2, device="cpu",
                             num_steps=2, verbose=False)
    *_, last = calculate_stats_for_iterable(images, metrics=["fd_digits"], verbose=False,
                                            device="cpu", dest_path=sys.argv[1])
rank = os.environ.get("RANK", "0")  # what several processes print may be mixed
open(sys.argv[1] + "." + rank, "w").write(str(last.stats["num_images"]))
torch.distributed.destroy_process_group()
"""


def test_a_users_script_under_torchrun(tmp_path: Path) -> None:
    # EDM2's functions: shares of one list, an empty one among them, and statistics of all.
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    (tmp_path / "user.py").write_text(path + EDM2_SCRIPT)
    done = run(3, tmp_path / "stats.pkl", script=tmp_path / "user.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"stats.pkl.{k}").read_text() for k in range(3)] == ["11"] * 3
    alone = tmp_path / "alone.pkl"
    code = EDM2_SCRIPT.replace('torch.distributed.init_process_group("gloo")', "")
    code = code.replace("torch.distributed.destroy_process_group()", "")
    (tmp_path / "one.py").write_text(path + code)
    done = run(1, alone, script=tmp_path / "one.py")
    assert done.returncode == 0, done.stderr[-2000:]
    with open(alone, "rb") as one, open(tmp_path / "stats.pkl", "rb") as three:
        a, b = pickle.load(one), pickle.load(three)
    assert a["num_images"] == b["num_images"] == 11
    for what in ("mu", "sigma"):
        np.testing.assert_allclose(a["fd_digits"][what], b["fd_digits"][what], rtol=1e-4, atol=1e-4)


DUMP = """
import sys
from pathlib import Path
import numpy as np
import erk_guid
from erk_guid.generation.devices import choose_device
from erk_guid.generation.process_groups import process_group

device = choose_device("cpu")
with process_group(device) as group:
    net = erk_guid.load(sys.argv[1]).net
    batches = erk_guid.generate(
        net, range(9), batch_size=2, num_steps=2, rank=group.rank, world_size=group.world_size
    )
    for batch in batches:
        for k, seed in enumerate(batch.seeds):
            np.save(Path(sys.argv[2]) / f"{seed}-noise.npy", batch.noise[k].numpy())
            np.save(Path(sys.argv[2]) / f"{seed}-label.npy", batch.labels[k].numpy())
"""


def test_two_processes_draw_byte_identical_noise_and_labels(tmp_path: Path) -> None:
    script = tmp_path / "dump.py"
    script.write_text(DUMP)
    digests = []
    for processes in (1, 2):
        folder = tmp_path / f"by-{processes}"
        folder.mkdir()
        done = run(processes, NET, folder, script=script)
        assert done.returncode == 0, done.stderr
        files = names(folder)
        assert len(files) == 18
        digests.append({n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in files})
    assert digests[0] == digests[1]


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    args = ["--net", NET, "--seeds", "0-10", "--batch", 2, "--steps", 4, "--w_stiff", 0.5,
            "--subdirs", "--device", "cpu"]  # fmt: skip
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run(processes, *args, "--outdir", out, "--trace", tmp_path / f"{processes}.csv",
                   "--grid", tmp_path / f"{processes}.png")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "11 images made" in done.stdout
    assert names(tmp_path / "1") == names(tmp_path / "2")
    for name in names(tmp_path / "1"):
        if name.endswith(".png"):
            apart = np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / "2" / name))
            assert apart.max() <= 1
    # The trace and the sheet are of all ranks, in the same order.
    lines = [(tmp_path / f"{n}.csv").read_text().splitlines() for n in (1, 2)]
    assert [li.split(",")[:2] for li in lines[0]] == [li.split(",")[:2] for li in lines[1]]
    assert np.abs(pixels(tmp_path / "1.png") - pixels(tmp_path / "2.png")).max() <= 1


def test_more_ranks_than_batches_does_not_hang(tmp_path: Path) -> None:
    done = run(3, "--net", NET, "--seeds", "4", "--steps", 2, "--outdir", tmp_path / "o",
               "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "o") == ["000004.png", "run.json"]


def test_what_rank_0_refuses_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    done = run(2, "--net", "/nowhere/net.pkl", "--outdir", tmp_path / "o", "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("Error: '/nowhere/net.pkl' is no file, no URL and no preset") == 1


FAILING = """
import os, sys
sys.argv[1:] = ["--net", sys.argv[1], "--outdir", sys.argv[2], "--seeds", "0-199", "--steps", "64",
                "--batch", "4", "--device", "cpu"]
import erk_guid.generation.writing
if os.environ["RANK"] == "1":
    def failing(path, *args, **options):
        raise OSError(28, "No space left on device")
    erk_guid.generation.writing.save_png = failing
from erk_guid.cli.generate import generate_command
generate_command()
"""


def test_a_rank_that_raises_ends_the_job_with_its_message(tmp_path: Path) -> None:
    # Catches: the others waiting out a barrier. Undisturbed, this job takes minutes.
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = run(2, NET, tmp_path / "o", script=script)
    assert done.returncode != 0
    assert "cannot write an image to" in done.stderr
    assert "No space left on device" in done.stderr
    made = [n for n in names(tmp_path / "o") if n.endswith(".png")]
    assert len(made) < 100  # the other rank did not finish its share either


def test_a_failure_reaches_the_other_node(tmp_path: Path) -> None:
    # Two launchers, as on two nodes: neither watches the other's processes.
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=erk",
        "--local_addr=127.0.0.1", str(script), NET, str(tmp_path / "o"),
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert sum("No space left on device" in text for text in errors) == 1
    # Undisturbed, the job takes minutes and makes them all.
    assert len([n for n in names(tmp_path / "o") if n.endswith(".png")]) < 100


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    args = ["--net", NET, "--seeds", "0-59", "--batch", "4", "--steps", "12", "--device", "cpu"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(1, *args, "--outdir", whole).returncode == 0
    rng = random.Random(0)
    counts = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *args, "--outdir", str(broken), "--resume"],
            env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Wait for the first new image, then a random moment more: importing takes long enough
        # that a kill by the clock alone would mostly hit that.
        have, patience = len(list(broken.glob("0*.png"))), time.monotonic() + 60
        while len(list(broken.glob("0*.png"))) <= have and time.monotonic() < patience:
            time.sleep(0.01)
            if process.poll() is not None:
                break
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in broken.glob("0*.png"):
            pixels(path)  # whole, or this raises
        counts.append(len(list(broken.glob("0*.png"))))
    assert 0 < counts[0] < 60  # it was killed in the middle at least once
    done = run(1, *args, "--outdir", broken, "--resume")
    assert done.returncode == 0, done.stderr
    assert names(broken) == names(whole)
    for name in names(whole):
        if name.endswith(".png"):
            assert np.abs(pixels(whole / name) - pixels(broken / name)).max() <= 1
    refused = run(1, *args, "--outdir", broken, "--resume", "--steps", "13")
    assert refused.returncode == 1
    assert "num_steps was 12, now 13" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_module_and_script_are_the_same_program(tmp_path: Path) -> None:
    a = run(1, "--help")
    b = subprocess.run(
        [sys.executable, "-m", "erk_guid", "generate", "--help"],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert a.returncode == b.returncode == 0
    assert a.stdout.split("\n", 1)[1] == b.stdout.split("\n", 1)[1]


METRICS = ROOT / "calculate_metrics.py"


def kept(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return {k: data[k] for k in data.files if k != "about"}


def test_statistics_from_one_two_and_three_processes_agree(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for k in range(50):
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
    found = []
    # 50 images in blocks of 7: the shares are unequal, and the last block is a single image.
    for processes, batch in ((1, 7), (2, 7), (3, 7), (2, 64), (3, 1)):
        out = tmp_path / f"{processes}-{batch}.npz"
        done = run(processes, "calc", "--images", folder, "--ref", "digits", "--num", 50,
                   "--metrics", "fd_digits", "--batch", batch, "--device", "cpu",
                   "--features", out, script=METRICS)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("fd_digits  ") == 1
        found.append(kept(out))
    first = found[0]
    for other in found[1:]:
        assert other["fd_digits/count"] == 50
        for key in ("fd_digits/mu", "fd_digits/sigma"):
            apart = np.abs(other[key] - first[key]).max() / np.abs(first[key]).max()
            assert apart < 1e-10
        # Every image once, in order.
        np.testing.assert_allclose(
            other["fd_digits/features"], first["fd_digits/features"], rtol=1e-5, atol=1e-5
        )


def test_generated_statistics_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        done = run(processes, "gen", "--preset", "digits", "--ref", "digits", "--num", 20,
                   "--metrics", "fd_digits", "--batch", 6, "--steps", 2, "--device", "cpu",
                   "--json", out, script=METRICS)  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(out.read_text())["scores"]["fd_digits"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def test_what_a_rank_cannot_read_is_said_once(tmp_path: Path) -> None:
    for k in range(8):
        Image.new("L", (32, 32), k).save(tmp_path / f"{k}.png")
    (tmp_path / "5.png").write_text("no image")  # in the share of rank 1
    done = run(2, "calc", "--images", tmp_path, "--ref", "digits", "--num", 8, "--batch", 1,
               "--metrics", "fd_digits", "--device", "cpu", script=METRICS)  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("cannot read the image 5.png: it is no image") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(METRICS) not in done.stderr
