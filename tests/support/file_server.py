"""A server of files on this machine, which can be told to misbehave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONTENT = bytes(range(256)) * 20_000


@dataclass(frozen=True)
class Answer:
    """An answer that is sent as it stands: no header is added, and no rule kept."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    stalls: bool = False

    @classmethod
    def whole(cls, body: bytes, status: int = 200, **headers: str) -> Answer:
        """A well-formed answer; further headers are named with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, body, {"Content-Length": str(len(body)), **named})


class Server(ThreadingHTTPServer):
    """Serves `content` as RFC 9110 says (ranges, If-Range).

    The first answers are those of `script`. The first transfers after them break after so many
    bytes each as `drops` says.
    """

    script: Iterator[Answer] = iter(())
    drops: tuple[int, ...] = ()
    etag = '"one"'
    content = CONTENT
    requests: list[Mapping[str, str]]
    released: threading.Event

    def url(self, path: str = "/file.pkl") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    @property
    def ranges(self) -> list[str | None]:
        """The ranges that were asked for."""
        return [headers.get("Range") for headers in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        answer = next(self.server.script, None)
        if answer is not None:
            self._send(answer)
        elif self.path == "/missing.pkl":
            self.send_error(404)
        else:
            self._serve()

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)
        self.wfile.flush()
        if answer.stalls:
            self.server.released.wait(30)

    def _serve(self) -> None:
        body, wanted = self.server.content, self.headers.get("Range")
        begin = 0
        if wanted and self.headers.get("If-Range") == self.server.etag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        html = self.path == "/page.pkl"
        self.send_header("Content-Type", "text/html" if html else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        size = len(body)
        if self.server.drops:
            size, *rest = self.server.drops
            self.server.drops = tuple(rest)
        self.wfile.write(body[begin : begin + size])

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Server]:
    """Run a server, with `cache` as the folder of downloads and no pause between attempts."""
    monkeypatch.setenv("ERK_GUID_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("erk_guid.models.checkpoints.download.time.sleep", lambda seconds: None)
    with Server(("127.0.0.1", 0), _Handler) as running:
        running.requests, running.released = [], threading.Event()
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield running
        finally:
            running.released.set()
            running.shutdown()
