"""Fetching chunks: who waits for whom, and what a reader gets when a cache or another reader fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, HostFactory, image

from cow import Flight
from snaploader import CallContext, FileCache, SnapshotLoader
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import SnaploaderError
from snaploader.loader.fetch import BlobFetcher, flights_into
from snaploader.testing import EmbeddedServer, FakeCAS
from snaploader.workers import WorkerPool

TIMEOUT_S = 300


class GatedCAS(FakeCAS):
    """Holds every read until `may_read` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.reading = threading.Event()
        self.failures: list[BaseException] = []
        """Raised by the next reads, after they were let through."""

    def add(self, data: bytes) -> Digest:
        digest = Digest.of(data, DigestFunction.SHA256)
        self.write(digest, data)
        return digest

    def read(self, digest: Digest) -> bytes:
        self.reading.set()
        assert self.may_read.wait(TIMEOUT_S)
        if self.failures:
            raise self.failures.pop()
        return super().read(digest)


@pytest.fixture
def cas() -> GatedCAS:
    return GatedCAS()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as workers:
        yield workers


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FileCache]:
    with FileCache(tmp_path / "cache") as file_cache:
        yield file_cache


@pytest.fixture
def boarded(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released once by every thread that comes to wait for another one's fetch."""
    semaphore = threading.Semaphore(0)
    wait = Flight.wait

    def announce_and_wait(flight: Flight[Digest, bytes]) -> None:
        semaphore.release()
        wait(flight)

    monkeypatch.setattr(Flight, "wait", announce_and_wait)
    return semaphore


def await_all(semaphore: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert semaphore.acquire(timeout=TIMEOUT_S)


def test_reads_and_prefetch_are_not_held_up_by_saves_that_occupy_all_workers(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image(1, chunks=64, holes=())
    make_host("a", server).save(content)
    host = make_host("b", server, workers=2)
    snapshot = host.find()
    loaded = set(snapshot.tables["disk"].digests())
    saving, may_save = threading.Semaphore(0), threading.Event()
    put_verified = host.cache.put_verified

    def put_verified_held(digest: Digest, data: Buffer) -> bool:
        if digest not in loaded:
            saving.release()
            assert may_save.wait(TIMEOUT_S)
        return put_verified(digest, data)

    monkeypatch.setattr(host.cache, "put_verified", put_verified_held)

    def save(number: int) -> None:
        path = host.folder / f"disk-{number}"
        path.write_bytes(image(100 + number))
        host.save(chunked_files={"disk": path}, key=snapshot.key, remote=False)

    def read() -> int:
        with host.unpack(snapshot) as unpacked:
            disk = unpacked.chunked_files["disk"]
            for offset in range(0, len(content), CHUNK):
                assert disk.read_at(offset, 9) == content[offset : offset + 9]
            return int(disk.statistics().origins["remote"].prefetched)

    with ThreadPoolExecutor(3) as threads:
        try:
            saves = [threads.submit(save, number) for number in range(2)]
            await_all(saving, 4)  # The two callers, and with them both threads of the pool.
            assert threads.submit(read).result(TIMEOUT_S) > 0
        finally:
            may_save.set()
        for future in saves:
            future.result(TIMEOUT_S)


def test_a_late_landing_of_a_prefetch_leaves_the_flight_of_another_alone(
    cache: FileCache, cas: GatedCAS, pool: WorkerPool
) -> None:
    first, second = cas.add(b"first" * 100), cas.add(b"second" * 100)
    first_kept, may_end = threading.Event(), threading.Event()

    def read_many_in_two_steps(digests: Any, sink: Callable[[Digest, bytes], None]) -> None:
        assert list(digests) == [first, second]
        sink(first, cas.blobs[first])
        first_kept.set()
        assert may_end.wait(TIMEOUT_S)
        sink(second, cas.blobs[second])

    cas.read_many = read_many_in_two_steps  # type: ignore[method-assign]
    fetcher = BlobFetcher(cache, cas, pool)
    fetcher.prefetcher.hint([first, second])
    assert first_kept.wait(TIMEOUT_S)
    cache.remove(first)
    with ThreadPoolExecutor(1) as threads:
        demand = threads.submit(fetcher.read, first)
        assert cas.reading.wait(TIMEOUT_S)
        may_end.set()
        pool.submit(lambda: None).result(TIMEOUT_S)  # Behind the prefetch, which is over now.
        _, leads = flights_into(cache).join((cache.group_id, first))
        assert not leads
        cas.may_read.set()
        assert demand.result(TIMEOUT_S) == b"first" * 100
    assert cas.reads[first] == 1


def test_an_error_of_an_embedders_store_is_logged_and_prefetching_goes_on(
    cache: FileCache, cas: GatedCAS, pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = cas.add(b"first"), cas.add(b"second")
    may_fail, went_on = threading.Event(), threading.Event()

    def read_many(digests: Any, sink: Callable[[Digest, bytes], None]) -> None:
        if first in digests:
            assert may_fail.wait(TIMEOUT_S)
            raise ValueError("a bug of theirs")
        went_on.set()

    cas.read_many = read_many  # type: ignore[method-assign]
    prefetcher = BlobFetcher(cache, cas, pool).prefetcher
    prefetcher.hint([first])
    with CallContext(group_id="team").use():  # what another caller is to have is another batch
        prefetcher.hint([second])
    may_fail.set()
    pool.submit(lambda: None).result(TIMEOUT_S)  # behind the first batch, which is over now
    assert went_on.wait(10)
    assert "a bug of theirs" in caplog.text


def test_hints_to_a_closed_pool_hold_no_reader_up(cache: FileCache, cas: GatedCAS) -> None:
    pool = WorkerPool(2)
    digest = cas.add(b"hinted")
    fetcher = BlobFetcher(cache, cas, pool)
    pool.close()
    fetcher.prefetcher.hint([digest])
    cas.may_read.set()
    assert fetcher.read(digest) == b"hinted"


def test_an_interrupted_owner_does_not_fail_those_who_wait(
    cache: FileCache, cas: GatedCAS, pool: WorkerPool, boarded: threading.Semaphore
) -> None:
    digest = cas.add(b"chunk" * 100)
    cas.failures = [KeyboardInterrupt()]
    fetcher = BlobFetcher(cache, cas, pool)
    with ThreadPoolExecutor(8) as threads:
        readers = [threads.submit(fetcher.read, digest) for _ in range(8)]
        await_all(boarded, 7)
        cas.may_read.set()
        outcomes = [reader.exception(TIMEOUT_S) or reader.result() for reader in readers]
    assert sum(isinstance(outcome, KeyboardInterrupt) for outcome in outcomes) == 1
    assert outcomes.count(b"chunk" * 100) == 7
    assert cas.reads[digest] == 1


def test_two_loaders_on_one_cache_fetch_a_chunk_once(
    make_host: HostFactory, boarded: threading.Semaphore
) -> None:
    host, cas = make_host("a"), GatedCAS()
    with SnapshotLoader(host.cache, cas) as writer:
        host.loader = writer
        host.save(image(2))
    snapshot = host.find()
    host.cache.prune(0)
    digest = snapshot.tables["disk"].get(0)
    assert digest is not None
    with (
        SnapshotLoader(host.cache, cas) as one,
        SnapshotLoader(host.cache, cas) as two,
        one.unpack_snapshot(snapshot, host.folder / "one") as first,
        two.unpack_snapshot(snapshot, host.folder / "two") as second,
        ThreadPoolExecutor(2) as threads,
    ):
        disks = [unpacked.chunked_files["disk"] for unpacked in (first, second)]
        readers = [threads.submit(disk.read_at, 0, 9) for disk in disks]
        await_all(boarded, 1)
        cas.may_read.set()
        results = [reader.result(TIMEOUT_S) for reader in readers]
    assert results == [image(2)[:9]] * 2
    assert cas.reads[digest] == 1


def test_with_a_full_cache_16_readers_share_one_fetch(
    tmp_path: Path, cas: GatedCAS, pool: WorkerPool, boarded: threading.Semaphore
) -> None:
    digest = cas.add(b"chunk" * 1000)
    with FileCache(tmp_path / "tiny", max_bytes=CHUNK) as tiny, ThreadPoolExecutor(16) as threads:
        fetcher = BlobFetcher(tiny, cas, pool)
        readers = [threads.submit(fetcher.read, digest) for _ in range(16)]
        await_all(boarded, 15)
        cas.may_read.set()
        assert [reader.result(TIMEOUT_S) for reader in readers] == [b"chunk" * 1000] * 16
        assert tiny.find_missing([digest]) == {digest}
    assert cas.reads[digest] == 1


def test_a_chunk_that_is_gone_from_the_cache_right_after_it_was_kept_is_served(
    cache: FileCache, cas: GatedCAS, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = cas.add(b"chunk" * 100)
    put_verified = cache.put_verified

    def put_and_lose(digest: Digest, data: Buffer) -> bool:
        added = put_verified(digest, data)
        cache.remove(digest)
        return added

    monkeypatch.setattr(cache, "put_verified", put_and_lose)
    cas.may_read.set()
    assert BlobFetcher(cache, cas, pool).read(digest) == b"chunk" * 100
    assert cas.reads[digest] == 1


def test_a_fetch_that_fails_fails_every_reader_with_an_error_of_its_own(
    cache: FileCache, cas: GatedCAS, pool: WorkerPool, boarded: threading.Semaphore
) -> None:
    digest = cas.add(b"chunk")
    del cas.blobs[digest]
    fetcher = BlobFetcher(cache, cas, pool)
    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(fetcher.read, digest) for _ in range(4)]
        await_all(boarded, 3)
        cas.may_read.set()
        errors = [reader.exception(TIMEOUT_S) for reader in readers]
    assert all(isinstance(error, SnaploaderError) and digest.hash in str(error) for error in errors)
    assert len({id(error) for error in errors}) == 4
    assert cas.reads[digest] == 1
