"""Both storages keep only what is whole and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument
from snaploader.testing import DiskStorage, MemoryStorage
from snaploader.testing.storage import Partition, StagedBlob, Storage, parse_result_key, result_key

BLOB = b"content" * 1000
DIGESTS = [Digest.of(BLOB, function) for function in DigestFunction]


@pytest.fixture(params=["memory", "disk"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    made: Storage = MemoryStorage() if request.param == "memory" else DiskStorage(tmp_path / "root")
    yield made
    made.close()


@pytest.fixture
def partition(storage: Storage) -> Partition:
    return storage.partition("some/instance")


@pytest.mark.parametrize("digest", DIGESTS, ids=lambda digest: digest.function.name)
def test_what_is_put_comes_back(partition: Partition, digest: Digest) -> None:
    assert not partition.contains(digest)
    assert partition.open(digest) is None
    partition.put(digest, BLOB)
    assert partition.contains(digest)
    assert partition.blobs() == [digest]
    reader = partition.open(digest)
    assert reader is not None
    assert (reader.size, reader.read(3, 10), reader.read(len(BLOB) - 1, 10)) == (
        len(BLOB),
        BLOB[3:13],
        BLOB[-1:],
    )
    assert partition.delete(digest)
    assert reader.read(0, len(BLOB)) == BLOB
    reader.close()
    assert not partition.delete(digest)
    assert partition.blobs() == []


@pytest.mark.parametrize("digest", DIGESTS, ids=lambda digest: digest.function.name)
def test_what_is_staged_is_visible_after_commit_only(partition: Partition, digest: Digest) -> None:
    staged = partition.stage(digest)
    staged.write(BLOB[:100])
    staged.write(BLOB[100:])
    assert not partition.contains(digest)
    staged.commit()
    staged.discard()
    assert partition.blobs() == [digest]


@pytest.mark.parametrize("wrong", [BLOB[:-1], BLOB[:-1] + b"x", BLOB + b"x", b""])
def test_wrong_bytes_are_never_visible(partition: Partition, wrong: bytes) -> None:
    with pytest.raises(DataLoss):
        partition.put(DIGESTS[0], wrong)
    staged = partition.stage(DIGESTS[0])
    with pytest.raises(DataLoss):
        _write_and_commit(staged, wrong)
    staged.discard()
    staged.discard()
    assert partition.blobs() == []


def _write_and_commit(staged: StagedBlob, data: bytes) -> None:
    staged.write(data)
    staged.commit()


def test_results_are_replaced_and_deleted(partition: Partition) -> None:
    key = result_key(DIGESTS[1], has_size=True)
    assert partition.get_result(key) is None
    partition.put_result(key, b"one")
    partition.put_result(key, b"two")
    assert partition.get_result(key) == b"two"
    assert partition.results() == [key]
    assert parse_result_key(key) == DIGESTS[1]
    assert partition.delete_result(key)
    assert not partition.delete_result(key)
    assert partition.results() == []


def test_partitions_are_apart(storage: Storage) -> None:
    for name in ("", ".", "..", "a", "A", "a/b", "a%2Fb", "ü"):
        assert storage.partition(name).blobs() == []
        storage.partition(name).put(DIGESTS[0], BLOB)
        assert storage.partition(name).blobs() == [DIGESTS[0]]


def test_names_that_are_no_folder_are_refused(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    with pytest.raises(InvalidArgument, match="too long"):
        storage.partition("x" * 255)
    storage.close()


def test_a_blob_cut_by_a_power_failure_counts_as_absent(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    partition = storage.partition("")
    partition.put(DIGESTS[0], BLOB)
    path = Path(partition.blob_path(DIGESTS[0]))
    path.chmod(0o644)
    path.write_bytes(BLOB[:10])
    assert not partition.contains(DIGESTS[0])
    assert partition.open(DIGESTS[0]) is None
    partition.put(DIGESTS[0], BLOB)
    assert partition.contains(DIGESTS[0])
    storage.close()


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:-1] + b"?"])
def test_a_damaged_result_counts_as_absent(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    storage = DiskStorage(tmp_path)
    partition = storage.partition("")
    key = result_key(DIGESTS[0], has_size=False)
    partition.put_result(key, b"result")
    (path,) = tmp_path.glob("v1/instances/=/results/*/*")
    path.write_bytes(damage(path.read_bytes()))
    assert partition.get_result(key) is None
    storage.close()


def test_blobs_deleted_by_hand_are_gone_at_once(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    partition = storage.partition("")
    partition.put(DIGESTS[0], BLOB)
    Path(partition.blob_path(DIGESTS[0])).unlink()
    assert not partition.contains(DIGESTS[0])
    storage.close()


def test_leftovers_are_swept_at_start(tmp_path: Path) -> None:
    DiskStorage(tmp_path).close()
    (tmp_path / "v1/tmp/0").write_bytes(b"half a blob")
    storage = DiskStorage(tmp_path)
    assert not list((tmp_path / "v1/tmp").iterdir())
    storage.partition("").put(DIGESTS[0], BLOB)
    storage.close()


def test_a_staged_blob_is_over_once(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    staged = storage.partition("").stage(DIGESTS[0])
    staged.write(BLOB)
    staged.commit()
    with pytest.raises(FailedPrecondition):
        staged.write(b"")
    with pytest.raises(FailedPrecondition):
        staged.commit()
    storage.close()
