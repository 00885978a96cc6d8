"""What may be read where: every read policy with every combination of the four switches."""

from __future__ import annotations

import itertools

import pytest
from loader_hosts import HostFactory, image

from snaploader import FailedPrecondition, InvalidArgument, NotFound, ReadPolicy, ReadSources, SnapshotLoader
from snaploader.loader.results import ManifestSource
from snaploader.testing import EmbeddedServer

HERE, THERE = image(1), image(2)


def is_contradiction(switches: dict[str, bool]) -> bool:
    return not any(switches[f"{place}_manifests"] for place in ("local", "remote")) or not any(
        switches[f"{place}_chunks"] for place in ("local", "remote")
    )


_ALL = [
    dict(zip(("local_manifests", "remote_manifests", "local_chunks", "remote_chunks"), on, strict=True))
    for on in itertools.product((True, False), repeat=4)
]

COMBINATIONS = [switches for switches in _ALL if not is_contradiction(switches)]
CONTRADICTIONS = [switches for switches in _ALL if is_contradiction(switches)]

ORDER = {
    "newest": ["remote", "local"],
    "local-first": ["local", "remote"],
    "local-only": ["local"],
    "remote-only": ["remote"],
}


@pytest.mark.parametrize("switches", CONTRADICTIONS, ids=str)
def test_sources_that_leave_nothing_to_read_are_refused(switches: dict[str, bool]) -> None:
    with pytest.raises(InvalidArgument, match="could be read"):
        ReadSources(**switches)


@pytest.mark.parametrize("policy", ORDER)
@pytest.mark.parametrize(
    "switches",
    COMBINATIONS,
    ids=lambda on: str([*on.values()]),
)
def test_each_policy_reads_what_is_on_in_its_order(
    make_host: HostFactory, server: EmbeddedServer, policy: str, switches: dict[str, bool]
) -> None:
    # What is here is only here, and what is there only there: manifests and chunks.
    a, b = make_host("a", server), make_host("b", server)
    a.save(THERE)
    b.save(HERE, remote=False)
    key_set = b.keys()
    sources = ReadSources(**switches)
    order = [place for place in ORDER[policy] if switches[f"{place}_manifests"]]
    served = next((place for place in order if switches[f"{place}_chunks"]), None)
    before = b.blobs()
    if served is None:
        with pytest.raises(NotFound if order else FailedPrecondition):
            b.loader.get_snapshot(key_set, policy, sources=sources)
    else:
        snapshot = b.loader.get_snapshot(key_set, policy, sources=sources)
        assert snapshot.source is ManifestSource(served)
        assert b.read(snapshot) == (HERE if served == "local" else THERE)
    if not switches["local_chunks"]:
        assert b.blobs() == before
    is_kept = served == "remote" and policy == "local-first" and switches["local_manifests"]
    kept = b.loader.manifests.read_local(key_set.branch_key)
    ours = a.loader.manifests.read_local(key_set.branch_key)
    assert (kept.chunked_files == ours.chunked_files) is is_kept


def test_remote_only_reads_blobs_here_and_keeps_no_manifest(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(HERE)
    key_set = host.keys()
    before = server.sent_bytes("Read") + server.sent_bytes("BatchReadBlobs")
    snapshot = host.loader.get_snapshot(key_set, ReadPolicy.REMOTE_ONLY)
    assert snapshot.source is ManifestSource.REMOTE
    assert host.read(snapshot) == HERE
    assert server.sent_bytes("Read") + server.sent_bytes("BatchReadBlobs") == before


def test_what_is_read_past_the_file_cache_is_not_kept_there(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    plain = a.folder / "plain"
    plain.write_bytes(b"plain" * 1000)
    tree = a.folder / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(b"small")
    (tree / "big").write_bytes(THERE)
    a.save(THERE, files={"plain": plain}, directories={"tree": tree})
    snapshot = b.loader.get_snapshot(b.keys(), "newest", sources=ReadSources(local_chunks=False))
    with b.unpack(snapshot) as unpacked:
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == THERE
        assert unpacked.files["plain"].read_bytes() == plain.read_bytes()
        assert (unpacked.directories["tree"] / "big").read_bytes() == THERE
    restored = b.loader.restore_snapshot(snapshot, b.folder / "restored")
    assert restored.files["disk"].read_bytes() == THERE
    with b.loader.read_snapshot(snapshot) as reader:
        parts = [("disk", 0, len(THERE)), ("plain", 5, 5), ("tree/small", 0, 5)]
        assert reader.read_ranges(parts) == [THERE, b"plain", b"small"]
    assert b.blobs() == []


def test_a_snapshot_of_an_id_is_read_where_it_may_be(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(HERE, snapshot_id="one", remote=False)
    assert host.read(host.loader.get_snapshot_by_id("one")) == HERE
    with pytest.raises(NotFound, match="no remote manifest"):
        host.loader.get_snapshot_by_id("one", sources=ReadSources(local_manifests=False))
    with pytest.raises(NotFound, match="incomplete: the snapshot has lost content"):
        host.loader.get_snapshot_by_id("one", sources=ReadSources(local_chunks=False))


def test_a_loader_bounds_what_its_calls_may_read(make_host: HostFactory, server: EmbeddedServer) -> None:
    a = make_host("a", server)
    b = make_host("b", server, read_sources=ReadSources(remote_manifests=False, remote_chunks=False))
    a.save(THERE)
    key_set = b.keys()
    before = server.total_calls()
    with pytest.raises(NotFound, match="no local manifest"):
        b.loader.get_snapshot(key_set, "newest", sources=ReadSources(local_manifests=True))
    with pytest.raises(FailedPrecondition, match="the loader leave"):
        b.loader.get_snapshot(key_set, "remote-only")
    with pytest.raises(FailedPrecondition, match="the loader leave"):
        b.loader.get_snapshot(key_set, sources=ReadSources(local_chunks=False))
    assert server.total_calls() == before


def test_without_a_remote_cache_nothing_is_read_remotely(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(HERE)
    with pytest.raises(FailedPrecondition, match="no manifests could be read"):
        host.loader.get_snapshot(host.keys(), "remote-only")
    with pytest.raises(FailedPrecondition, match="no chunks could be read"):
        host.loader.get_snapshot(host.keys(), sources=ReadSources(local_chunks=False))
    with pytest.raises(FailedPrecondition):
        SnapshotLoader(host.cache, read_sources=ReadSources(local_chunks=False))
