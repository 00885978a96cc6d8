"""Calls that are called off or whose time is up: nothing is left, and all or nothing is to be seen."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, CONFIGURATION, Host, HostFactory, image, task

from cow import Flight
from snaploader import BearerToken, CallContext, Cancellation, FileCache, SnapshotLoader
from snaploader.context import current
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import Cancelled, DeadlineExceeded, NotFound, PermissionDenied
from snaploader.filecache.retention import Lease
from snaploader.files import remove_tree
from snaploader.loader.fetch import BlobFetcher
from snaploader.loader.results import Snapshot
from snaploader.testing import CallGate, EmbeddedServer, FakeCAS, Fault
from snaploader.workers import WorkerPool

TIMEOUT_S = 300


class Countdown(Cancellation):
    """Is set when it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = itertools.count(looks, -1)

    def check(self) -> None:
        if next(self._left) == 0:
            self.cancel()
        super().check()


def sweep(attempt: Callable[[int, CallContext], object]) -> int:
    """Call off an attempt at its first look, the next one at its second, and so on; the first that ends."""
    for number in range(5000):
        try:
            attempt(number, CallContext(cancellation=Countdown(number)))
        except Cancelled:
            continue
        return number
    raise AssertionError("no attempt succeeded")


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> set[Lease]:
    """Those that are held."""
    held: set[Lease] = set()
    made, release = Lease.__init__, Lease.release

    def make_and_note(lease: Lease, *args: Any, **kwargs: Any) -> None:
        made(lease, *args, **kwargs)
        held.add(lease)

    def release_and_note(lease: Lease) -> None:
        release(lease)
        held.discard(lease)

    monkeypatch.setattr(Lease, "__init__", make_and_note)
    monkeypatch.setattr(Lease, "release", release_and_note)
    return held


def fill(folder: Path) -> Path:
    """A directory with files of all kinds."""
    (folder / "sub").mkdir(parents=True)
    (folder / "small").write_bytes(b"small")
    (folder / "sub" / "big").write_bytes(image(7, chunks=4))
    (folder / "link").symlink_to("small")
    return folder


def everything(host: Host, seed: int = 1) -> dict[str, Any]:
    """The arguments of a save of all kinds of things."""
    disk, plain = host.folder / "disk", host.folder / "plain"
    disk.write_bytes(image(seed))
    plain.write_bytes(b"plain" * 1000)
    home = host.folder / "home"
    return {
        "chunked_files": {"disk": disk},
        "files": {"plain": plain},
        "directories": {"home": home if home.exists() else fill(home)},
    }


def by_id(host: Host, snapshot_id: str, policy: str = "local-first") -> Snapshot | None:
    try:
        return host.loader.get_snapshot_by_id(snapshot_id, read_policy=policy)
    except NotFound:
        return None


def by_branch(host: Host, branch: str, policy: str = "local-first") -> str | None:
    """The branch that the best snapshot is of."""
    try:
        return host.find(branch, policy).key.ref
    except NotFound:
        return None


def scratch(folder: Path) -> list[Path]:
    """What calls left in a folder or below it."""
    return list(folder.rglob(".snaploader-*"))


def test_a_save_that_is_called_off_is_to_be_seen_whole_or_not_at_all(
    make_host: HostFactory, server: EmbeddedServer, leases: set[Lease]
) -> None:
    host = make_host("a", server)
    first = everything(host)
    host.save(**first, branch="first", pin="first")
    snapshot = host.find("first")
    with host.unpack(snapshot) as unpacked:
        store = unpacked.chunked_files["disk"]

        def attempt(number: int, context: CallContext) -> None:
            store.write_at(0, number.to_bytes(8, "big"))
            try:
                host.loader.cache_snapshot(
                    host.keys(f"b{number}").write_key,
                    files=first["files"],
                    directories=first["directories"],
                    chunked_files={"disk": store},
                    chunk_size=CHUNK,
                    snapshot_id=f"s{number}",
                    pin=f"p{number}",
                    vm_configuration=CONFIGURATION,
                    context=context,
                )
            finally:
                is_saved = by_id(host, f"s{number}", "local-only") is not None
                assert (by_branch(host, f"b{number}", "local-only") == f"b{number}") is is_saved
                assert (f"p{number}" in host.cache.pins()) is is_saved
                assert (len(store.dirty_chunks) == 0) is is_saved
                assert len(leases) == 1  # of what is unpacked

        count = sweep(attempt)
        assert store.read_at(0, 8) == count.to_bytes(8, "big")
    assert count > 20
    assert not leases
    assert not scratch(host.folder / "cache")
    host.loader.close()  # what was being published is by then
    other = make_host("b", server)
    seen = [number for number in range(count + 1) if by_id(other, f"s{number}", "remote-only")]
    assert seen == [n for n in range(count + 1) if by_branch(other, f"b{n}", "remote-only") == f"b{n}"]
    assert count in seen
    assert len(seen) < count
    assert other.load(f"b{count}")[:8] == count.to_bytes(8, "big")


