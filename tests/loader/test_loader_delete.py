"""Deleting by id: gone for every reader, its id never used again, its blobs left to others."""

from __future__ import annotations

from typing import Any

import pytest
from loader_hosts import Host, HostFactory, image

from snaploader import FileCache, SnapshotLoader, keys
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SnaploaderError,
    Unavailable,
)
from snaploader.keys import SnapshotKey
from snaploader.remote import RetryPolicy, Timeouts
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions

ID = "workspaces/ws-1/one"


def local_name(host: Host, snapshot_id: str = ID) -> str:
    return keys.local_manifest_key(host.cache.group_id, SnapshotKey(snapshot_id=snapshot_id))


def by_id(host: Host, policy: str = "local-first", snapshot_id: str = ID) -> bytes:
    return host.read(host.loader.get_snapshot_by_id(snapshot_id, read_policy=policy))


def assert_gone(host: Host, *policies: str) -> None:
    for policy in policies or ("local-first", "newest", "local-only"):
        with pytest.raises(NotFound, match=r"deleted|no local manifest"):
            host.loader.get_snapshot_by_id(ID, read_policy=policy)


def test_a_deleted_snapshot_is_gone_locally_and_others_that_share_its_blobs_are_not(
    make_host: HostFactory,
) -> None:
    host = make_host("a")
    host.save(image(1), snapshot_id=ID)
    host.save(image(1), "topic")
    before = host.blobs()
    result = host.loader.delete_snapshot(ID)
    assert (result.snapshot_id, result.deleted_locally, result.deleted_remotely) == (ID, True, False)
    assert result.found
    assert not result.was_deleted
    assert_gone(host)
    assert host.blobs() == before
    assert host.load("topic") == host.load("main") == image(1)


def test_a_deleted_snapshot_is_gone_for_every_host(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b, c = make_host("a", server), make_host("b", server), make_host("c", server)
    a.save(image(1), snapshot_id=ID)
    assert by_id(b) == image(1)
    result = a.loader.delete_snapshot(ID)
    assert (result.deleted_locally, result.deleted_remotely, result.was_deleted) == (True, True, False)
    assert_gone(a)
    assert_gone(c)
    # What a host keeps it finds, unless it asks the server, whose word then counts.
    assert by_id(b) == image(1)
    assert_gone(b, "newest")


def test_deleting_again_does_nothing_and_says_so(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1), snapshot_id=ID)
    assert by_id(b) == image(1)
    a.loader.delete_snapshot(ID)
    updates = server.calls("UpdateActionResult")
    again = a.loader.delete_snapshot(ID)
    assert (again.deleted_locally, again.deleted_remotely, again.was_deleted) == (False, False, True)
    assert again.found
    # The other host still has a copy to forget.
    other = b.loader.delete_snapshot(ID)
    assert (other.deleted_locally, other.deleted_remotely, other.was_deleted) == (True, False, True)
    assert_gone(b)
    assert server.calls("UpdateActionResult") == updates


