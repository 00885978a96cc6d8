"""Saving where others interfere: servers that drop updates, other hosts, outages, broken snapshots."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from loader_hosts import CHUNK, Host, HostFactory, image

from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader.digest import Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    SnaploaderError,
    Unavailable,
    Unimplemented,
)
from snaploader.formats.digests import DigestArray
from snaploader.keys import SnapshotKeySet, remote_manifest_digest
from snaploader.loader import versions
from snaploader.loader.results import ManifestSource, RemoteManifest
from snaploader.loader.save import SAMPLED_BLOBS, SAMPLED_BYTES
from snaploader.testing import EmbeddedServer, FakeCAS, Fault, FaultScript, ServerOptions, like_casd


def drop_updates(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the host's server answers its updates with OK and forgets them."""
    monkeypatch.setattr(host.remote, "update_action_result", lambda *_: None)


def local_only(host: Host, key_set: SnapshotKeySet) -> bytes:
    return host.read(host.loader.get_snapshot(key_set, "local-only"))


def assert_says_that_the_local_snapshot_stands(error: BaseException) -> None:
    assert any("saved in the local cache" in note for note in error.__notes__)


@pytest.mark.parametrize("has_older", [True, False])
def test_a_manifest_that_the_server_drops_silently_is_an_error(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, has_older: bool
) -> None:
    host = make_host("a", server)
    if has_older:
        host.save(image(1))
    key_set = host.keys()
    drop_updates(host, monkeypatch)
    with pytest.raises(FailedPrecondition, match="does not return it") as caught:
        host.save(image(2), key=key_set.write_key)
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert local_only(host, key_set) == image(2)