def test_what_only_reads_can_be_called_off_at_every_step(
    make_host: HostFactory, server: EmbeddedServer, leases: set[Lease], tmp_path: Path
) -> None:
    writer = make_host("a", server)
    given = everything(writer)
    saved = writer.save(**given)
    host = make_host("b", server)
    out = tmp_path / "out"
    out.mkdir()
    empty = out / "was-there"
    empty.mkdir()

    def fresh() -> None:
        host.cache.prune(0)
        assert not leases
        assert not scratch(out)
        assert sorted(out.iterdir()) == [empty]
        assert not list(empty.iterdir())

    def find(_: int, context: CallContext) -> None:
        fresh()
        key_set = host.loader.snapshot_key_set(task(), "conf", context=context)
        host.loader.get_snapshot(key_set, "newest", context=context)

    def look_up(_: int, context: CallContext) -> None:
        fresh()
        host.loader.get_snapshot_by_id(saved.snapshot_id, context=context)

    assert sweep(find) > 3
    assert sweep(look_up) > 3
    snapshot = host.find()

    def unpack(_: int, context: CallContext) -> None:
        fresh()
        with host.loader.unpack_snapshot(snapshot, out / "unpacked", writable_files=True, context=context):
            pass

    def restore(_: int, context: CallContext) -> None:
        fresh()
        host.loader.restore_snapshot(snapshot, out / "deep" / "restored", context=context)

    def restore_home(number: int, context: CallContext) -> None:
        fresh()
        target = empty if number % 2 else out / "deep" / "home"
        index = tmp_path / "home.index"
        host.loader.restore_directory(snapshot, "home", target, index=index, context=context)

    for attempt, target in ((unpack, out / "unpacked"), (restore, out / "deep" / "restored")):
        assert sweep(attempt) > 10
        assert (target / "plain").read_bytes() == b"plain" * 1000
        assert (target / "home" / "sub" / "big").read_bytes() == image(7, chunks=4)
        for path in sorted(out.glob("*")):
            if path != empty:
                remove_tree(path)
    assert sweep(restore_home) > 10


def test_what_changes_what_stands_remotely_does_so_whole_or_not_at_all(
    make_host: HostFactory, server: EmbeddedServer, leases: set[Lease]
) -> None:
    host = make_host("a", server)
    given = everything(host)
    origin = by_id(host, host.save(**given).snapshot_id)
    assert origin is not None

    def derive(number: int, context: CallContext) -> None:
        host.loader.derive_snapshot(
            origin, snapshot_id=f"d{number}", names=["disk"], pin=f"d{number}", context=context
        )

    def upload(number: int, context: CallContext) -> None:
        host.save(**given, remote=False, snapshot_id=f"u{number}")
        snapshot = by_id(host, f"u{number}", "local-only")
        assert snapshot is not None
        host.loader.upload_snapshot(snapshot, context=context)

    def delete(number: int, context: CallContext) -> None:
        host.save(**given, snapshot_id=f"x{number}")
        host.loader.delete_snapshot(f"x{number}", context=context)

    derived, uploaded, deleted = sweep(derive), sweep(upload), sweep(delete)
    assert derived > 5
    assert uploaded > 5
    assert deleted >= 1
    assert not leases
    key = host.keys().write_key
    before = key.version_id
    assert sweep(lambda _, context: host.loader.invalidate_snapshot(key, context=context)) >= 1
    assert host.keys().write_key.version_id != before
    host.loader.close()
    pins = host.cache.pins()
    with SnapshotLoader(host.cache, host.remote) as loader:
        host.loader = loader
        other = make_host("b", server)

        def is_here(id_: str) -> bool:
            return by_id(host, id_, "local-only") is not None

        def is_there(id_: str) -> bool:
            return by_id(other, id_, "remote-only") is not None

        for number in range(derived + 1):
            assert is_here(f"d{number}") == is_there(f"d{number}") == (f"d{number}" in pins)
        assert is_here(f"d{derived}")
        assert not is_here("d0")
        assert is_there(f"u{uploaded}")
        assert not is_there("u0")
        for number in range(deleted + 1):
            assert is_here(f"x{number}") == is_there(f"x{number}")
        assert not is_here(f"x{deleted}")


