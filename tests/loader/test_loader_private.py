"""With sharing off, plain files are not read to be named: nobody else will ever ask for them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from snaploader import CallContext, FileCache, SnapshotKey, SnapshotLoader, SnapshotTask
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, NotFound
from snaploader.filecache.durability import Durability
from snaploader.loader import Snapshot
from snaploader.testing import FakeCAS

DATA = b"memory of a machine" * 10_000
RUNNER = SnapshotKey(platform_hash="a" * 64, configuration_hash="b" * 64, runner_id="runner-1")


@pytest.fixture
def cache(tmp_path: Path):
    with FileCache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def loader(cache: FileCache):
    with SnapshotLoader(cache, FakeCAS(), share_snapshots=False) as loader:
        yield loader


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(DATA)
    return path


def found(loader: SnapshotLoader, snapshot_id: str) -> Snapshot:
    return loader.get_snapshot_by_id(snapshot_id)


@pytest.mark.parametrize("link", [False, True])
def test_a_plain_file_is_kept_without_being_hashed(
    loader, cache, memory, tmp_path, link, monkeypatch
) -> None:
    monkeypatch.setattr("snaploader.files.hash_file", None)
    monkeypatch.setattr("snaploader.files.copy_hashing", None)
    key = loader.snapshot_key_set(SnapshotTask(), "b" * 64, "runner-1").write_key
    assert key.runner_id == "runner-1"
    saved = loader.cache_snapshot(key, files={"memory": memory}, link_files=link)
    assert (saved.hashed_bytes, saved.stored_bytes, saved.saved_remotely) == (0, len(DATA), False)
    snapshot = found(loader, saved.snapshot_id)
    assert snapshot.manifest.files["memory"].digest != Digest.of(DATA, DigestFunction.SHA256)
    with loader.unpack_snapshot(snapshot, tmp_path / "out") as unpacked:
        assert unpacked.files["memory"].read_bytes() == DATA
    restored = loader.restore_snapshot(pickle.loads(pickle.dumps(snapshot)), tmp_path / "whole")
    assert restored.files["memory"].read_bytes() == DATA
    with loader.read_snapshot(snapshot) as reader:
        assert reader.read_at("memory", 3, 4) == DATA[3:7]


def test_a_link_takes_no_room_and_a_copy_lets_the_original_be_written(loader, memory, tmp_path) -> None:
    linked = loader.cache_snapshot(RUNNER, files={"memory": memory}, link_files=True)
    assert os.stat(memory).st_nlink == 2
    other = tmp_path / "other"
    other.write_bytes(DATA)
    copied = loader.cache_snapshot(RUNNER, files={"memory": other})
    other.write_bytes(b"written since")
    for saved in (linked, copied):
        snapshot = found(loader, saved.snapshot_id)
        restored = loader.restore_snapshot(snapshot, tmp_path / saved.snapshot_id)
        assert restored.files["memory"].read_bytes() == DATA


def test_a_later_snapshot_changes_nothing_of_an_earlier_one(loader, memory, tmp_path) -> None:
    first = loader.cache_snapshot(RUNNER, files={"memory": memory})
    memory.write_bytes(DATA[::-1])
    second = loader.cache_snapshot(RUNNER, files={"memory": memory})
    contents = [
        loader.restore_snapshot(found(loader, saved.snapshot_id), tmp_path / saved.snapshot_id)
        for saved in (first, second)
    ]
    assert [one.files["memory"].read_bytes() for one in contents] == [DATA, DATA[::-1]]


def test_a_snapshot_that_is_shared_is_hashed_as_ever(loader, memory) -> None:
    saved = loader.cache_snapshot(SnapshotKey(ref="main"), files={"memory": memory})
    assert saved.hashed_bytes == len(DATA)
    remotely = loader.cache_snapshot(RUNNER, files={"memory": memory}, remote=True)
    assert remotely.hashed_bytes == len(DATA)
    assert remotely.saved_remotely


def test_what_is_not_named_by_its_content_never_goes_to_the_remote_cache(loader, memory) -> None:
    saved = loader.cache_snapshot(RUNNER, files={"memory": memory})
    snapshot = found(loader, saved.snapshot_id)
    for call in (
        lambda: loader.upload_snapshot(snapshot),
        lambda: loader.derive_snapshot(snapshot, remote=True),
    ):
        with pytest.raises(FailedPrecondition, match="remote=True"):
            call()
    assert not loader.remote_cache.blobs
    derived = loader.derive_snapshot(snapshot)
    assert found(loader, derived.snapshot_id).manifest.files == snapshot.manifest.files


def test_private_files_are_pinned_evicted_listed_and_removed_like_blobs(loader, cache, memory) -> None:
    pinned = loader.cache_snapshot(RUNNER, files={"memory": memory}, pin="kept")
    other = loader.cache_snapshot(RUNNER, files={"memory": memory})
    digests = [found(loader, one.snapshot_id).manifest.files["memory"].digest for one in (pinned, other)]
    assert cache.find_private(digests) == set(digests)
    assert {entry.kind for entry in cache.entries()} >= {"private", "ref"}
    listed = {entry.digest.hash for entry in cache.entries() if entry.kind == "private" and entry.digest}
    assert listed == {digest.hash for digest in digests}
    assert cache.verify().bad_blobs == ()
    cache.prune()
    assert cache.find_missing(digests) == {digests[1]}
    assert cache.remove(digests[0])
    assert not cache.remove(digests[0])
    with pytest.raises(NotFound):
        found(loader, pinned.snapshot_id)


def test_many_digests_are_looked_up_among_private_files_too(cache, memory) -> None:
    digest = Digest("1" * 64, len(DATA), DigestFunction.SHA256)
    cache.put_private(digest, memory)
    many = [Digest(f"{number:064x}", 5, DigestFunction.SHA256) for number in range(2000)]
    assert digest not in cache.find_missing([*many, digest])


def test_a_private_file_is_of_its_group_alone(loader, cache, memory) -> None:
    digest = Digest("1" * 64, len(DATA), DigestFunction.SHA256)
    cache.put_private(digest, memory, context=CallContext(group_id="a"))
    assert cache.find_missing([digest]) == {digest}
    assert cache.read(digest, context=CallContext(group_id="a")) == DATA


def test_another_size_than_its_digest_says_is_refused(cache, memory) -> None:
    with pytest.raises(DataLoss):
        cache.put_private(Digest("1" * 64, 5, DigestFunction.SHA256), memory)
    assert cache.entries() == []


@pytest.mark.parametrize("by_scan", [False, True])
def test_what_a_power_failure_may_have_damaged_is_lost(cache, memory, monkeypatch, by_scan) -> None:
    digest = Digest("1" * 64, len(DATA), DigestFunction.SHA256)
    cache.put_private(digest, memory)
    monkeypatch.setattr(Durability, "is_suspect", lambda *_: True)
    cache._durability.windows = [(0, 1 << 62)]
    if by_scan:
        cache.prune(1 << 40)
    else:
        assert cache.find_missing([digest]) == {digest}
    cache._durability.windows = []
    assert cache.find_missing([digest]) == {digest}
    assert cache.entries() == []