def test_a_server_that_forgets_what_is_updated_is_an_error(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    monkeypatch.setattr(
        host.remote, "update_action_result", lambda digest, _: server.delete_action_result(digest)
    )
    with pytest.raises(FailedPrecondition, match="does not return it"):
        host.save(image(2), key=key_set.write_key)


def test_saving_the_same_state_again_is_no_drop(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    for _ in range(2):
        result = host.save(image(1))
        assert result.saved_remotely
        assert result.remote_manifest is not None
        assert result.remote_manifest.is_ours
        assert result.warnings == ()


class WriteOnceCAS(FakeCAS):
    """A remote store that keeps whatever it was given first under a key, and says so in its own way."""

    error: SnaploaderError = Internal("ActionResult exists and cannot be overwritten (INTERNAL)")

    def update_action_result(self, action_digest: Digest, action_result: ActionResult) -> None:
        if action_digest in self.action_results:
            raise self.error
        super().update_action_result(action_digest, action_result)


@pytest.mark.parametrize("kind", [Internal, Unimplemented, InvalidArgument, FailedPrecondition])
def test_a_write_once_action_cache_is_told_as_such(
    make_host: HostFactory, kind: type[SnaploaderError]
) -> None:
    remote = WriteOnceCAS()
    remote.error = kind("the server's own words")
    host, other = make_host("a", remote=remote), make_host("b", remote=remote)
    first = host.save(image(1), snapshot_id="first")
    assert first.saved_remotely
    key_set = host.keys()
    with pytest.raises(FailedPrecondition, match=r"write-once.*the server's own words") as caught:
        host.save(image(2))
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert local_only(host, key_set) == image(2)
    assert other.load() == image(1)
    with pytest.raises(FailedPrecondition, match="write-once") as caught:
        host.loader.invalidate_snapshot(key_set.branch_key)
    assert any("not invalidated" in note for note in caught.value.__notes__)
    with pytest.raises(FailedPrecondition, match="write-once"):
        host.loader.delete_snapshot("first")
    assert host.read(host.loader.get_snapshot_by_id("first")) == image(1)


def test_a_write_once_action_cache_takes_the_same_state_again(make_host: HostFactory) -> None:
    host = make_host("a", remote=WriteOnceCAS())
    for _ in range(2):
        assert host.save(image(1)).saved_remotely


def test_an_error_of_an_update_that_replaces_nothing_is_its_own(make_host: HostFactory) -> None:
    remote = WriteOnceCAS()
    host = make_host("a", remote=remote)
    key = host.keys().write_key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "update_action_result", raise_internal)
        with pytest.raises(Internal, match="a defect of the server"):
            host.save(image(1), key=key)


def raise_internal(*_: Any) -> None:
    raise Internal("a defect of the server")


class ForgetfulCAS(FakeCAS):
    """A remote store whose action cache keeps the latest few results."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self._kept = kept

    def update_action_result(self, action_digest: Digest, action_result: ActionResult) -> None:
        super().update_action_result(action_digest, action_result)
        while len(self.action_results) > self._kept:
            del self.action_results[next(iter(self.action_results))]


@pytest.mark.parametrize(("kept", "lost"), [(1, "manifest"), (2, "version")])
def test_an_action_cache_that_drops_what_was_published_fails_the_save(
    make_host: HostFactory, kept: int, lost: str
) -> None:
    host = make_host("a", remote=ForgetfulCAS(kept))
    with pytest.raises(FailedPrecondition, match=f"the {lost} of .* too few results") as caught:
        host.save(image(1))
    assert_says_that_the_local_snapshot_stands(caught.value)


def test_an_action_cache_with_room_for_a_snapshot_will_do(make_host: HostFactory) -> None:
    remote = ForgetfulCAS(3)
    make_host("a", remote=remote).save(image(1))
    assert make_host("b", remote=remote).load() == image(1)


def test_a_version_that_outlived_a_save_is_looked_for_again_after_a_minute_only(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    key = host.keys().write_key
    host.save(image(1), key=key)

    def looks_of_a_save(seed: int) -> int:
        before = len(server.requests)
        host.save(image(seed), key=key)
        return sum(each.method == "GetActionResult" for each in server.requests[before:])

    often = looks_of_a_save(2)
    monkeypatch.setattr(versions, "RECENTLY_S", 0.0)
    assert looks_of_a_save(3) == often + 2  # before and after


class StaleIndexCAS(FakeCAS):
    """A remote store that says of every blob it ever had that it has it.

    Args:
        believes_itself: It does not even store what its index knows.
    """

    def __init__(self, *, believes_itself: bool = False) -> None:
        super().__init__()
        self.index: set[Digest] = set()
        self._believes_itself = believes_itself

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        return super().find_missing(digests) - self.index

    def _write(self, digest: Digest, source: Any) -> None:
        if not (self._believes_itself and digest in self.index):
            super()._write(digest, source)
        self.index.add(digest)


def test_blobs_that_only_the_servers_index_has_are_uploaded_again(make_host: HostFactory) -> None:
    remote = StaleIndexCAS()
    host = make_host("a", remote=remote)
    host.save(image(1))
    remote.blobs.clear()
    result = host.save(image(1))
    assert result.uploaded_blobs == len(remote.blobs) == len(remote.index)
    assert make_host("b", remote=remote).load() == image(1)


def test_a_server_that_believes_its_index_more_than_its_disk_fails_the_save(make_host: HostFactory) -> None:
    remote = StaleIndexCAS(believes_itself=True)
    host = make_host("a", remote=remote)
    host.save(image(1))
    remote.blobs.clear()
    key_set = host.keys()
    with pytest.raises(DataLoss, match="index is wrong") as caught:
        host.save(image(1))
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert local_only(host, key_set) == image(1)


def test_a_few_lost_blobs_are_found_by_saving_often_enough(make_host: HostFactory) -> None:
    remote = StaleIndexCAS()
    host = make_host("a", remote=remote)
    host.save(image(1, chunks=40, holes=()))
    lost = list(remote.blobs)[:10]
    for digest in lost:
        del remote.blobs[digest]
    read: set[Digest] = set()
    for _ in range(200):
        before = remote.reads.copy()
        host.save(image(1, chunks=40, holes=()))
        sampled = remote.reads - before
        assert len(sampled) <= 2 * SAMPLED_BLOBS
        assert sum(digest.size_bytes for digest in sampled) <= 2 * SAMPLED_BYTES
        read |= sampled.keys()
        if remote.index <= remote.blobs.keys():
            break
    assert remote.index <= remote.blobs.keys()
    assert len(read) > 0


def test_a_server_that_takes_no_results_is_told_before_anything_is_uploaded(make_host: HostFactory) -> None:
    remote = FakeCAS(update_enabled=False)
    host = make_host("a", remote=remote)
    key_set = host.keys()
    with pytest.raises(FailedPrecondition, match="nothing was uploaded") as caught:
        host.save(image(1), key=key_set.write_key)
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert not remote.blobs
    assert local_only(host, key_set) == image(1)


def test_a_server_that_shows_no_manifest_is_told_in_its_own_words(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakeCAS()
    host = make_host("a", remote=remote)
    key = host.keys().write_key
    words = "Combined size of all output directories exceeds maximum limit of 64 bytes"

    def refuse(_: Digest) -> ActionResult:
        raise NotFound(words)

    monkeypatch.setattr(remote, "get_action_result", refuse)
    with pytest.raises(FailedPrecondition, match=f"does not return it .*{words}"):
        host.save(image(1), key=key)


def test_a_save_that_another_host_overtakes_says_so(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1))
    key = a.keys().write_key
    assert a.remote is not None
    update = a.remote.update_action_result

    def update_and_be_overtaken(*args: Any) -> None:
        monkeypatch.undo()
        update(*args)
        b.save(image(3), key=key)

    monkeypatch.setattr(a.remote, "update_action_result", update_and_be_overtaken)
    result = a.save(image(2), key=key)
    assert not result.saved_remotely
    assert [warning for warning in result.warnings if "another host saved" in warning]
    standing = server.action_results()[remote_manifest_digest(key, a.remote.digest_function)]
    digest = Digest.of(standing.SerializeToString(deterministic=True), a.remote.digest_function)
    assert result.remote_manifest == RemoteManifest(digest, is_ours=False)
    assert make_host("c", server).load() == image(3)
    assert a.read(a.loader.get_snapshot_by_id(result.snapshot_id)) == image(2)


@pytest.mark.parametrize("has_older", [True, False])
def test_an_invalidation_that_the_server_drops_is_an_error(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, has_older: bool
) -> None:
    host = make_host("a", server)
    key = host.keys().branch_key
    if not has_older:
        for digest in server.action_results():
            server.delete_action_result(digest)
    drop_updates(host, monkeypatch)
    with pytest.raises(FailedPrecondition, match="not invalidated"):
        host.loader.invalidate_snapshot(key)
    if has_older:
        assert host.keys().branch_key == key


def test_a_snapshot_id_that_is_taken_during_the_upload_is_not_overwritten(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    key = a.keys().write_key
    assert a.remote is not None
    write_many = a.remote.write_many

    def upload_and_lose_the_id(uploads: Any) -> Any:
        monkeypatch.undo()
        moved = write_many(uploads)
        b.save(image(2), "topic", snapshot_id="run-1")
        return moved

    monkeypatch.setattr(a.remote, "write_many", upload_and_lose_the_id)
    result = a.save(image(1), key=key, snapshot_id="run-1")
    assert result.saved_remotely
    assert any("run-1" in warning and "taken" in warning for warning in result.warnings)
    reader = make_host("c", server)
    assert reader.read(reader.loader.get_snapshot_by_id("run-1")) == image(2)
    assert reader.load() == image(1)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL"])
def test_a_failure_at_the_start_of_a_save_costs_the_remote_part_only(
    make_host: HostFactory, status: str
) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        key_set = host.keys()
        faults.add(Fault("GetActionResult", status=status, times=None))
        with pytest.raises(SnaploaderError, match="scripted fault") as caught:
            host.save(image(1), key=key_set.write_key)
        assert_says_that_the_local_snapshot_stands(caught.value)
        assert local_only(host, key_set) == image(1)


def test_a_server_that_is_gone_costs_the_remote_part_only(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    key_set = host.keys()
    server.stop()
    with pytest.raises(Unavailable) as caught:
        host.save(image(1), key=key_set.write_key)
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert local_only(host, key_set) == image(1)


def test_a_server_that_was_never_reached_costs_the_remote_part_only(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    key_set = make_host("a", server).keys()
    server.stop()
    host = make_host("a", server)
    with pytest.raises(Unavailable) as caught:
        host.save(image(1), key=key_set.write_key)
    assert_says_that_the_local_snapshot_stands(caught.value)
    assert local_only(host, key_set) == image(1)
    assert host.save(image(2), key=key_set.write_key, remote=False).saved_locally
    assert local_only(host, key_set) == image(2)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "PERMISSION_DENIED"])
def test_a_local_save_takes_untouched_chunks_on_trust_when_the_server_does_not_answer(
    make_host: HostFactory, status: str
) -> None:
    content = image(1)
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(content)
        host = make_host("b", server)
        snapshot = host.find()
        with host.unpack(snapshot) as unpacked:
            disk = unpacked.chunked_files["disk"]
            disk.write_at(0, b"written".ljust(CHUNK, b"\0"))
            faults.add(Fault("*", status=status, times=None))
            result = host.save(chunked_files={"disk": disk}, key=snapshot.key, remote=False)
        assert result.saved_locally
        assert not result.saved_remotely
        assert any("cannot be told" in warning for warning in result.warnings)
        faults.clear()
        assert host.load() == b"written".ljust(CHUNK, b"\0") + content[CHUNK:]


def test_newest_with_the_server_gone_uses_the_local_manifest_and_says_so(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    server.stop()
    with pytest.raises(Unavailable):
        host.loader.get_snapshot(key_set, "newest")
    snapshot = host.loader.get_snapshot(key_set, "newest", allow_degraded=True)
    assert snapshot.source is ManifestSource.LOCAL
    assert snapshot.key == key_set.branch_key
    assert snapshot.degraded
    assert isinstance(snapshot.failures[0].error, Unavailable)
    assert host.read(snapshot) == image(1)


def test_a_local_snapshot_of_another_digest_function_is_passed_over_when_chunks_are_gone(
    make_host: HostFactory,
) -> None:
    with EmbeddedServer(options=like_casd()) as server:
        host = make_host("a", server)
        host.save(image(1), "main")
        key_set = host.keys("topic")
        alone = make_host("b")
        alone.save(image(2), key=key_set.write_key)
        reader = make_host("b", server)
        assert reader.read(reader.loader.get_snapshot(key_set)) == image(2)
        alone.chunk_files()[3].unlink()
        snapshot = reader.loader.get_snapshot(key_set)
        assert snapshot.key.ref == "main"
        assert not snapshot.degraded
        assert reader.read(snapshot) == image(1)


@pytest.mark.parametrize("policy", ["first-non-default-ref", "none-available"])
def test_a_broken_remote_snapshot_does_not_count_as_standing(make_host: HostFactory, policy: str) -> None:
    with EmbeddedServer(options=ServerOptions(check_completeness=False)) as server:
        host = make_host("a", server)
        host.save(image(1), "topic")
        key_set = host.keys("topic")
        options: dict[str, Any] = {
            "key": key_set.write_key,
            "key_set": key_set,
            "save_policy": policy,
            "default_ref": "main",
        }
        assert not host.save(image(1), **options).saved_remotely
        lost = host.find("topic").tables["disk"].get(5)
        assert lost is not None
        server.delete_blob(lost)
        assert host.save(image(1), **options).saved_remotely
        assert make_host("b", server).load("topic") == image(1)


def test_a_small_change_asks_the_server_six_times(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    with host.unpack(host.loader.get_snapshot(key_set)) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(0, b"changed")
        before = len(server.requests)
        assert host.save(chunked_files={"disk": disk}, key=key_set.write_key).saved_remotely
    assert [request.method for request in server.requests[before:]] == [
        "FindMissingBlobs",
        "BatchUpdateBlobs",
        "BatchReadBlobs",  # a sample of what the server says it has
        "UpdateActionResult",  # the key, then the id
        "UpdateActionResult",
        "GetActionResult",  # the key; the version was looked for after the save before
    ]


class CountedDigests(FakeCAS):
    """Remembers what it was asked for, as it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Collection[Digest]] = []

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        self.asked.append(digests)
        return super().find_missing(digests)


def test_a_store_is_asked_once_for_all_blobs_and_gets_them_as_arrays(make_host: HostFactory) -> None:
    remote = CountedDigests()
    host = make_host("a", remote=remote)
    host.save(image(1))
    (asked,) = remote.asked
    assert isinstance(asked, DigestArray)
    assert set(asked) == set(host.find().digests())
    assert len(asked) == len(set(asked))
