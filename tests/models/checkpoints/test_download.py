"""Downloads, from a server on this machine.

It answers as RFC 9110 says, or misbehaves as told; how the published files' real servers answer
was not seen.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATA
from support.file_server import CONTENT, Answer, Server, serving

import erk_guid
from erk_guid.common.errors import CheckpointError, ErkGuidError
from erk_guid.common.files import PARTIAL
from erk_guid.models.checkpoints import download as module
from erk_guid.models.checkpoints.download import DownloadError, cache_dir, download
from erk_guid.models.checkpoints.loading import locate
from erk_guid.models.checkpoints.presets import PRESETS, Preset

SHA = hashlib.sha256(CONTENT).hexdigest()
WRONG = "0" * 64
OTHER = b"x" * len(CONTENT)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(monkeypatch, tmp_path / "cache") as running:
        yield running


def cached() -> list[str]:
    """Names of all files in the cache but the locks."""
    return sorted(p.name for p in cache_dir().glob("*") if p.suffix != ".lock")


def interrupt(server: Server) -> None:
    """Leave the first 2 MB of CONTENT in the cache."""
    server.drops = (2_000_000, *[0] * 10)
    with pytest.raises(DownloadError, match="cannot fetch"):
        download(server.url())
    server.drops = ()
    server.requests.clear()


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message.isprintable(), message
    return message


def test_fetched_once(server: Server) -> None:
    path = download(server.url())
    assert path.read_bytes() == CONTENT
    assert path.parent == cache_dir()
    assert path.name.endswith("-file.pkl")
    assert download(server.url()) == path
    assert len(server.requests) == 1
    assert server.requests[0]["Accept-Encoding"] == "identity"
    assert cached() == [path.name]


def test_what_is_there_is_found_without_writing(server: Server) -> None:
    # The cache may be shared and read-only.
    path = download(server.url())
    for lock in cache_dir().glob("*.lock"):
        lock.unlink()
    before = sorted(cache_dir().iterdir())
    assert download(server.url()) == path
    assert download(server.url() + f"#sha256={SHA}") == path
    assert sorted(cache_dir().iterdir()) == before


# --- hashes ----------------------------------------------------------------------------------


def test_a_recorded_hash_is_checked(server: Server) -> None:
    assert download(server.url() + f"#sha256={SHA}").read_bytes() == CONTENT
    assert download(server.url("/short.pkl"), sha256=SHA[:8].upper()).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA}, not the expected {WRONG}"):
        download(server.url("/other.pkl") + f"#sha256={WRONG}")
    # Neither the file nor its partial may stay: the next call without a hash would take it.
    assert not list(cache_dir().glob("*other.pkl")) + list(cache_dir().glob(f"*{PARTIAL}*"))
    with pytest.raises(DownloadError, match="64 hex digits"):
        download(server.url() + "#sha256=abc")
    with pytest.raises(DownloadError, match="8 to 64 hex digits, got 'abc'"):
        download(server.url(), sha256="abc")


def test_a_mistyped_hash_deletes_nothing(server: Server) -> None:
    # The mistake: the good copy in the cache was deleted, and many gigabytes fetched again.
    path = download(server.url() + f"#sha256={SHA}")
    with pytest.raises(DownloadError) as error:
        download(server.url() + f"#sha256={WRONG}")
    message = one_line(error)
    for part in (str(path), SHA, WRONG, "correct the hash", "--refresh"):
        assert part in message
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_file_that_another_process_fetched_is_checked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mistake: who waited for the lock took the file unchecked.
    class Waiting:
        def __init__(self, lock: str) -> None:
            self.target = Path(lock.removesuffix(".lock"))

        def __enter__(self) -> None:
            self.target.write_bytes(OTHER)

        def __exit__(self, *args: object) -> None:
            pass

    monkeypatch.setattr(module, "FileLock", Waiting)
    with pytest.raises(DownloadError, match=f"not the expected {SHA}"):
        download(server.url() + f"#sha256={SHA}")
    assert not server.requests


# --- refresh ---------------------------------------------------------------------------------


def test_refresh_replaces_the_copy(server: Server) -> None:
    path = download(server.url())
    server.content, server.etag = OTHER, '"two"'
    assert download(server.url()).read_bytes() == CONTENT
    assert download(server.url(), refresh=True) == path
    assert path.read_bytes() == OTHER
    assert cached() == [path.name]
    # Without a copy it is an ordinary download.
    assert download(server.url("/new.pkl"), refresh=True).read_bytes() == OTHER


@pytest.mark.parametrize("failure", ["hash", "status", "connection", "empty"])
def test_a_refresh_that_fails_keeps_the_copy(server: Server, failure: str) -> None:
    # The mistake: the old copy is gone before the new one is there.
    path = download(server.url())
    server.content = OTHER
    answers = {"status": Answer(404), "empty": Answer.whole(b"")}
    server.script = iter([answers[failure]] if failure in answers else [])
    server.drops = (0,) * 4 if failure == "connection" else ()
    with pytest.raises(DownloadError):
        download(server.url(), sha256=WRONG if failure == "hash" else None, refresh=True)
    assert path.read_bytes() == CONTENT
    assert path.name in cached()
    server.drops = ()
    assert download(server.url()).read_bytes() == CONTENT


def test_who_waited_for_a_refresh_does_not_repeat_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mistake: of eight processes with --refresh, each fetches the file again.
    path = download(server.url())

    class Waiting:
        def __init__(self, lock: str) -> None: ...

        def __enter__(self) -> None:
            other = path.with_name("new")
            other.write_bytes(OTHER)
            other.replace(path)

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(module, "FileLock", Waiting)
    assert download(server.url(), refresh=True).read_bytes() == OTHER
    assert len(server.requests) == 1


def test_locate_refreshes_what_is_fetched(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PRESETS, "served", Preset(server.url()))
    local = tmp_path / "mine.pkl"
    local.write_bytes(b"mine")
    for source in (server.url(), "served", "uncond:served"):
        server.content = CONTENT
        path = locate(source, refresh=True)
        server.content = OTHER
        assert locate(source).read_bytes() == CONTENT
        assert locate(source, refresh=True) == path
        assert path.read_bytes() == OTHER
    asked = len(server.requests)
    assert locate(str(local), refresh=True) == local
    assert locate("digits", refresh=True) == locate("digits")
    assert local.read_bytes() == b"mine"
    assert len(server.requests) == asked


def test_an_unusable_download_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # The mistake: the error named the URL alone, and every further run failed in the same way.
    monkeypatch.setitem(PRESETS, "served", Preset(server.url()))
    for source in (server.url(), "served", "uncond:served"):
        with pytest.raises(CheckpointError) as error:
            erk_guid.load(source)
        message = one_line(error)
        assert str(locate(server.url())) in message
        assert "--refresh fetches it again" in message
    # A file of the user's own is not fetched again by anything.
    with pytest.raises(CheckpointError) as error:
        erk_guid.load(locate(server.url()))
    assert "--refresh" not in str(error.value)


# --- transfers that break --------------------------------------------------------------------


def test_a_broken_transfer_is_continued(server: Server) -> None:
    server.drops = (2_000_000, 2_000_000)
    assert download(server.url()).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=2000000-", "bytes=4000000-"]


def test_two_versions_are_never_joined(server: Server) -> None:
    interrupt(server)
    server.etag, server.content = '"two"', b"x" * 5_000_000
    assert download(server.url()).read_bytes() == b"x" * 5_000_000


def content_range(start: int, total: int) -> str:
    return f"bytes {start}-{total - 1}/{total}"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Content_Range": content_range(0, len(CONTENT))}, id="start"),
        pytest.param({"Content_Range": content_range(2_000_000, 9_999_999)}, id="total"),
        pytest.param({"Content_Range": "bytes 2000000-5119999/*"}, id="no total"),
        pytest.param({}, id="no header"),
        pytest.param(
            {"Content_Range": content_range(2_000_000, len(CONTENT)), "ETag": '"two"'}, id="version"
        ),
    ],
)
def test_another_part_is_never_appended(server: Server, headers: dict[str, str]) -> None:
    # The mistake: whatever came with 206 was appended, and a file of the right length kept.
    interrupt(server)
    body = OTHER[2_000_000:]
    server.script = iter([Answer.whole(body, 206, **{"ETag": '"one"', **headers})])
    assert download(server.url()).read_bytes() == CONTENT
    assert server.ranges == ["bytes=2000000-", None]


def test_a_server_that_only_sends_wrong_parts_is_given_up(server: Server) -> None:
    # The mistake: each fresh start counts as progress, and the attempts never end.
    cut = Answer(200, CONTENT[:1000], {"Content-Length": "5000", "ETag": '"one"'})
    answers = itertools.cycle([cut, Answer.whole(b"abc", 206, ETag='"one"')])
    server.script = itertools.islice(answers, 50)
    with pytest.raises(DownloadError, match="cannot fetch"):
        download(server.url())
    assert len(server.requests) < 10


def test_a_weak_tag_continues_nothing(server: Server) -> None:
    # RFC 9110, 13.1.5: bytes may differ under one weak tag, so If-Range must not carry it.
    server.etag = 'W/"one"'
    server.drops = (2_000_000,)
    assert download(server.url()).read_bytes() == CONTENT
    assert server.ranges == [None, None]


@pytest.mark.parametrize(
    "tag", [b"\xff\xfe\x00", b'"a\x1b[31mb"', b'"a\r\nX-Evil: 1"', '"ä€"'.encode(), b""]
)
def test_a_damaged_record_of_a_partial_file_is_as_none(server: Server, tag: bytes) -> None:
    # The mistake: UnicodeDecodeError, or ValueError of http.client, as a traceback.
    interrupt(server)
    (record,) = cache_dir().glob("*.etag")
    record.write_bytes(tag)
    assert download(server.url()).read_bytes() == CONTENT
    assert server.ranges == [None]
    assert len(cached()) == 1


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


def test_a_chunked_answer_cut_short_is_asked_for_again(server: Server) -> None:
    # It has no length: only its end tells that it is whole.
    headers = {"Transfer-Encoding": "chunked"}
    for cut in (chunked(CONTENT[:1000], end=b""), chunked(end=b"ff\r\nabc")):
        server.script = iter([Answer(200, cut, headers), Answer(200, chunked(CONTENT), headers)])
        server.requests.clear()
        path = download(server.url(), refresh=True)
        assert path.read_bytes() == CONTENT
        assert len(server.requests) == 2
    server.script = iter([Answer(200, chunked(CONTENT[:1000], end=b""), headers)] * 4)
    with pytest.raises(DownloadError, match=r"cannot fetch .*IncompleteRead"):
        download(server.url("/never.pkl"))


# --- answers that are not the file -----------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(Answer.whole(b""), "empty file", id="empty"),
        pytest.param(
            Answer(200, chunked(), {"Transfer-Encoding": "chunked"}), "empty file", id="no chunk"
        ),
        pytest.param(Answer(204), "answered 204", id="204"),
        pytest.param(Answer.whole(b"accepted", 202), "answered 202", id="202"),
        pytest.param(
            Answer.whole(CONTENT, 206, Content_Range=content_range(0, len(CONTENT))),
            "answered 206",
            id="206 unasked",
        ),
        pytest.param(
            Answer.whole(gzip.compress(CONTENT, 1), Content_Encoding="gzip"),
            r"encoded \(gzip\)",
            id="gzip",
        ),
        pytest.param(Answer(200, CONTENT[:1000]), "add #sha256=", id="no length"),
        pytest.param(
            Answer(200, CONTENT[:1000], {"Content-Length": "many"}), "add #sha256=", id="bad length"
        ),
        pytest.param(
            Answer(302, b"", {"Location": "ftp://127.0.0.1:9/file.pkl"}),
            "redirects to ftp",
            id="ftp",
        ),
        pytest.param(
            Answer(302, b"", {"Location": "file:///etc/hosts"}), "not allowed", id="local file"
        ),
        pytest.param(Answer(302, b"", {"Location": "http://[::1"}), "Invalid IPv6", id="nowhere"),
        pytest.param(Answer(404, b"", {}), "answered 404", id="404"),
        pytest.param(Answer(416, b"", {}), "answered 416", id="416"),
    ],
)
def test_other_answers_do_not_enter_the_cache(server: Server, answer: Answer, message: str) -> None:
    # The mistake: all that comes with 2xx is kept, and each later run reads it from the cache.
    server.script = iter([answer])
    with pytest.raises(DownloadError, match=message) as error:
        download(server.url())
    assert server.url() in one_line(error)
    assert cached() == []
    assert len(server.requests) == 1
    assert download(server.url()).read_bytes() == CONTENT


def test_a_hash_makes_up_for_a_missing_length(server: Server) -> None:
    server.script = iter([Answer(200, CONTENT[:1000]), Answer(200, CONTENT)])
    with pytest.raises(DownloadError, match=f"not the expected {SHA}"):
        download(server.url(), sha256=SHA)
    assert cached() == []
    assert download(server.url(), sha256=SHA).read_bytes() == CONTENT


def test_a_redirect_on_the_web_is_followed(server: Server) -> None:
    server.script = iter([Answer(302, b"", {"Location": server.url("/elsewhere")})])
    assert download(server.url()).read_bytes() == CONTENT


@pytest.mark.parametrize("body", [b"", CONTENT[:1000]])
def test_a_server_that_stalls_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    stalling = Answer(200, body, {"Content-Length": str(len(CONTENT))}, stalls=True)
    server.script = iter([stalling] * 10)
    with pytest.raises(DownloadError, match=r"cannot fetch .*timed out") as error:
        download(server.url())
    one_line(error)
    assert len(server.requests) == module.ATTEMPTS


def test_pauses_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module, "PAUSE", 3.0)
    monkeypatch.setattr("erk_guid.models.checkpoints.download.time.sleep", pauses.append)
    server.script = iter([Answer(503)] * 3)
    assert download(server.url()).read_bytes() == CONTENT
    assert pauses == [6.0, 12.0, 24.0]


def test_errors_say_what_happened(server: Server) -> None:
    with pytest.raises(DownloadError, match="answered 404"):
        download(server.url("/missing.pkl"))
    with pytest.raises(DownloadError, match="is a web page"):
        download(server.url("/page.pkl"))
    server.script = iter([Answer(503)] * 4)
    with pytest.raises(DownloadError, match="answered 503"):
        download(server.url())
    closed = server.url().replace(str(server.server_address[1]), "9")
    with pytest.raises(DownloadError, match="give the file's path instead"):
        download(closed)


# --- addresses and folders -------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://[::1/file.pkl",
        "http:///file.pkl",
        "http://",
        "http://127.0.0.1:99999/file.pkl",
        "http://127.0.0.1:port/file.pkl",
        "http://127.0.0.1:9/a b.pkl",
        "http://127.0.0.1:9/a\nb.pkl",
        "http://127.0.0.1:9/\udcff.pkl",
        "http://127.0.0.1:9/ä.pkl",
        "http://a..b/file.pkl",
        f"http://{'a' * 70}.org/file.pkl",
        "http://user:word@127.0.0.1:9/file.pkl",
        "http://[::1#sha256=1",
    ],
)
def test_addresses_that_are_none(server: Server, url: str) -> None:
    # The mistake: ValueError, UnicodeError or OverflowError as a traceback.
    with pytest.raises(DownloadError) as error:
        download(url)
    one_line(error)
    assert not cached()


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/file.pkl?download=1", "-file.pkl"),
        ("/a%00b.pkl", "-a_b.pkl"),
        ("/a%1b[31m.pkl", "-a_[31m.pkl"),
        ("/%2e%2e", "-download"),
        ("/..", "-download"),
        ("/", "-download"),
        ("/folder/..%2f..%2fa.pkl", "-a.pkl"),
        ("/a%5C..%5Cb.pkl", "-a_.._b.pkl"),
        ("/%C3%A4%FF.pkl", "-__.pkl"),
        (f"/{'a' * 400}.safetensors", "aaa.safetensors"),
        (f"/{'%C3%A4' * 400}.pkl", "___.pkl"),
        (f"/a.{'b' * 400}", "bbb"),
    ],
)
def test_odd_names_become_sane_ones(server: Server, path: str, ending: str) -> None:
    # The mistake: "embedded null byte" or "File name too long", or a file outside the cache.
    found = download(server.url(path))
    assert found.read_bytes() == CONTENT
    assert found.parent == cache_dir()
    assert found.name.endswith(ending)
    assert cached() == [found.name]
    # 255 bytes is the limit of most file systems; the lock and the partial have longer names.
    assert len(os.fsencode(found.name)) < 200
    assert download(server.url(path)) == found


def test_long_names_stay_apart(server: Server) -> None:
    # The mistake: two files in the place of one because their names begin alike.
    first, second = (download(server.url(f"/{'a' * 400}{end}.pkl")) for end in "bc")
    assert first != second


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
    # The mistake: pathlib's RuntimeError as a traceback.
    monkeypatch.setenv("ERK_GUID_CACHE", "~nosuchuser/cache")
    with pytest.raises(ErkGuidError, match="ERK_GUID_CACHE=~nosuchuser") as error:
        cache_dir()
    one_line(error)


def test_a_network_from_a_url(server: Server) -> None:
    server.content = (DATA / "edm2_cond.pkl").read_bytes()
    assert erk_guid.load(server.url()).net.label_dim == 5


def test_nvidias_terms_are_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(module.LICENSES) == {"nvlabs-fi-cdn.nvidia.com"}
    monkeypatch.setattr(module, "LICENSES", {"127.0.0.1": "weights by somebody"})
    download(server.url())
    assert "weights by somebody" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [False, True])
def test_eight_processes_at_once(server: Server, refresh: bool) -> None:
    # With refresh, one copy lies there before: it must be whole for all who read meanwhile.
    if refresh:
        server.content = OTHER
        download(server.url())
        server.content = CONTENT
    server.requests.clear()
    name = "erk_guid.models.checkpoints.download"
    call = f"download({server.url()!r}, refresh={refresh})"
    code = f"from {name} import download; print({call})"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in started}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == CONTENT
    # A process that comes when the file is there already refreshes it again.
    assert 1 <= len(server.requests) <= (8 if refresh else 1)
