"""Fetching files once into a cache: resumed, verified, safe with many processes."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from erk_guid.common.errors import ErkGuidError
from erk_guid.common.files import PARTIAL, sha256_of

CACHE_VARIABLE = "ERK_GUID_CACHE"
ATTEMPTS = 4
CHUNK = 1 << 20

LICENSES = {
    "nvlabs-fi-cdn.nvidia.com": "weights by NVIDIA, licensed CC BY-NC-SA 4.0 (non-commercial use)",
}
"""Hosts whose files have license terms that the user must be told."""


class DownloadError(ErkGuidError):
    """A file that could not be fetched, or is not the one that was asked for."""


def cache_dir() -> Path:
    """Return $ERK_GUID_CACHE, else $XDG_CACHE_HOME/erk_guid, else ~/.cache/erk_guid."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "erk_guid"


def is_url(source: str) -> bool:
    """Return whether `source` is a web address rather than a path."""
    return source.startswith(("http://", "https://"))


def download(url: str, *, sha256: str | None = None, cache: Path | None = None) -> Path:
    """Return the local copy of `url`, fetched if it is not in the cache.

    Args:
        url: http or https. A fragment ``#sha256=<hex>`` gives the expected hash.
        sha256: the same, as an argument.
        cache: folder of the copies; by default `cache_dir`.

    An interrupted transfer is continued if the server still has the same file. Any number of
    processes may ask at once: one fetches, the others wait for it.

    Raises:
        DownloadError: it cannot be fetched, or has another SHA-256; the message says what to do.
    """
    url, _, fragment = url.partition("#")
    stated = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and stated is None:
        raise DownloadError(f"{url}: the part after # must be sha256=<64 hex digits>: {fragment!r}")
    sha256 = (sha256 or (stated[1] if stated else "")).lower()

    folder = cache or cache_dir()
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "download"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if target.exists():  # before anything is written: the cache may be shared and read-only
        _verify(target, url, sha256)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _announce(url, target)
                partial = target.with_name(target.name + PARTIAL)
                _fetch(url, partial)
                _verify(partial, url, sha256)
                os.replace(partial, target)
    except OSError as error:
        raise DownloadError(
            f"cannot write to the cache {folder}: {error} (set {CACHE_VARIABLE})"
        ) from error
    return target


def _announce(url: str, target: Path) -> None:
    print(f"Downloading {url} to {target}", file=sys.stderr)
    terms = LICENSES.get(urllib.parse.urlsplit(url).hostname or "")
    if terms:
        print(f"  {terms}", file=sys.stderr)


def _verify(path: Path, url: str, sha256: str) -> None:
    if not sha256:
        return
    have = sha256_of(path)
    if have != sha256:
        path.unlink()
        raise DownloadError(
            f"{url} has SHA-256 {have}, not the expected {sha256}; the copy was deleted, so try "
            "again, and distrust the source if it repeats"
        )


class _InterruptedError(Exception):
    """A transfer that stopped early; what arrived is kept."""


def _fetch(url: str, partial: Path) -> None:
    """Fetch into `partial`, continuing what is there; retry when the connection breaks."""
    attempt, arrived = 0, 0
    while True:
        size = partial.stat().st_size if partial.exists() else 0
        # Attempts count from 1 again whenever something arrived.
        attempt, arrived = (1 if size > arrived else attempt + 1), size
        try:
            _transfer(url, partial)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise DownloadError(
                    f"{url}: the server answered {error.code} {error.reason}"
                ) from error
        except (
            urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
            ssl.SSLError, _InterruptedError,
        ) as error:  # fmt: skip
            if attempt == ATTEMPTS:
                reason = getattr(error, "reason", error)
                raise DownloadError(
                    f"cannot fetch {url} ({reason}). Without a connection, fetch it elsewhere and "
                    "give the file's path instead"
                ) from error
        time.sleep(0.5 * 2**attempt)


def _transfer(url: str, partial: Path) -> None:
    # A partial file is continued only under the validator it began with, so that two versions
    # of a file are never joined.
    tag_file = partial.with_name(partial.name + ".etag")
    tag = tag_file.read_text() if partial.exists() and tag_file.exists() else ""
    have = partial.stat().st_size if tag else 0
    request = urllib.request.Request(url, headers={"User-Agent": "erk_guid"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than the real one: start again
            partial.unlink(missing_ok=True)
            raise _InterruptedError("range refused") from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(f"{url} is a web page, not a file; give the file's own address")
        length = response.headers.get("Content-Length")
        if response.status != 206:
            have = 0
        total = have + int(length) if length and length.isdigit() else None
        tag_file.write_text(
            response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        )
        with (
            open(partial, "ab" if have else "wb") as file,
            tqdm(
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                desc=partial.name.split("-", 1)[-1],
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size != total:
        raise _InterruptedError(f"{size} of {total} bytes arrived")
    tag_file.unlink(missing_ok=True)
