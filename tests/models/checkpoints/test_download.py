"""Downloads, from a server on this machine.

It answers as RFC 9110 says (ranges, If-Range); how the published files' real servers answer was
not seen.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import DATA

import erk_guid
from erk_guid.common.files import PARTIAL
from erk_guid.models.checkpoints.download import DownloadError, cache_dir, download

CONTENT = bytes(range(256)) * 20_000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; the first transfers break after so many bytes each as `drops` says."""

    drops: tuple[int, ...] = ()
    etag = '"one"'
    content = CONTENT
    requests: list[str | None]

    def url(self, path: str = "/file.pkl") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if self.path == "/missing.pkl":
            self.send_error(404)
            return
        body = self.server.content
        html = self.path == "/page.pkl"
        begin = 0
        if wanted and self.headers.get("If-Range") == self.server.etag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "text/html" if html else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - begin))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if self.server.drops:
            size, *rest = self.server.drops
            self.server.drops = tuple(rest)
            self.wfile.write(body[begin : begin + size])
            return
        self.wfile.write(body[begin:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("ERK_GUID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("erk_guid.models.checkpoints.download.time.sleep", lambda seconds: None)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_fetched_once(server: Server) -> None:
    path = download(server.url())
    assert path.read_bytes() == CONTENT
    assert path.parent == cache_dir()
    assert path.name.endswith("-file.pkl")
    assert download(server.url()) == path
    assert len(server.requests) == 1
    assert not list(cache_dir().glob(f"*{PARTIAL}*"))


def test_what_is_there_is_found_without_writing(server: Server) -> None:
    # The cache may be shared and read-only.
    path = download(server.url())
    for lock in cache_dir().glob("*.lock"):
        lock.unlink()
    before = sorted(cache_dir().iterdir())
    assert download(server.url()) == path
    assert download(server.url() + f"#sha256={SHA}") == path
    assert sorted(cache_dir().iterdir()) == before


def test_a_broken_transfer_is_continued(server: Server) -> None:
    server.drops = (2_000_000, 2_000_000)
    assert download(server.url()).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=2000000-", "bytes=4000000-"]


def test_two_versions_are_never_joined(server: Server) -> None:
    server.drops = (2_000_000, *[0] * 10)
    with pytest.raises(DownloadError, match="cannot fetch"):
        download(server.url())
    server.drops, server.etag, server.content = (), '"two"', b"x" * 5_000_000
    assert download(server.url()).read_bytes() == b"x" * 5_000_000


def test_a_recorded_hash_is_checked(server: Server) -> None:
    assert download(server.url() + f"#sha256={SHA}").read_bytes() == CONTENT
    wrong = "0" * 64
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA}, not the expected {wrong}"):
        download(server.url("/other.pkl") + f"#sha256={wrong}")
    assert not list(cache_dir().glob("*other.pkl"))
    with pytest.raises(DownloadError, match="64 hex digits"):
        download(server.url() + "#sha256=abc")


def test_errors_say_what_happened(server: Server) -> None:
    with pytest.raises(DownloadError, match="answered 404"):
        download(server.url("/missing.pkl"))
    with pytest.raises(DownloadError, match="is a web page"):
        download(server.url("/page.pkl"))
    closed = server.url().replace(str(server.server_address[1]), "9")
    with pytest.raises(DownloadError, match="give the file's path instead"):
        download(closed)


def test_a_cache_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERK_GUID_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="set ERK_GUID_CACHE"):
        download(server.url())


def test_cache_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ERK_GUID_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "erk_guid"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "erk_guid"


def test_a_network_from_a_url(server: Server) -> None:
    server.content = (DATA / "edm2_cond.pkl").read_bytes()
    assert erk_guid.load(server.url()).net.label_dim == 5


def test_nvidias_terms_are_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from erk_guid.models.checkpoints import download as module

    assert set(module.LICENSES) == {"nvlabs-fi-cdn.nvidia.com"}
    monkeypatch.setattr(module, "LICENSES", {"127.0.0.1": "weights by somebody"})
    download(server.url())
    assert "weights by somebody" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_processes_at_once(server: Server) -> None:
    module = "erk_guid.models.checkpoints.download"
    code = f"from {module} import download; print(download({server.url()!r}))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert len(server.requests) == 1
