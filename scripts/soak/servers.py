"""A server of one checkpoint that lies, and the scenario in which it is asked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from erk_guid.generation.locks import LOCK_FILE
from scripts.soak import checks
from scripts.soak.jobs import COMMON, Job
from scripts.soak.rounds import Round

NETWORK = Path("erk_guid/data/digits.safetensors")
"""In the program's copy: the network of the shipped model."""
STALL = 2.0
"""Seconds without a byte before a server that stalls closes the connection."""
ETAG = '"one"'


class Answer(NamedTuple):
    """An answer that is sent as it stands."""

    status: int
    headers: dict[str, str]
    body: bytes
    stall: float = 0.0


class Ask(NamedTuple):
    """What was asked for: the bytes from `start` on, or all of the file (None)."""

    start: int | None


Lie = Callable[[bytes, Ask], Answer]


def truthful(data: bytes, ask: Ask) -> Answer:
    """Answer as RFC 9110 says."""
    start = ask.start or 0
    headers = {"ETag": ETAG, "Content-Length": str(len(data) - start)}
    if ask.start is None:
        return Answer(200, headers, data)
    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return Answer(206, headers, data[start:])


def longer(data: bytes, ask: Ask) -> Answer:
    """Announce more bytes than there are."""
    return Answer(200, {"Content-Length": str(len(data) + 1000)}, data)


def shorter(data: bytes, ask: Ask) -> Answer:
    """Announce fewer bytes than there are."""
    return Answer(200, {"Content-Length": str(len(data) // 2)}, data)


def truncated(data: bytes, ask: Ask) -> Answer:
    """Send a piece of what was asked for, each time, and nothing of the second half."""
    answer = truthful(data, ask)
    first_half = max(len(data) // 2 - (ask.start or 0), 0)
    return answer._replace(body=answer.body[: min(len(data) // 30, first_half)])


def other_range(data: bytes, ask: Ask) -> Answer:
    """Break off, then send another range than was asked for."""
    if ask.start is None:
        return truncated(data, ask)
    headers = {"ETag": ETAG, "Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
    return Answer(206, {**headers, "Content-Length": str(len(data))}, data)


def unasked_range(data: bytes, ask: Ask) -> Answer:
    """Send a part where the whole was asked for."""
    return truthful(data, Ask(100))


def empty(data: bytes, ask: Ask) -> Answer:
    """Send nothing."""
    return Answer(200, {"Content-Length": "0"}, b"")


def encoded(data: bytes, ask: Ask) -> Answer:
    """Send it compressed."""
    body = gzip.compress(data, 1)
    return Answer(200, {"Content-Encoding": "gzip", "Content-Length": str(len(body))}, body)


def stalling(data: bytes, ask: Ask) -> Answer:
    """Send no more than the beginning, wait, and close the connection."""
    return truncated(data, ask)._replace(stall=STALL)


def damaged(data: bytes, ask: Ask) -> Answer:
    """Send other bytes."""
    return truthful(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], ask)


LIES: tuple[Lie, ...] = (
    longer, shorter, truncated, other_range, unasked_range, empty, encoded, stalling, damaged,
)  # fmt: skip
BY_HASH = (shorter, damaged)
"""Only the hash of the file tells these."""


@dataclass
class _Server(ThreadingHTTPServer):
    """Serves `data` as `lie` says."""

    data: bytes
    lie: Lie
    asked: list[Ask] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/digits.safetensors"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        ask = Ask(int(wanted[6:].rstrip("-")) if wanted.startswith("bytes=") else None)
        self.server.asked.append(ask)
        answer = self.server.lie(self.server.data, ask)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the program may have gone
            self.wfile.write(answer.body)
            self.wfile.flush()
        time.sleep(answer.stall)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(data: bytes, lie: Lie) -> Iterator[_Server]:
    """Run a server."""
    server = _Server(data, lie)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def server(r: Round) -> None:
    """Ask a server that lies, then an honest one; or kill a download, and go on with it."""
    data = (r.program.root / NETWORK).read_bytes()
    lie = r.rng.choice(LIES)
    killed = lie is stalling and r.rng.random() < 0.7 and not r.budget.over()
    cache = r.folder / "cache"
    with serving(data, lie) as lying:
        job = _job(r, lying.url(), data if lie in BY_HASH else None)
        r.told(f"the server is {lie.__name__}")
        process = r.begin(job, resume=False)
        if killed:
            process.when(lambda: bool(lying.asked) and bool(list(cache.glob("*.partial"))))
            r.kill(process, r.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        ended = process.wait()
        r.tell(ended, job)
        r.find(checks.after_signal(ended) if ended.sent else checks.refused(ended), ended.name)
        if whole := [p.name for p in cache.glob("*.safetensors")]:
            r.find([f"a lie is in the cache: {whole[0]} from a server that is {lie.__name__}"])
        # SIGKILL leaves the lock, which the next run takes over.
        if [p for p in job.outdir.glob("*") if not (killed and p.name == LOCK_FILE)]:
            r.find(["a download that failed has left something in the folder of images"])
        lying.lie = truthful
        r.finish(job)
    left = [p.name for p in cache.glob("*") if p.suffix not in (".safetensors", ".lock")]
    r.find([f"left in the cache: {name}" for name in left])
    if [p.read_bytes() for p in cache.glob("*.safetensors")] != [data]:
        r.find(["the cache does not hold the file that was served"])


def _job(r: Round, url: str, hashed: bytes | None) -> Job:
    """Return a job with the network of the server, given with its hash or without."""
    fragment = f"#sha256={hashlib.sha256(hashed).hexdigest()}" if hashed else ""
    job = r.job()
    options = (f"--net={url}{fragment}", *(o for o in job.settings.options if o != COMMON[0]))
    return replace(job, settings=job.settings._replace(options=options))
