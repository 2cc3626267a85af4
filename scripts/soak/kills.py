"""Scenarios in which processes are killed: one, several ranks, with clocks that jump."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from scripts.soak import checks
from scripts.soak.jobs import Job
from scripts.soak.programs import Ended, Process, free_port, listens
from scripts.soak.rounds import DEADLY, NOTHING, Round

STOPPED = 25.0
"""Seconds that a rank is stopped for: longer than the others wait for it."""
RANK_TIMEOUT = 30
"""Seconds after which a rank that makes no progress ends, where the program has such an option."""
LATE = 2
"""Processes that are begun, and killed, when all images are there."""
DAY = 86_400
JUMPING = f"""
import random, time
_draw, _time, _time_ns = random.Random(), time.time, time.time_ns
time.time = lambda: _time() + _draw.choice([0, {DAY}, -{DAY}])
time.time_ns = lambda: _time_ns() + _draw.choice([0, {DAY}, -{DAY}]) * 10**9
"""
ZONES = ("UTC", "Asia/Tokyo", "America/Los_Angeles", "XYZ+30", "")


def process(r: Round) -> None:
    """Kill one process again and again; resume until all images are there."""
    job = r.job()
    _lives(r, job)


def _lives(r: Round, job: Job, env: Mapping[str, str] = NOTHING) -> None:
    late = 0
    for life in range(r.lives):
        before = job.there()
        late += len(before) == len(job.seeds)
        if r.budget.over() or late > LATE:
            break
        running = r.begin(job, resume=life > 0, env=env)
        r.strike(running, job)
        if r.ended(running, job, before).code == 0:
            break
        if env:
            _age_files(r, job)
    r.finish(job, env=env)


def clock(r: Round) -> None:
    """Kill one process whose clock jumps by a day; between, files come from other times."""
    modules = r.folder / "modules"
    modules.mkdir(parents=True)
    (modules / "sitecustomize.py").write_text(JUMPING)
    _lives(r, r.job(), {"PYTHONPATH": str(modules), "TZ": r.rng.choice(ZONES)})


def _age_files(r: Round, job: Job) -> None:
    """Give lock, record and parts times far away; images keep theirs, by which they are known."""
    for path in job.outdir.glob("*"):
        if path.suffix != ".png" and path.is_file() and r.rng.random() < 0.5:
            then = time.time() + r.rng.choice([-1e9, 1e9])
            with contextlib.suppress(OSError):
                os.utime(path, (then, then))


def ranks(r: Round) -> None:
    """Kill one or both of two ranks that were begun by hand."""
    job = r.job()
    for _ in range(min(r.lives, 4)):
        if r.budget.over():
            break
        before = job.there()
        both = _by_hand(r, job)
        first = r.rng.randrange(2)
        r.strike(both[first], job)
        if r.rng.random() < 0.7:
            _strike_after(r, both[1 - first], r.rng.uniform(0, 3))
        if _all_ended(r, job, both, before):
            break
    r.finish(job)


def _by_hand(r: Round, job: Job) -> list[Process]:
    port, argv = str(free_port()), r.program.forms()[0]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        r.begin(job, name=f"-rank{rank}", argv=argv, env={**shared, "RANK": str(rank)})
        for rank in range(2)
    ]


def _strike_after(r: Round, running: Process, seconds: float) -> None:
    if running.reach(running.age + seconds):
        r.kill(running, r.rng.choice(DEADLY))


def _all_ended(r: Round, job: Job, both: list[Process], before: dict[int, tuple[int, int]]) -> bool:
    """Wait for ranks and check them; return whether they say that the job is done."""
    first = both[0].wait()
    given_up = first.sent and first.code != 0 and not any(sent.begun for sent in first.sent)
    if given_up:
        both[1].kill()  # it may look for rank 0 for minutes: one may be late
    ends = [first, both[1].wait()]
    for rank, ended in enumerate(ends):
        r.tell(ended, job)
        if rank and given_up:
            continue  # by us
        r.find(_of_rank(ended, complete=len(job.there()) == len(job.seeds)), ended.name)
    r.find(checks.unchanged(job, before))
    done = ends[0].code == 0
    if done and len(job.there()) < len(job.seeds):
        r.find([f"rank 0 ended well with {len(job.there())} of {len(job.seeds)} images"])
    return done


def _of_rank(ended: Ended, complete: bool) -> list[str]:
    if ended.code is None:
        return [f"a rank does not end{': it was sent signals' if ended.sent else ''}"]
    if ended.sent and not ended.sent[0].listening and ended.code not in (0, 1):
        return []  # Python itself was beginning
    if ended.sent and ended.code == -ended.sent[0].number and (complete or "Error: " in ended.err):
        # All was done, or it had said why it ends, and Python itself was ending.
        return checks.tracebacks(ended)
    if ended.sent and ended.sent[0].number != signal.SIGSTOP:
        # Its end may come by what befell the other rank in the same moment.
        return checks.tracebacks(ended) if ended.code == 1 else checks.after_signal(ended)
    if ended.code in (0, -signal.SIGKILL):
        return checks.tracebacks(ended)
    if ended.code == 1 and "Error: " not in ended.err:
        return checks.tracebacks(ended)  # the other one has said why
    return checks.refused(ended)


def torchrun(r: Round) -> None:
    """Kill a rank that torchrun began, or torchrun itself."""
    job = r.job()
    for life in range(min(r.lives, 3)):
        if r.budget.over():
            break
        before = job.there()
        logs = r.folder / f"logs{life}"
        running = r.begin(job, name="-torchrun", argv=r.program.torchrun(2, logs))
        running.reach(r.rng.uniform(2, 12))
        listening = _strike_one(r, running)
        ended = running.wait()
        r.tell(ended, job)
        r.find(_of_launcher(ended, logs, listening), ended.name)
        r.find(checks.unchanged(job, before), ended.name)
        if ended.code == 0:
            break
    r.finish(job)


def _strike_one(r: Round, running: Process) -> bool:
    """Kill a rank or the launcher; return whether the ranks were past Python's beginning."""
    pids = running.ranks()
    listening = all(map(listens, pids.values()))
    number = r.rng.choice(DEADLY)
    victim = r.rng.choice([None, *sorted(pids)])
    if victim is None:
        r.kill(running, number)
        return listening
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[victim], number)
        r.count(number)
        r.told(f"{running.name}: {signal.Signals(number).name} to rank {victim}")
    return listening


