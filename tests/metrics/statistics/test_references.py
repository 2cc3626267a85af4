"""Reference statistics that are downloaded, from a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.file_server import Server, serving

from erk_guid.metrics.statistics import references
from erk_guid.metrics.statistics.references import (
    ReferenceFileError,
    locate_reference,
    read_reference,
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(monkeypatch, tmp_path / "cache") as running:
        # The published ones come from here, too; and no dataset-refs/ is beside.
        monkeypatch.setattr(references, "EDM2_URL", running.url("/{}.pkl"))
        monkeypatch.chdir(tmp_path)
        yield running


def test_references_are_refreshed(server: Server, tmp_path: Path) -> None:
    for source in (server.url("/mine.npz"), "img64"):
        server.content = b"old"
        path = locate_reference(source)
        server.content = b"new"
        assert locate_reference(source).read_bytes() == b"old"
        assert locate_reference(source, refresh=True) == path
        assert path.read_bytes() == b"new"
    # What lies here is not fetched.
    asked = len(server.requests)
    (tmp_path / "dataset-refs").mkdir()
    (tmp_path / "dataset-refs" / "img64.pkl").write_bytes(b"beside")
    assert locate_reference("img64", refresh=True).read_bytes() == b"beside"
    assert locate_reference("digits", refresh=True) == locate_reference("digits")
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"damaged", "pickle"),
        (b"PK\x03\x04damaged", "damaged"),
        (b"\x80\x03}q\x00.", "no metrics"),
        (b"\x80\x03cos\nsystem\nq\x00.", "A reference is a dict of arrays"),
    ],
)
def test_an_unusable_download_is_named(server: Server, content: bytes, reason: str) -> None:
    # The mistake: the error named the URL alone, and every further run failed in the same way.
    server.content = content
    for source in (server.url("/mine.npz"), "img64"):
        with pytest.raises(ReferenceFileError, match=reason) as error:
            read_reference(source)
        message = str(error.value)
        path = locate_reference(source)
        assert f"{path}; --refresh fetches it again" in message
        assert message.isprintable()
        # A file of the user's own is not fetched again by anything.
        with pytest.raises(ReferenceFileError, match=reason) as error:
            read_reference(path)
        assert "--refresh" not in str(error.value)


@pytest.mark.parametrize("count", [-1, -(2**40)])
def test_a_count_below_0_is_refused(count: int, tmp_path: Path) -> None:
    # Catches: a reference of -1 images, which was scored.
    path = tmp_path / "r.npz"
    np.savez(path, **{
        "fid/mu": np.zeros(4), "fid/sigma": np.eye(4), "fid/count": np.array(count),
    })  # fmt: skip
    with pytest.raises(ReferenceFileError, match=f"its count is {count}, not a number of images"):
        read_reference(path)
