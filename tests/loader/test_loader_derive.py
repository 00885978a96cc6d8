"""Deriving: a snapshot of its own, of all or some of another one, without touching content."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CONFIGURATION, Host, HostFactory, image, metadata

from snaploader import FileCache, SnapshotLoader, VMMetadata, keys
from snaploader.digest import DigestFunction
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
    Unavailable,
)
from snaploader.formats.manifest import pack_any
from snaploader.keys import SnapshotKey
from snaploader.loader import Progress
from snaploader.loader.results import PassedOver, Snapshot
from snaploader.remote import RetryPolicy, Timeouts
from snaploader.testing import EmbeddedServer, Fault, FaultScript

ORIGIN, ID = "workspaces/ws-1/paused", "workspaces/ws-2/forked"
PLAIN = bytes(range(1, 252)) * 12_000
"""Too big for a batch, so that it is streamed."""


def save(host: Host, content: bytes = image(1), **kwargs: Any) -> Snapshot:
    """A snapshot with a chunked file, a plain file and a directory, that only its id names."""
    folder = host.folder / "volume"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "small").write_bytes(b"small" * 30)
    (folder / "big").write_bytes(image(99, 6, ()))
    (host.folder / "plain").write_bytes(PLAIN)
    host.save(
        content,
        key=SnapshotKey(),
        files={"plain": host.folder / "plain"},
        directories={"volume.data": folder},
        snapshot_id=ORIGIN,
        vm_metadata=metadata(1000),
        **{"remote": False} | kwargs,
    )
    return host.loader.get_snapshot_by_id(ORIGIN)


def found(host: Host, policy: str = "local-first", snapshot_id: str = ID) -> Snapshot:
    return host.loader.get_snapshot_by_id(snapshot_id, read_policy=policy)


def assert_whole(host: Host, snapshot: Snapshot, content: bytes = image(1)) -> None:
    """All of `save` comes out."""
    result = host.loader.restore_snapshot(snapshot, host.folder / f"restored-{snapshot.key.snapshot_id[-6:]}")
    root = result.files["disk"].parent
    assert result.files["disk"].read_bytes() == content
    assert (root / "plain").read_bytes() == PLAIN
    assert (root / "volume.data/sub/small").read_bytes() == b"small" * 30
    assert (root / "volume.data/big").read_bytes() == image(99, 6, ())


def assert_nothing(host: Host, server: EmbeddedServer, make_host: HostFactory) -> None:
    """The derived snapshot is to be seen nowhere."""
    for one in (host, make_host("fresh", server)):
        with pytest.raises(NotFound):
            found(one)


def test_a_derived_snapshot_is_whole_and_costs_no_blob(make_host: HostFactory) -> None:
    host = make_host("a")
    origin = save(host)
    before = host.blobs()
    result = host.loader.derive_snapshot(origin, snapshot_id=ID)
    assert host.blobs() == before
    assert (result.snapshot_id, result.key) == (ID, SnapshotKey(snapshot_id=ID))
    assert (result.saved_locally, result.saved_remotely, result.warnings) == (True, False, ())
    assert found(host).manifest == result.snapshot.manifest
    assert replace(result.snapshot.manifest, vm_metadata=origin.manifest.vm_metadata) == origin.manifest
    assert_whole(host, found(host))
    assert host.read(result.snapshot) == image(1)


def test_a_derived_snapshot_says_that_it_is_itself_and_where_the_state_came_from(
    make_host: HostFactory,
) -> None:
    host = make_host("a")
    origin = save(host)
    old = origin.metadata
    assert old is not None
    passed = PassedOver(origin.key, origin.source, old, "it is older")
    derived = host.loader.derive_snapshot(replace(origin, passed_over=(passed,)), snapshot_id=ID).snapshot
    assert derived.passed_over == ()
    own = found(host).metadata
    assert own is not None
    assert (own.snapshot_id, own.key) == (ID, SnapshotKey(snapshot_id=ID))
    assert own.created != old.created
    assert own.completed == old.completed == datetime.fromtimestamp(1000, UTC)
    given = host.loader.derive_snapshot(origin, vm_metadata=VMMetadata(vm_id="vm-2")).snapshot
    assert given.metadata is not None
    assert (given.metadata.vm_id, given.metadata.snapshot_id) == ("vm-2", given.key.snapshot_id)
    foreign = host.loader.derive_snapshot(origin, vm_metadata=CONFIGURATION).snapshot
    assert (foreign.metadata, foreign.manifest.vm_metadata) == (None, pack_any(CONFIGURATION))


def test_a_derived_snapshot_outlives_its_origin(make_host: HostFactory) -> None:
    host = make_host("a")
    host.loader.derive_snapshot(save(host), snapshot_id=ID)
    host.loader.delete_snapshot(ORIGIN)
    assert_whole(host, found(host))


def test_a_part_is_derived(make_host: HostFactory) -> None:
    host = make_host("a")
    origin = save(host)
    result = host.loader.derive_snapshot(origin, names=["volume.data"], vm_metadata=metadata(2000))
    part = found(host, snapshot_id=result.snapshot_id)
    assert part.manifest.names == ["volume.data"]
    assert (part.tables, list(part.directories)) == ({}, ["volume.data"])
    assert part.manifest.vm_configuration == origin.manifest.vm_configuration
    assert part.manifest.vm_metadata != origin.manifest.vm_metadata
    assert set(part.digests()) < set(origin.digests())
    chunked = host.loader.derive_snapshot(origin, names={"disk", "plain"}).snapshot
    assert chunked.manifest.names == ["plain", "disk"]
    assert host.read(chunked) == image(1)
    assert len({origin.key.snapshot_id, result.snapshot_id, chunked.key.snapshot_id}) == 3


def test_digests_of_a_snapshot_are_all_its_blobs(make_host: HostFactory) -> None:
    host = make_host("a")
    digests = set(save(host).digests())
    assert len(digests) == len(host.blobs())
    assert not host.cache.find_missing(digests)


def test_what_cannot_be_derived_is_refused(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a")
    origin = save(host)
    derive = host.loader.derive_snapshot
    with pytest.raises(NotFound, match="'absent' is not in the snapshot"):
        derive(origin, names=["disk", "absent"], snapshot_id=ID)
    for arguments in ({"names": []}, {"names": "disk"}, {"remote": True}, {"pin": ".x"}):
        with pytest.raises(InvalidArgument):
            derive(origin, snapshot_id=ID, **arguments)
    with pytest.raises(InvalidArgument, match="pin name"):
        make_host("a", server).loader.derive_snapshot(origin, pin="a/b")
    assert server.action_results() == {}
    with pytest.raises(TypeError):
        derive(origin, snapshot_id=ID, vm_metadata="text")
    with pytest.raises(FailedPrecondition, match="read-only"):
        make_host("a", readonly=True).loader.derive_snapshot(origin, snapshot_id=ID)
    with pytest.raises(NotFound):
        found(host)
    assert host.cache.pins() == []


def test_an_id_that_is_taken_is_refused(make_host: HostFactory, server: EmbeddedServer) -> None:
    host, other = make_host("a", server), make_host("b", server)
    origin = save(host)
    with pytest.raises(FailedPrecondition, match="taken"):
        host.loader.derive_snapshot(origin, snapshot_id=ORIGIN)
    other.save(image(5), snapshot_id=ID)
    with pytest.raises(FailedPrecondition, match="taken"):
        host.loader.derive_snapshot(origin, snapshot_id=ID)
    other.loader.delete_snapshot(ID)
    with pytest.raises(FailedPrecondition, match="taken"):
        host.loader.derive_snapshot(origin, snapshot_id=ID)


def test_a_pin_keeps_the_derived_snapshot_and_nothing_else(make_host: HostFactory) -> None:
    host = make_host("a")
    origin = save(host)
    host.cache.pin("p", origin.digests())
    derived = host.loader.derive_snapshot(origin, snapshot_id=ID, names=["volume.data"], pin="p").snapshot
    pin = host.cache.pinned("p")
    assert {row.tobytes().hex() for row in pin.hashes} == {digest.hash for digest in derived.digests()}
    assert pin.sizes_bytes.sum() == sum(digest.size_bytes for digest in set(derived.digests()))
    assert pin.refs == (keys.local_manifest_key("", SnapshotKey(snapshot_id=ID)),)
    host.cache.prune()
    assert len(host.blobs()) == len(set(derived.digests()))
    host.loader.restore_directory(found(host), "volume.data", host.folder / "out")
    assert (host.folder / "out/big").read_bytes() == image(99, 6, ())


@pytest.mark.parametrize("had_pin", [True, False])
def test_a_failure_leaves_the_pin_as_it_was(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch, had_pin: bool
) -> None:
    host = make_host("a")
    origin = save(host)
    rows = origin.tables["disk"].hashes[:2]
    if had_pin:
        host.cache.pin("p", list(origin.manifest.digests()), hashes=[rows], refs=["a" * 64])
        before = host.cache.pinned("p")

    def full(*_: object, **__: object) -> bool:
        raise ResourceExhausted("full")

    monkeypatch.setattr(FileCache, "put_ref", full)
    with pytest.raises(ResourceExhausted):
        host.loader.derive_snapshot(origin, snapshot_id=ID, pin="p")
    if not had_pin:
        assert host.cache.pins() == []
        return
    after = host.cache.pinned("p")
    assert (after.hashes.tolist(), after.sizes_bytes.tolist()) == (
        before.hashes.tolist(),
        before.sizes_bytes.tolist(),
    )
    assert after.refs == before.refs


def test_a_local_snapshot_is_committed_to_the_server(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    origin = save(host)
    assert server.action_results() == {}
    told: list[Progress] = []
    result = host.loader.derive_snapshot(origin, snapshot_id=ID, progress=told.append)
    digests = set(origin.digests())
    assert result.saved_remotely
    assert result.saved_locally
    # And the directory in the directory, which some servers want to have by itself.
    assert result.uploaded_blobs == len(digests) + 1
    assert 0 < result.uploaded_bytes - sum(digest.size_bytes for digest in digests) < 1000
    assert told[-1].done_bytes == told[-1].total_bytes
    other = make_host("b", server)
    assert_whole(other, found(other))
    again = host.loader.derive_snapshot(origin)
    assert (again.uploaded_blobs, again.saved_remotely) == (0, True)


def test_a_local_snapshot_is_uploaded_under_its_own_id(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    origin = save(host)
    before = host.blobs()
    result = host.loader.upload_snapshot(origin)
    assert (result.snapshot_id, result.saved_remotely, host.blobs()) == (ORIGIN, True, before)
    assert result.uploaded_bytes > 0
    assert_whole(make_host("b", server), found(make_host("b", server), snapshot_id=ORIGIN))
    with pytest.raises(FailedPrecondition, match="taken"):
        host.loader.upload_snapshot(origin)


def test_what_cannot_be_uploaded_is_refused(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a")
    origin = save(host)
    with pytest.raises(InvalidArgument, match="no remote cache"):
        host.loader.upload_snapshot(origin)
    for options in ({"readonly": True}, {"remote_readonly": True}):
        with pytest.raises(FailedPrecondition, match="only"):
            make_host("a", server, **options).loader.upload_snapshot(origin)
    with pytest.raises(InvalidArgument, match="by its id"):
        make_host("a", server).loader.upload_snapshot(replace(origin, key=SnapshotKey()))
    assert server.action_results() == {}


def test_a_failed_upload_of_a_snapshot_leaves_it_here_alone(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RetryPolicy(attempts=1))
        origin = save(host)
        faults.add(Fault("BatchUpdateBlobs", status="UNAVAILABLE", times=None))
        with pytest.raises(Unavailable):
            host.loader.upload_snapshot(origin)
        assert server.action_results() == {}
        assert_whole(host, found(host, snapshot_id=ORIGIN))
        faults.clear()
        assert host.loader.upload_snapshot(origin).saved_remotely


def test_a_lazy_snapshot_is_derived_without_downloading(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    save(make_host("a", server), remote=True)
    host = make_host("b", server)
    origin = found(host, snapshot_id=ORIGIN)
    reads = [server.calls(method) for method in ("BatchReadBlobs", "Read")]
    for remote in (True, False):
        result = host.loader.derive_snapshot(origin, remote=remote, pin=f"pin-{remote}")
        assert result.uploaded_blobs == 0
        assert result.snapshot.absent == origin.absent
    assert [server.calls(method) for method in ("BatchReadBlobs", "Read")] == reads
    assert_whole(host, found(host, snapshot_id=result.snapshot_id))
    # What was fetched since is kept.
    host.cache.prune()
    assert not host.cache.find_missing(set(origin.digests()))


def test_a_snapshot_of_another_digest_function_is_not_committed(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", digest_function=DigestFunction.SHA256)
    origin = save(host)
    with pytest.raises(FailedPrecondition, match="SHA256 digests"):
        make_host("a", server).loader.derive_snapshot(origin, snapshot_id=ID)
    assert make_host("a", server).loader.derive_snapshot(origin, snapshot_id=ID, remote=False).saved_locally


def test_a_snapshot_that_lost_a_blob_is_not_derived(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a")
    origin = save(host)
    lost = origin.tables["disk"].get(0)
    host.cache.remove(lost)
    for loader, remote in ((host.loader, None), (make_host("a", server).loader, True)):
        with pytest.raises(NotFound, match=lost.hash):
            loader.derive_snapshot(origin, snapshot_id=ID, remote=remote)
    with pytest.raises(NotFound, match="no local manifest"):
        found(host)


def test_an_outage_is_no_obstacle_to_a_local_snapshot_of_lazy_blobs(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        save(make_host("a", server), remote=True)
        host = make_host("b", server, retry=RetryPolicy(attempts=1))
        origin = found(host, snapshot_id=ORIGIN)
        faults.add(Fault("*", status="UNAVAILABLE", times=None))
        result = host.loader.derive_snapshot(origin, snapshot_id=ID, remote=False)
        assert len(result.warnings) == 1
        assert "cannot be told" in result.warnings[0]
        faults.clear()
        assert_whole(host, found(host))


def test_a_failed_upload_leaves_nothing_to_be_seen_and_tells_what_was_sent(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RetryPolicy(attempts=1))
        origin = save(host)
        faults.add(Fault("UpdateActionResult", status="UNAVAILABLE", times=None))
        with pytest.raises(Unavailable) as caught:
            host.loader.derive_snapshot(origin, snapshot_id=ID, pin="p")
        assert set(caught.value.uploaded) >= set(origin.digests())
        assert any("not sent again" in note for note in caught.value.__notes__)
        assert any("delete it by its id later" in note for note in caught.value.__notes__)
        assert host.cache.pins() == []
        assert_nothing(host, server, make_host)
        faults.clear()
        assert host.loader.derive_snapshot(origin, snapshot_id=ID).uploaded_blobs == 0
        assert_whole(make_host("c", server), found(make_host("c", server)))


def test_a_manifest_whose_reply_was_lost_is_taken_back(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RetryPolicy(attempts=1))
        origin = save(host)
        faults.add(Fault("UpdateActionResult", lose_reply=True))
        with pytest.raises(SnaploaderError):
            host.loader.derive_snapshot(origin, snapshot_id=ID)
        assert_nothing(host, server, make_host)


def test_a_snapshot_that_cannot_be_kept_locally_is_still_remote(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    origin = save(host)

    def full(*_: object, **__: object) -> bool:
        raise ResourceExhausted("full")

    monkeypatch.setattr(FileCache, "put_ref", full)
    result = host.loader.derive_snapshot(origin, snapshot_id=ID, pin="p")
    assert (result.saved_locally, result.saved_remotely) == (False, True)
    assert "saved remotely only" in result.warnings[0]
    monkeypatch.undo()
    assert host.cache.pins() == []
    assert_whole(host, found(host))


def test_an_eviction_during_the_upload_takes_nothing_that_is_needed(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path
) -> None:
    host = make_host("a", server)
    origin = save(host)

    def prune(_: Progress) -> None:
        with FileCache(host.cache.root) as other:
            other.prune()

    result = host.loader.derive_snapshot(origin, snapshot_id=ID, progress=prune)
    assert result.saved_remotely
    assert_whole(make_host("b", server), found(make_host("b", server)))


def test_a_caller_that_gives_up_leaves_nothing_to_be_seen(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    origin = save(host)

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.loader.derive_snapshot(origin, snapshot_id=ID, pin="p", progress=interrupt)
    assert host.cache.pins() == []
    assert_nothing(host, server, make_host)


def test_derived_snapshots_are_found_through_another_loader(make_host: HostFactory) -> None:
    host = make_host("a")
    host.loader.derive_snapshot(save(host), snapshot_id=ID)
    with SnapshotLoader(host.cache) as loader:
        manifest = loader.get_snapshot_by_id(ID).manifest
    assert manifest.vm_configuration.value == CONFIGURATION.SerializeToString(deterministic=True)


FAULTS = {
    "unavailable twice": {"status": "UNAVAILABLE", "times": 2},
    "unavailable": {"status": "UNAVAILABLE", "times": None},
    "internal once": {"status": "INTERNAL", "times": 1},
    "permission denied": {"status": "PERMISSION_DENIED", "times": None},
    "unauthenticated": {"status": "UNAUTHENTICATED", "times": None},
    "unimplemented": {"status": "UNIMPLEMENTED", "times": None},
    "data loss": {"status": "DATA_LOSS", "times": None},
    "resource exhausted once": {"status": "RESOURCE_EXHAUSTED", "times": 1},
    "reply lost once": {"lose_reply": True, "times": 1},
    "reply lost": {"lose_reply": True, "times": None},
    "hang once": {"hang": True, "times": 1},
    "hang": {"hang": True, "times": None},
    "latency": {"latency_s": 0.02, "times": 3},
}
SAT_OUT = {
    "unavailable twice",
    "internal once",
    "resource exhausted once",
    "reply lost once",
    "hang once",
    "latency",
}
METHODS = (
    "GetCapabilities",
    "GetActionResult",
    "FindMissingBlobs",
    "BatchUpdateBlobs",
    "Write",
    "UpdateActionResult",
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_commit_is_whole_or_leaves_nothing(make_host: HostFactory, method: str, fault: str) -> None:
    faults = FaultScript()
    retry = RetryPolicy(attempts=3, initial_delay_s=0.001, max_delay_s=0.01, budget_s=1)
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=retry, timeouts=Timeouts(call_s=0.2, idle_s=0.2, connect_s=2))
        origin = save(host)
        faults.add(Fault(method, **FAULTS[fault]))
        try:
            result = host.loader.derive_snapshot(origin, snapshot_id=ID, pin="p")
        except SnaploaderError:
            assert fault not in SAT_OUT
            faults.clear()
            assert host.cache.pins() == []
            assert_nothing(host, server, make_host)
            assert host.loader.derive_snapshot(origin).saved_remotely
        else:
            faults.clear()
            assert result.saved_remotely
            other = make_host("b", server)
            assert_whole(other, found(other))


def test_an_id_that_another_host_took_during_the_upload_stays_its_own(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    origin = save(a)
    update = a.remote.update_action_result

    def be_overtaken(*args: Any) -> None:
        monkeypatch.undo()
        update(*args)
        server.delete_action_result(args[0])
        b.save(image(5), key=SnapshotKey(), snapshot_id=ID)
        raise Unavailable("lost")

    monkeypatch.setattr(a.remote, "update_action_result", be_overtaken)
    with pytest.raises(Unavailable):
        a.loader.derive_snapshot(origin, snapshot_id=ID)
    assert a.read(found(a)) == image(5)
