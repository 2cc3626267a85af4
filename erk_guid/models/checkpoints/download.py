"""Fetching files once into a cache: resumed, verified, safe with many processes."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock
from tqdm import tqdm

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.common.files import PARTIAL, sha256_of

CACHE_VARIABLE = "ERK_GUID_CACHE"
ATTEMPTS = 4
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
PAUSE = 0.5
"""Seconds before another attempt; doubled with each one."""
CHUNK = 1 << 20
NAME_LENGTH = 120
"""Longest name from a URL that is kept in full; file systems allow 255 bytes with all we add."""

LICENSES = {
    "nvlabs-fi-cdn.nvidia.com": "weights by NVIDIA, licensed CC BY-NC-SA 4.0 (non-commercial use)",
}
"""Hosts whose files have license terms that the user must be told."""


class DownloadError(ErkGuidError):
    """A file that could not be fetched, or is not the one that was asked for."""


def cache_dir() -> Path:
    """Return $ERK_GUID_CACHE, else $XDG_CACHE_HOME/erk_guid, else ~/.cache/erk_guid.

    Raises:
        DownloadError: it begins with the home of a user that has none here.
    """
    stated, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if stated:
            return Path(stated).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "erk_guid"
    except RuntimeError as error:
        raise DownloadError(
            f"no folder for downloads ({CACHE_VARIABLE}={printable(stated or '')}: {error}); set "
            f"{CACHE_VARIABLE} to a folder"
        ) from error


def is_url(source: str) -> bool:
    """Return whether `source` is a web address rather than a path."""
    return source.startswith(("http://", "https://"))


def how_to_refetch(path: Path) -> str:
    """Return what is added to an error about the downloaded file `path`."""
    return f" (the file is the download {path}; --refresh fetches it again)"


def download(
    url: str, *, sha256: str | None = None, cache: Path | None = None, refresh: bool = False
) -> Path:
    """Return the local copy of `url`, fetched if it is not in the cache.

    Args:
        url: http or https. A fragment ``#sha256=<64 hex digits>`` gives the expected hash.
        sha256: the same, as an argument; the first 8 digits or more will do.
        cache: folder of the copies; by default `cache_dir`.
        refresh: fetch it again. The copy in the cache is replaced when the new one is whole and
            has the expected hash, and else stays.

    An interrupted transfer is continued if the server still has the same file. Any number of
    processes may ask at once: one fetches, the others wait for it. A copy in the cache is never
    deleted.

    Raises:
        DownloadError: it cannot be fetched, or has another SHA-256; the message says what to do.
    """
    url, expected = _parsed(url, sha256)
    folder = cache or cache_dir()
    target = folder / _cached_name(url)
    try:
        before = _stamp(target)
        if before is None or refresh:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                # It has another stamp if another process fetched it meanwhile.
                if _stamp(target) == before:
                    _announce(url, target)
                    _renew(url, target, expected)
                    return target
        # Nothing was written up to here: the cache may be shared and read-only.
        _check_cached(target, url, expected)
    except OSError as error:
        raise DownloadError(
            f"cannot use the cache {folder}: {error} (set {CACHE_VARIABLE} to another folder)"
        ) from error
    return target


def _parsed(url: str, sha256: str | None) -> tuple[str, str]:
    """Return the address without its fragment, and the digits that its hash must begin with."""
    url, _, fragment = url.partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise DownloadError(f"{printable(url)} is no web address: {_reason(error)}") from error
    if not host or not url.isprintable() or " " in url:
        raise DownloadError(
            f"{printable(url)} is no web address: it has no host, or a space or a control "
            "character (write %20 for a space)"
        )
    stated = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and stated is None:
        raise DownloadError(f"{url}: the part after # must be sha256=<64 hex digits>: {fragment!r}")
    expected = (sha256 or (stated[1] if stated else "")).lower()
    if expected and not re.fullmatch("[0-9a-f]{8,64}", expected):
        raise DownloadError(f"{url}: sha256 must be 8 to 64 hex digits, got {sha256!r}")
    return url, expected


def _cached_name(url: str) -> str:
    """Return the name in the cache: digits of the URL's hash, and the URL's own name made safe."""
    last = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    name = re.sub(r'[^ -~]|[\\:*?"<>|]', "_", last.strip(". ")) or "download"
    if len(name) > NAME_LENGTH:
        suffix = PurePosixPath(name).suffix
        suffix = suffix if len(suffix) < 20 else ""
        name = name[: NAME_LENGTH - len(suffix)] + suffix
    return f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _announce(url: str, target: Path) -> None:
    print(f"Downloading {url} to {target}", file=sys.stderr)
    terms = LICENSES.get(urllib.parse.urlsplit(url).hostname or "")
    if terms:
        print(f"  {terms}", file=sys.stderr)


def _check_cached(path: Path, url: str, expected: str) -> None:
    have = sha256_of(path) if expected else ""
    if not have.startswith(expected):
        raise DownloadError(
            f"{path}, the cached copy of {url}, has SHA-256 {have}, not the expected {expected}; "
            "correct the hash, or fetch the file again with --refresh"
        )


def _renew(url: str, target: Path, expected: str) -> None:
    """Fetch `target`; put it in its place when it is whole and has the expected hash."""
    partial = target.with_name(target.name + PARTIAL)
    _fetch(url, partial, hashed=bool(expected))
    have = sha256_of(partial) if expected else ""
    if not have.startswith(expected):
        partial.unlink()
        raise DownloadError(
            f"{url} has SHA-256 {have}, not the expected {expected}; what was fetched is deleted. "
            "Correct the hash or try again, and distrust the source if it repeats"
        )
    os.replace(partial, target)


class _InterruptedError(Exception):
    """A transfer that stopped early; what arrived is kept."""


class _RestartError(_InterruptedError):
    """A transfer that cannot be continued; what had arrived is of no use."""


def _reason(error: Exception) -> str:
    """Return what an error says, in one line: servers have a say in it."""
    text = " ".join(str(getattr(error, "reason", error)).split())
    return printable(text or type(error).__name__)


def _fetch(url: str, partial: Path, *, hashed: bool) -> None:
    """Fetch into `partial`, continuing what is there; retry when the connection breaks.

    Args:
        hashed: a hash will tell whether the file is whole.
    """
    attempt, most = 0, 0
    while True:
        size = partial.stat().st_size if partial.exists() else 0
        # Attempts count from 1 again whenever more has arrived than ever before.
        attempt, most = (1 if size > most else attempt + 1), max(size, most)
        try:
            _transfer(url, partial, hashed)
            return
        except _InterruptedError as error:
            if isinstance(error, _RestartError):
                partial.unlink(missing_ok=True)
            if attempt >= ATTEMPTS:
                raise DownloadError(
                    f"cannot fetch {url} ({error}). Try again later, or fetch it elsewhere and "
                    "give the file's path instead"
                ) from error
        time.sleep(PAUSE * 2**attempt)


def _transfer(url: str, partial: Path, hashed: bool) -> None:
    begun = _Begun.read(partial)
    with _open(url, begun) as response:
        start, total = _expected(url, response, begun, hashed)
        with open(partial, "ab" if start else "wb") as file:
            if not start:
                _Begun.write(partial, response, total)
            _copy(response, file, start, total, partial.name.split("-", 1)[-1])
    size = partial.stat().st_size
    if total is not None and size != total:
        raise _InterruptedError(f"{size} of {total} bytes arrived")
    _tag_file(partial).unlink(missing_ok=True)
    if size == 0:
        partial.unlink()
        raise DownloadError(_empty(url))


def _tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


@dataclass(frozen=True)
class _Begun:
    """What an earlier attempt left: so many bytes, of a file with this validator and size.

    It is continued only under the validator that it began with, so that two versions of a file
    are never joined.
    """

    size: int
    validator: str
    total: int | None

    @classmethod
    def read(cls, partial: Path) -> _Begun | None:
        """Return what can be continued, or None."""
        try:
            size = partial.stat().st_size
            record = _tag_file(partial).read_bytes()
        except FileNotFoundError:
            return None
        # Anything else may not be sent in a header.
        match = re.fullmatch(rb"([ -~]+)(?:\n([0-9]{0,18}))?", record)
        if not size or match is None:
            return None
        return cls(size, match[1].decode(), int(match[2]) if match[2] else None)

    @staticmethod
    def write(partial: Path, response: http.client.HTTPResponse, total: int | None) -> None:
        """Record what `partial`, empty as yet, will be a part of."""
        text = f"{_validator(response)}\n{'' if total is None else total}"
        _tag_file(partial).write_bytes(text.encode())


def _validator(response: http.client.HTTPResponse) -> str:
    """Return what identifies the version of a file; weak tags do not (RFC 9110, 13.1.5)."""
    tag = response.headers.get("ETag", "")
    return str((not tag.startswith("W/") and tag) or response.headers.get("Last-Modified", ""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the web only; urllib's own goes to ftp, too."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise DownloadError(
                f"{req.full_url} redirects to {printable(newurl)}, which is no web address; give "
                "the file's own address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, begun: _Begun | None) -> http.client.HTTPResponse:
    """Ask for the file, or for what is missing of it."""
    headers = {"User-Agent": "erk_guid", "Accept-Encoding": "identity"}
    if begun is not None:
        headers |= {"Range": f"bytes={begun.size}-", "If-Range": begun.validator}
    opener = urllib.request.build_opener(_Redirects)
    try:
        response: http.client.HTTPResponse = opener.open(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
        return response
    except urllib.error.HTTPError as error:
        answer = f"the server answered {error.code} {_reason(error)}"
        if error.code == 416 and begun is not None:  # what is here is longer than the file
            raise _RestartError(answer) from error
        if error.code >= 500:
            raise _InterruptedError(answer) from error
        raise DownloadError(f"{url}: {answer}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(f"{url} cannot be asked for: {_reason(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_reason(error)) from error


def _expected(
    url: str, response: http.client.HTTPResponse, begun: _Begun | None, hashed: bool
) -> tuple[int, int | None]:
    """Return where an answer begins in the file, and how long the file is (None: not known).

    Raises:
        DownloadError: the answer is not the file, or its end could not be known.
        _RestartError: it is another part of the file, or of another file, than was asked for.
    """
    if response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{url} is a web page, not a file; give the file's own address")
    encoding = response.headers.get("Content-Encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise DownloadError(
            f"{url}: the server sends it encoded ({printable(encoding)}), which was not asked for; "
            "fetch it elsewhere and give the file's path instead"
        )
    if response.status == 206 and begun is not None:
        return begun.size, _total_of_range(response, begun)
    if response.status != 200:
        raise DownloadError(
            f"{url}: the server answered {response.status} {printable(response.reason)}, and 200 "
            "(OK) was expected; give the file's own address"
        )
    if response.length == 0:
        raise DownloadError(_empty(url))
    if response.length is None and not response.chunked and not hashed:
        raise DownloadError(
            f"{url}: the server does not say how long the file is, so nothing would tell whether "
            "all of it arrived; add #sha256=<64 hex digits> to the address"
        )
    return 0, response.length


def _total_of_range(response: http.client.HTTPResponse, begun: _Begun) -> int:
    stated = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", stated.strip())
    total = int(match[2]) if match else 0
    if match is None or int(match[1]) != begun.size or begun.total not in (None, total):
        raise _RestartError(f"the server sent another part than was asked for: {stated!r:.60}")
    if _validator(response) not in ("", begun.validator):
        raise _RestartError("the server sent a part of another version of the file")
    return total


def _empty(url: str) -> str:
    return f"{url}: the server sent an empty file; give the file's own address"


def _copy(
    response: http.client.HTTPResponse, file: IO[bytes], start: int, total: int | None, name: str
) -> None:
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name)
    with bar:
        for chunk in _chunks(response):
            file.write(chunk)
            bar.update(len(chunk))


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    # What fails in here is the connection. What fails around it is the disk.
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_reason(error)) from error