def _of_launcher(ended: Ended, logs: Path, listening: bool) -> list[str]:
    """Check what the ranks wrote; torchrun itself ends with a traceback of its own."""
    if ended.code is None:
        return ["torchrun or one of its ranks does not end"]
    texts = [path.read_text(errors="replace") for path in logs.rglob("*.log")]
    return checks.tracebacks(ended._replace(out="", err="\n".join(texts))) if listening else []


def stop(r: Round) -> None:
    """Stop a rank for longer than the other one waits: for a while, or for ever."""
    job = r.job()
    if r.program.knows("rank-timeout"):
        job = job.with_option(f"--rank-timeout={RANK_TIMEOUT}")
    both = _by_hand(r, job)
    victim = both[r.rng.randrange(2)]
    wanted = r.rng.randint(1, len(job.seeds) // 2)
    if victim.when(lambda: len(job.there()) >= wanted):
        victim.signal(signal.SIGSTOP)
        r.told(f"{victim.name}: SIGSTOP")
        other = both[1 - both.index(victim)]
        if r.rng.random() < 0.5:
            other.when(lambda: False, STOPPED)
            victim.signal(signal.SIGCONT)
        elif other.when(lambda: False, 2 * RANK_TIMEOUT + STOPPED):
            r.find(["a rank waits for ever for one that is stopped"], other.name)
            other.kill()
        else:
            r.kill(victim, signal.SIGKILL)
    _all_ended(r, job, both, {})
    r.finish(job)
