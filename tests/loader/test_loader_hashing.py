"""What a snapshot costs in hashing: every byte is hashed once on each host that it passes."""

from __future__ import annotations

import pytest
from hashing import count_hashed_bytes
from loader_hosts import HostFactory, image

from snaploader.testing import EmbeddedServer

OTHERS = 100 * 1024
"""More than what manifest and trees have, and whatever else is hashed."""


def test_a_save_with_a_server_hashes_every_byte_once(
    server: EmbeddedServer, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    content = image(1, chunks=500)
    plain = host.folder / "plain"
    plain.write_bytes(image(2, chunks=1500))
    size = len(content) + plain.stat().st_size
    hashed = count_hashed_bytes(monkeypatch)
    assert host.save(content, files={"plain": plain}).saved_remotely
    del hashed["testing"], hashed["tests"]
    assert 0.9 * size < sum(hashed.values()) < size + OTHERS, hashed


def test_a_restore_hashes_every_byte_once(
    server: EmbeddedServer, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, other = image(1, chunks=500), image(2, chunks=1500)
    first = make_host("a", server)
    plain = first.folder / "plain"
    plain.write_bytes(other)
    first.save(content, files={"plain": plain})
    host = make_host("b", server)
    hashed = count_hashed_bytes(monkeypatch)
    host.loader.restore_snapshot(host.find(), host.folder / "out")
    assert (host.folder / "out" / "disk").read_bytes() == content
    assert (host.folder / "out" / "plain").read_bytes() == other
    del hashed["testing"], hashed["tests"]
    size = len(content) + len(other)
    assert 0.9 * size < sum(hashed.values()) < size + OTHERS, hashed
