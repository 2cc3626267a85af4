"""Weights of detectors that are downloaded, from a server on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.file_server import CONTENT, Server, serving

from erk_guid.metrics.detectors.base import DetectorError
from erk_guid.metrics.detectors.weights import check_weights, fetch_weights

DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with serving(monkeypatch, tmp_path / "cache") as running:
        yield running


def test_digits_in_the_name_are_checked(server: Server, tmp_path: Path) -> None:
    assert fetch_weights("fid", server.url(f"/net-{DIGITS}.pth")).read_bytes() == CONTENT
    assert fetch_weights("fid", server.url("/net_pretrain.pth")).read_bytes() == CONTENT
    url = server.url("/net-01234567.pth")
    with pytest.raises(DetectorError, match="not the expected 01234567") as error:
        fetch_weights("fid", url)
    # What is another file was never in the cache, not even for a moment.
    assert not [p for p in (tmp_path / "cache").glob("*01234567*") if p.suffix != ".lock"]
    assert str(tmp_path / "torch" / "hub" / "checkpoints" / "net-01234567.pth") in str(error.value)
    assert str(error.value).isprintable()


def test_what_is_cached_is_never_deleted(server: Server) -> None:
    # The mistake: fetch_weights deleted what lay in the cache.
    url = server.url(f"/net-{DIGITS}.pth")
    path = fetch_weights("fid", url)
    path.write_bytes(b"damaged on the disk")
    with pytest.raises(DetectorError) as error:
        fetch_weights("fid", url)
    message = str(error.value)
    assert str(path) in message
    assert "--refresh" in message
    assert path.read_bytes() == b"damaged on the disk"
    assert fetch_weights("fid", url, refresh=True).read_bytes() == CONTENT


def test_what_torch_hub_has_is_used_as_it_is(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "torch" / "hub" / "checkpoints" / "net.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert fetch_weights("fid", server.url("/net.pth"), refresh=True) == path
    assert not server.requests


def test_unusable_weights_are_named(server: Server) -> None:
    path = fetch_weights("fid", server.url("/net.pth"))
    with pytest.raises(DetectorError, match="delete it and it is fetched again") as error:
        check_weights("fid", path)
    assert str(path) in str(error.value)