@pytest.mark.parametrize("by", ["cancellation", "deadline"])
def test_a_call_that_waits_for_a_server_that_hangs_ends(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path, by: str
) -> None:
    writer = make_host("a", server)
    given = everything(writer)
    writer.save(**given)
    host = make_host("b", server)
    snapshot = host.find()
    key_set = host.keys()
    given = everything(host, seed=2)
    calls: dict[str, Callable[[CallContext], object]] = {
        "GetActionResult": lambda context: host.loader.get_snapshot(key_set, "newest", context=context),
        "FindMissingBlobs": lambda context: host.save(**given, context=context),
        "BatchUpdateBlobs": lambda context: host.save(**given, context=context),
        "UpdateActionResult": lambda context: host.save(**given, context=context),
        "BatchReadBlobs": lambda context: host.loader.restore_snapshot(
            snapshot, tmp_path / "out", context=context
        ),
    }
    with ThreadPoolExecutor(1) as threads:
        for method, call in calls.items():
            host.cache.prune(0)
            gate, flag = CallGate(), Cancellation()
            server.faults.add(Fault(method, times=None, gate=gate))
            bounds = {"cancellation": flag} if by == "cancellation" else {"timeout_s": 0.2}
            ended = threads.submit(call, CallContext(**bounds))  # type: ignore[arg-type]
            try:
                if by == "cancellation":
                    assert gate.wait_reached(TIMEOUT_S)
                    flag.cancel()
                error = ended.exception(TIMEOUT_S)
                assert type(error) is (Cancelled if by == "cancellation" else DeadlineExceeded), method
            finally:
                gate.open()
                server.faults.clear()
            assert not (tmp_path / "out").exists()
    assert host.read(snapshot) == image(1)


def test_a_reader_that_is_called_off_leaves_another_ones_fetch_alone(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_host("a", server).save(image(1))
    host = make_host("b", server)
    waiting = threading.Semaphore(0)
    when_finished = Flight.when_finished

    def announce_and_join(flight: Flight[Any, Any], callback: Callable[[], object]) -> None:
        waiting.release()
        when_finished(flight, callback)

    monkeypatch.setattr(Flight, "when_finished", announce_and_join)
    with host.unpack(host.find()) as unpacked, ThreadPoolExecutor(3) as threads:
        disk = unpacked.chunked_files["disk"]

        for called_off in ("leader", "follower"):
            gate = CallGate()
            chunk = 0 if called_off == "leader" else 1
            server.faults.add(Fault("BatchReadBlobs", times=1, gate=gate))
            server.faults.add(Fault("Read", times=1, gate=gate))

            def read_chunk(flag: Cancellation, offset: int = chunk * CHUNK) -> bytes:
                with CallContext(cancellation=flag).use():
                    return bytes(disk.read_at(offset, 9))

            leads, follows = Cancellation(), Cancellation()
            leader = threads.submit(read_chunk, leads)
            try:
                assert gate.wait_reached(TIMEOUT_S)
                follower = threads.submit(read_chunk, follows)
                assert waiting.acquire(timeout=TIMEOUT_S)
                if called_off == "leader":
                    leads.cancel()
                    assert isinstance(leader.exception(TIMEOUT_S), Cancelled)
                    other = follower
                else:
                    follows.cancel()
                    assert isinstance(follower.exception(TIMEOUT_S), Cancelled)
                    other = leader
                if called_off == "follower":
                    gate.open()
                assert other.result(TIMEOUT_S) == image(1)[chunk * CHUNK : chunk * CHUNK + 9]
            finally:
                gate.open()
                server.faults.clear()


class Guarded(FakeCAS):
    """Serves those who bring the right token, once `may_read` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read, self.reading = threading.Event(), threading.Event()

    def read(self, digest: Digest) -> bytes:
        self.reading.set()
        assert self.may_read.wait(TIMEOUT_S)
        if current().credentials != BearerToken("right"):
            raise PermissionDenied("the token is wrong")
        return super().read(digest)


def test_that_another_caller_was_refused_a_blob_is_no_answer_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cas, waiting = Guarded(), threading.Event()
    digest = Digest.of(b"chunk", DigestFunction.SHA256)
    cas.write(digest, b"chunk")
    wait = Flight.wait

    def announce_and_wait(flight: Flight[Any, Any]) -> None:
        waiting.set()
        wait(flight)

    monkeypatch.setattr(Flight, "wait", announce_and_wait)
    with FileCache(tmp_path / "cache") as cache, WorkerPool(2) as pool, ThreadPoolExecutor(2) as threads:
        fetcher = BlobFetcher(cache, cas, pool)

        def read(token: str) -> bytes:
            with CallContext(credentials=BearerToken(token)).use():
                return fetcher.read(digest)

        wrong = threads.submit(read, "wrong")
        assert cas.reading.wait(TIMEOUT_S)
        right = threads.submit(read, "right")
        assert waiting.wait(TIMEOUT_S)
        cas.may_read.set()
        assert isinstance(wrong.exception(TIMEOUT_S), PermissionDenied)
        assert right.result(TIMEOUT_S) == b"chunk"


def test_what_is_published_when_its_call_is_called_off_is_published_whole(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    given = everything(host)
    keys = host.keys()
    gate, flag = CallGate(), Cancellation()
    server.faults.add(Fault("UpdateActionResult", gate=gate))
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(
            host.save, key=keys.write_key, snapshot_id="s", context=CallContext(cancellation=flag), **given
        )
        try:
            assert gate.wait_reached(TIMEOUT_S)
            flag.cancel()
            error = saving.exception(TIMEOUT_S)
            assert isinstance(error, Cancelled)
            assert "is completed without it" in error.__notes__[0]
        finally:
            gate.open()
    host.loader.close()
    other = make_host("b", server)
    assert other.load() == image(1)
    assert by_id(other, "s", "remote-only") is not None
