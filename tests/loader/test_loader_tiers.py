"""Stores in front of stores: what is read from where, what is kept, and when a tier fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, HostFactory, image

from snaploader import FileCache, SnapshotLoader, files
from snaploader.blobstore import BlobStore, TieredStore, TransferStatistics, Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from snaploader.testing import FakeCAS

BLOBS = [b"blob %d" % number * 100 for number in range(5)]
DIGESTS = [Digest.of(blob, DigestFunction.SHA256) for blob in BLOBS]


@pytest.fixture(params=["cas", "file cache"])
def near(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    if request.param == "cas":
        yield FakeCAS()
        return
    with FileCache(tmp_path / "near") as cache:
        yield cache


@pytest.fixture
def middle() -> FakeCAS:
    return FakeCAS()


@pytest.fixture
def far() -> FakeCAS:
    return FakeCAS()


@pytest.fixture
def tiers(near: BlobStore, middle: FakeCAS, far: FakeCAS) -> TieredStore:
    return TieredStore(near, TieredStore(middle, far))


def fill(store: BlobStore, *numbers: int) -> None:
    for number in numbers:
        store.write(DIGESTS[number], BLOBS[number])


def test_a_blob_is_read_from_the_nearest_tier_and_kept_in_those_before_it(
    tiers: TieredStore, near: BlobStore, middle: FakeCAS, far: FakeCAS
) -> None:
    fill(near, 0)
    fill(middle, 1)
    fill(far, 2)
    for number in (0, 1, 2):
        for _ in range(2):
            assert tiers.read(DIGESTS[number]) == BLOBS[number]
    assert not near.find_missing(DIGESTS[:3])
    assert middle.reads[DIGESTS[1]] == 1
    assert DIGESTS[2] in middle.blobs
    assert far.reads == Counter({DIGESTS[2]: 1})
    with pytest.raises(NotFound):
        tiers.read(DIGESTS[3])


def test_many_blobs_come_from_three_tiers_each_once(
    tiers: TieredStore, near: BlobStore, middle: FakeCAS, far: FakeCAS
) -> None:
    fill(near, 0)
    fill(middle, 1, 2)
    fill(far, 0, 1, 2, 3, 4)
    got: Counter[bytes] = Counter()
    tiers.read_many([*DIGESTS, DIGESTS[0]], lambda digest, data: got.update([data]))
    assert got == Counter(BLOBS)
    assert far.reads == Counter([DIGESTS[3], DIGESTS[4]])
    assert not near.find_missing(DIGESTS)


def test_missing_is_what_no_tier_holds(
    tiers: TieredStore, near: BlobStore, middle: FakeCAS, far: FakeCAS
) -> None:
    fill(near, 0)
    fill(middle, 1)
    fill(far, 2)
    assert tiers.find_missing(DIGESTS) == {DIGESTS[3], DIGESTS[4]}


def test_what_is_written_is_in_every_tier(
    tiers: TieredStore, near: BlobStore, middle: FakeCAS, far: FakeCAS
) -> None:
    tiers.write(DIGESTS[0], BLOBS[0])
    done = tiers.write_many(Upload(digest, blob) for digest, blob in zip(DIGESTS, BLOBS, strict=True))
    assert done.blobs >= 4
    for store in (near, middle, far):
        assert not store.find_missing(DIGESTS)


def test_a_stream_comes_from_the_nearest_tier(tiers: TieredStore, near: BlobStore, far: FakeCAS) -> None:
    fill(near, 0)
    fill(far, 1)
    for number in (0, 1):
        pieces: list[Any] = []
        tiers.read_to(DIGESTS[number], lambda piece, to=pieces: to.append(bytes(piece)))  # type: ignore[misc]
        assert b"".join(pieces) == BLOBS[number]


class Failing(FakeCAS):
    """Says that it has what it cannot give, and takes nothing."""

    error: Exception = DataLoss("rotten")

    def find_missing(self, digests: Any) -> set[Digest]:
        return set()

    def read(self, digest: Digest) -> bytes:
        raise self.error

    def read_many(self, digests: Any, sink: Any) -> None:
        raise self.error

    def write_many(self, uploads: Any) -> TransferStatistics:
        raise ResourceExhausted("full")


@pytest.mark.parametrize("error", [DataLoss("rotten"), NotFound("gone")])
def test_a_tier_that_is_damaged_or_full_is_passed_over(far: FakeCAS, error: Exception) -> None:
    failing = Failing()
    failing.error = error
    tiers = TieredStore(failing, far)
    fill(far, 0, 1)
    assert tiers.read(DIGESTS[0]) == BLOBS[0]
    got: dict[Digest, bytes] = {}
    tiers.read_many(DIGESTS[:2], got.__setitem__)
    assert got == dict(zip(DIGESTS[:2], BLOBS, strict=False))
    tiers.write(DIGESTS[2], BLOBS[2])
    assert DIGESTS[2] in far.blobs
    with pytest.raises(NotFound) as caught:
        tiers.read(DIGESTS[3])
    assert (["in the store before it: rotten"] if isinstance(error, DataLoss) else []) == getattr(
        caught.value, "__notes__", []
    )


class Noting(FakeCAS):
    """Remembers what it was told to be verified."""

    def __init__(self) -> None:
        super().__init__()
        self.verified: dict[Digest, bool] = {}

    def write_many(self, uploads: Any) -> TransferStatistics:
        uploads = list(uploads)
        self.verified |= {upload.digest: upload.verified for upload in uploads}
        return super().write_many(uploads)


def test_a_near_store_is_told_which_bytes_were_hashed_already(far: FakeCAS) -> None:
    near = Noting()
    tiers = TieredStore(near, far)
    fill(far, 0, 1)
    tiers.read(DIGESTS[0])
    tiers.read_many([DIGESTS[1]], lambda *_: None)
    tiers.write_many([Upload(DIGESTS[2], BLOBS[2], verified=True), Upload(DIGESTS[3], BLOBS[3])])
    tiers.write(DIGESTS[4], BLOBS[4])
    assert near.verified == dict(zip(DIGESTS, (True, True, True, False, False), strict=True))


def test_a_file_cache_does_not_hash_again_what_it_is_told_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blob").write_bytes(BLOBS[1])
    hashed: list[str] = []
    hash_bytes = files.hash_bytes
    monkeypatch.setattr(files, "hash_bytes", lambda *args: hashed.append(hash_bytes(*args)) or hashed[-1])
    with FileCache(tmp_path / "cache") as cache:
        done = cache.write_many(
            [
                Upload(DIGESTS[0], BLOBS[0], verified=True),
                Upload(DIGESTS[1], tmp_path / "blob", verified=True),
                Upload(DIGESTS[2], BLOBS[2]),
            ]
        )
        assert (done.blobs, hashed) == (3, [DIGESTS[2].hash])
        with pytest.raises(DataLoss):
            cache.write_many([Upload(DIGESTS[3], BLOBS[3][1:], verified=True)])


def test_what_a_sink_raises_is_raised_and_ends_the_transfer(
    tiers: TieredStore, near: BlobStore, far: FakeCAS
) -> None:
    fill(near, 0)
    fill(far, 0, 1)

    def refuse(digest: Digest, data: bytes) -> None:
        raise NotFound("the sink's own")

    for digest in DIGESTS[:2]:
        with pytest.raises(NotFound, match="the sink's own"):
            tiers.read_many([digest], refuse)
    assert far.reads[DIGESTS[0]] == 0


def test_a_loader_reads_chunks_from_a_peer_before_it_asks_the_remote_cache(
    make_host: HostFactory, tmp_path: Path
) -> None:
    remote, peer = FakeCAS(), FakeCAS()
    saver = make_host("a", remote=remote)
    content = image(1, chunks=8, holes=())
    saver.save(content)
    keys = saver.keys()
    for name in ("first", "second"):
        with (
            FileCache(tmp_path / name) as cache,
            SnapshotLoader(cache, remote, peers=[peer], workers=2) as loader,
            loader.unpack_snapshot(loader.get_snapshot(keys), tmp_path / f"{name}-out") as unpacked,
        ):
            before = remote.reads.total()
            disk = unpacked.chunked_files["disk"]
            assert disk.read_at(0, len(content)) == content
            asked = remote.reads.total() - before
            assert asked == (-(-len(content) // CHUNK) if name == "first" else 0)
    assert set(peer.blobs) <= set(remote.blobs)


def test_peers_without_a_remote_cache_are_refused(tmp_path: Path) -> None:
    with FileCache(tmp_path / "cache") as cache, pytest.raises(InvalidArgument, match="peers"):
        SnapshotLoader(cache, peers=[FakeCAS()])