def test_a_snapshot_that_never_was_is_not_found_and_nothing_is_written(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    result = host.loader.delete_snapshot(ID)
    assert not result.found
    assert host.cache.refs() == []
    assert not server.action_results()
    host.save(image(1), snapshot_id=ID)
    assert by_id(host) == image(1)


@pytest.mark.parametrize("with_server", [True, False])
def test_the_id_of_a_deleted_snapshot_is_taken(
    make_host: HostFactory, server: EmbeddedServer, with_server: bool
) -> None:
    host = make_host("a", server if with_server else None)
    host.save(image(1), snapshot_id=ID)
    host.loader.delete_snapshot(ID)
    others = [host, make_host("b", server)] if with_server else [host]
    for other in others:
        with pytest.raises(FailedPrecondition, match="taken"):
            other.save(image(2), snapshot_id=ID)
        assert_gone(other)


def test_only_the_local_copy_is_forgotten_when_that_is_asked_for(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(image(1), snapshot_id=ID)
    calls = server.calls("UpdateActionResult")
    result = host.loader.delete_snapshot(ID, remote=False)
    assert (result.deleted_locally, result.deleted_remotely) == (True, False)
    assert_gone(host, "local-only")
    assert server.calls("UpdateActionResult") == calls
    assert by_id(host) == image(1)
    assert not host.loader.delete_snapshot("other", remote=False).found


def test_instances_of_keys_are_told_apart(make_host: HostFactory) -> None:
    host = make_host("a")
    for instance in ("", "x"):
        host.save(image(1), key=SnapshotKey(instance_name=instance), snapshot_id=ID)
    assert host.loader.delete_snapshot(ID, instance_name="x").deleted_locally
    with pytest.raises(NotFound, match="deleted"):
        host.loader.get_snapshot_by_id(ID, instance_name="x")
    assert by_id(host) == image(1)


def test_a_manifest_that_the_server_hides_for_a_missing_blob_stays_hidden(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    """Uploading the blob again would bring the snapshot back."""
    host = make_host("a", server)
    host.save(image(1), snapshot_id=ID)
    chunk = host.loader.get_snapshot_by_id(ID).tables["disk"].get(0)
    server.delete_blob(chunk)
    result = host.loader.delete_snapshot(ID)
    assert (result.deleted_locally, result.deleted_remotely) == (True, False)
    host.save(image(1), "topic")
    assert_gone(make_host("b", server))


def test_a_snapshot_that_is_only_local_is_deleted_where_the_server_takes_no_updates(
    make_host: HostFactory,
) -> None:
    with EmbeddedServer(options=ServerOptions(read_only=True)) as server:
        host = make_host("a", server)
        host.save(image(1), key=SnapshotKey(), snapshot_id=ID, remote=False)
        assert host.loader.delete_snapshot(ID).deleted_locally
        assert_gone(host)


def test_a_server_that_refuses_is_an_error_and_nothing_is_deleted(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        host.save(image(1), snapshot_id=ID)
        faults.add(Fault("UpdateActionResult", status="PERMISSION_DENIED", times=None))
        with pytest.raises(PermissionDenied) as caught:
            host.loader.delete_snapshot(ID)
        assert any("remote=False" in note for note in caught.value.__notes__)
        for policy in ("local-only", "newest"):
            assert by_id(host, policy) == image(1)


def test_a_deletion_that_the_server_drops_silently_is_an_error(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    host.save(image(1), snapshot_id=ID)
    monkeypatch.setattr(host.remote, "update_action_result", lambda *_: None)
    with pytest.raises(FailedPrecondition, match="still returns it"):
        host.loader.delete_snapshot(ID)
    assert by_id(host, "local-only") == image(1)


def test_an_outage_leaves_the_local_copy_until_the_next_attempt(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RetryPolicy(attempts=1))
        host.save(image(1), snapshot_id=ID)
        faults.add(Fault("UpdateActionResult", status="UNAVAILABLE", times=None))
        with pytest.raises(Unavailable):
            host.loader.delete_snapshot(ID)
        assert by_id(host, "local-only") == image(1)
        faults.clear()
        assert host.loader.delete_snapshot(ID).deleted_remotely
        assert_gone(host)


def test_a_deletion_whose_reply_was_lost_is_completed_by_the_next(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server, retry=RetryPolicy(attempts=1))
        host.save(image(1), snapshot_id=ID)
        faults.add(Fault("UpdateActionResult", lose_reply=True))
        with pytest.raises(SnaploaderError):
            host.loader.delete_snapshot(ID)
        result = host.loader.delete_snapshot(ID)
        assert (result.deleted_locally, result.deleted_remotely, result.was_deleted) == (True, False, True)
        assert_gone(host)


def test_a_damaged_manifest_is_deleted_too(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1), snapshot_id=ID)
    host.cache.put_ref(local_name(host), b"rot")
    name = keys.remote_manifest_digest(SnapshotKey(snapshot_id=ID), host.remote.digest_function)
    result = host.remote.get_action_result(name)
    del result.execution_metadata.auxiliary_metadata[:]
    host.remote.update_action_result(name, result)
    with pytest.raises(DataLoss):
        make_host("b", server).loader.get_snapshot_by_id(ID)
    deleted = host.loader.delete_snapshot(ID)
    assert (deleted.deleted_locally, deleted.deleted_remotely) == (True, True)
    assert_gone(host)


def test_a_reader_that_is_about_to_keep_a_copy_does_not_bring_it_back(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    host.save(image(1), snapshot_id=ID)
    host.loader.delete_snapshot(ID, remote=False)
    put_ref = FileCache.put_ref

    def deleted_before(cache: FileCache, key: str, *args: Any, **kwargs: Any) -> bool:
        if key == local_name(host):
            monkeypatch.undo()
            host.loader.delete_snapshot(ID)
        return put_ref(cache, key, *args, **kwargs)

    monkeypatch.setattr(FileCache, "put_ref", deleted_before)
    host.loader.get_snapshot_by_id(ID)
    assert_gone(host)


def test_a_full_cache_does_not_prevent_a_deletion(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a")
    host.save(image(1), snapshot_id=ID)
    host.cache.pin("all", host.loader.get_snapshot_by_id(ID).digests(), refs=host.cache.refs())
    full = FileCache(host.cache.root, max_bytes=4096)
    with full, SnapshotLoader(full) as loader:
        assert loader.delete_snapshot(ID).deleted_locally
    assert_gone(host)


def test_misuse_is_refused(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a")
    host.save(image(1), snapshot_id=ID)
    with pytest.raises(InvalidArgument, match="no remote cache"):
        host.loader.delete_snapshot(ID, remote=True)
    with pytest.raises(InvalidArgument):
        host.loader.delete_snapshot("")
    readonly = make_host("a", server, readonly=True)
    with pytest.raises(FailedPrecondition, match="read-only"):
        readonly.loader.delete_snapshot(ID)
    assert by_id(host) == image(1)


FAULTS = {
    "unavailable twice": {"status": "UNAVAILABLE", "times": 2},
    "unavailable": {"status": "UNAVAILABLE", "times": None},
    "internal once": {"status": "INTERNAL", "times": 1},
    "permission denied": {"status": "PERMISSION_DENIED", "times": None},
    "unauthenticated": {"status": "UNAUTHENTICATED", "times": None},
    "unimplemented": {"status": "UNIMPLEMENTED", "times": None},
    "not found once": {"status": "NOT_FOUND", "times": 1},
    "data loss": {"status": "DATA_LOSS", "times": None},
    "reply lost once": {"lose_reply": True, "times": 1},
    "reply lost": {"lose_reply": True, "times": None},
    "hang once": {"hang": True, "times": 1},
    "hang": {"hang": True, "times": None},
    "latency": {"latency_s": 0.02, "times": 3},
}
SAT_OUT = {"unavailable twice", "internal once", "reply lost once", "hang once", "latency"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["GetCapabilities", "GetActionResult", "UpdateActionResult"])
def test_a_deletion_is_whole_or_a_typed_error_that_can_be_repeated(
    make_host: HostFactory, method: str, fault: str
) -> None:
    faults = FaultScript()
    retry = RetryPolicy(attempts=3, initial_delay_s=0.001, max_delay_s=0.01, budget_s=1)
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(1, 4, ()), snapshot_id=ID)
        host = make_host("a", server, retry=retry, timeouts=Timeouts(call_s=0.2, idle_s=0.2, connect_s=2))
        faults.add(Fault(method, **FAULTS[fault]))
        try:
            host.loader.delete_snapshot(ID)
        except SnaploaderError:
            assert fault not in SAT_OUT
            # Nothing is deleted here that others may still see.
            assert by_id(host, "local-only") == image(1, 4, ())
        else:
            assert_gone(host, "local-only")
        faults.clear()
        make_host("a", server).loader.delete_snapshot(ID)
        assert_gone(make_host("a", server))
        assert_gone(make_host("b", server))
