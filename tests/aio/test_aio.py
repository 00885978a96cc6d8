"""The async classes: the same names, and cancellation that ends the call, on asyncio and on trio."""

import asyncio
import inspect
import threading

import anyio
import pytest

import cow
from snaploader import FileCache, RemoteCache, SnapshotKey, SnapshotLoader, VMConfiguration, aio
from snaploader.context import CallContext, current
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import Cancelled, DeadlineExceeded, NotFound
from snaploader.loader import SnapshotReader, UnpackedSnapshot
from snaploader.testing import FakeCAS

PAIRS = [
    (aio.SnapshotLoader, SnapshotLoader, set()),
    (aio.FileCache, FileCache, set()),
    (aio.RemoteCache, RemoteCache, set()),
    (aio.SnapshotReader, SnapshotReader, {"open"}),
    (aio.UnpackedSnapshot, UnpackedSnapshot, set()),
    (
        aio.COWStore,
        cow.COWStore,
        {"checkpoint", "chunk_count", "closed", "data_dir", "dirty_chunks", "dirty_pages"}
        | {"from_file", "is_hole", "open", "source"},
    ),
]


@pytest.fixture(params=["asyncio", "trio"])
def run(request):
    """Runs an async function on one of the two event loops."""
    return lambda function: anyio.run(function, backend=request.param)


@pytest.fixture
def loader(tmp_path):
    with FileCache(tmp_path / "cache") as cache, SnapshotLoader(cache, FakeCAS()) as loader:
        yield loader


class Waiting:
    """Stands for a loader whose calls wait for ever, or until they are called off."""

    def __init__(self):
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.release = threading.Event()
        self.closed = []

    def get_snapshot(self, _key_set):
        self.begun.set()
        try:
            current().wait(self.release)
        finally:
            self.ended.set()

    def close(self):
        self.closed.append(self)


class Late(Waiting):
    """Its calls do not heed being called off."""

    def get_snapshot(self, _key_set):
        self.begun.set()
        self.release.wait(60)
        return self


def wait_in_thread(event):
    return anyio.to_thread.run_sync(event.wait, limiter=anyio.CapacityLimiter(1))


waiting_call = aio._method(Waiting.get_snapshot)
late_call = aio._method(Late.get_snapshot, discard=lambda late: late.close())


class Calls:
    def __init__(self, wrapped):
        self.wrapped = wrapped

    wait = waiting_call
    late = late_call


@pytest.mark.parametrize(("wrapper", "wrapped", "apart"), PAIRS)
def test_every_public_method_has_its_async_twin(wrapper, wrapped, apart):
    def names(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    attributes = {"snapshot", *getattr(wrapped, "__dataclass_fields__", ())}  # which only instances have
    assert names(wrapper) - attributes - {"wrapped"} == names(wrapped) - attributes - apart


def test_the_twins_have_the_signatures_and_documents_of_the_originals():
    twin = aio.FileCache.__dict__["put_file"]
    assert twin.__doc__ == FileCache.put_file.__doc__
    bound = aio.FileCache(object()).put_file  # type: ignore[arg-type]
    assert inspect.iscoroutinefunction(bound)
    assert list(inspect.signature(bound).parameters) == list(inspect.signature(FileCache.put_file).parameters)


def test_a_snapshot_is_saved_found_read_and_restored(run, loader, tmp_path):
    (tmp_path / "disk").write_bytes(b"x" * 300_000)

    async def story():
        async with aio.SnapshotLoader(loader) as aloader:
            saved = await aloader.cache_snapshot(
                SnapshotKey(ref="main"),
                chunked_files={"disk": tmp_path / "disk"},
                vm_configuration=VMConfiguration(),
            )
            snapshot = await aloader.get_snapshot_by_id(saved.snapshot_id)
            async with await aloader.unpack_snapshot(snapshot, tmp_path / "out") as unpacked:
                store = unpacked.chunked_files["disk"]
                await store.write_at(0, b"y")
                found = await store.read_at(0, 2), store.size, unpacked.snapshot, dict(unpacked.files)
                again = await aloader.cache_snapshot(
                    SnapshotKey(ref="again"), chunked_files=unpacked.chunked_files
                )
                counts = await unpacked.statistics(), await store.statistics(), store.chunk_size
            restored = await aloader.restore_snapshot(snapshot, tmp_path / "whole")
            async with await aloader.read_snapshot(
                await aloader.get_snapshot_by_id(again.snapshot_id)
            ) as reader:
                names = await reader.names(""), await reader.resolve("disk"), await reader.entry("disk")
                changed = await reader.read_at("disk", 0, 2)
        assert counts[0] == {"disk": counts[1]}
        assert counts[2] > 0
        assert (list(names[0]), names[1], names[2].size_bytes, changed) == (["disk"], "disk", 300_000, b"yx")
        return found, snapshot, restored

    found, snapshot, restored = run(story)
    assert found == (b"yx", 300_000, snapshot, {})
    assert restored.files["disk"].read_bytes() == b"x" * 300_000


def test_the_caches_answer_too(run, tmp_path):
    digest = Digest.of(b"content", DigestFunction.SHA256)

    async def story():
        async with aio.FileCache(FileCache(tmp_path / "cache")) as cache:
            await cache.put_verified(digest, b"content")
            told = cache.root == cache.wrapped.root and cache.group_id == ""
            has_bound = (await cache.statistics()).max_bytes == cache.max_bytes > 0
            return await cache.read(digest), told, has_bound, repr(cache)

    data, told, has_bound, shown = run(story)
    assert (data, told, has_bound) == (b"content", True, True)
    assert shown.startswith("aio.FileCache(")


def test_errors_are_those_of_the_method(run, loader):
    async def story():
        await aio.SnapshotLoader(loader).get_snapshot_by_id("nobody")

    with pytest.raises(NotFound, match="nobody"):
        run(story)


def test_the_context_of_the_task_is_that_of_the_call(run):
    class Telling(Waiting):
        def get_snapshot(self, _key_set):
            return current().group_id

    class TellingCalls(Calls):
        wait = aio._method(Telling.get_snapshot)

    async def story():
        with CallContext(group_id="of the task").use():
            return await TellingCalls(Telling()).wait(None)

    assert run(story) == "of the task"


def test_cancelling_the_task_ends_the_call_before_the_task_goes_on(run):
    waiting = Waiting()

    async def story():
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(Calls(waiting).wait, None)
                await wait_in_thread(waiting.begun)
                group.cancel_scope.cancel()
            scope.cancel()
        return waiting.ended.is_set()

    assert run(story)


def test_a_timeout_of_the_event_loop_ends_the_call(run):
    waiting = Waiting()

    async def story():
        with anyio.move_on_after(0.01) as scope:
            await Calls(waiting).wait(None)
        return scope.cancelled_caught and (waiting.ended.is_set() or not waiting.begun.is_set())

    assert run(story)


def test_cancelling_an_asyncio_task_ends_the_call():
    waiting = Waiting()

    async def story():
        task = asyncio.create_task(Calls(waiting).wait(None))
        await asyncio.to_thread(waiting.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return waiting.ended.is_set()

    assert asyncio.run(story())


def test_asyncio_timeouts_are_timeouts():
    waiting = Waiting()

    async def story():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Calls(waiting).wait(None)

    asyncio.run(story())


def test_a_deadline_of_the_context_is_an_error_of_the_call(run):
    async def story():
        with CallContext(timeout_s=0.01).use():
            await Calls(Waiting()).wait(None)

    with pytest.raises(DeadlineExceeded):
        run(story)


def test_a_call_that_waits_for_its_turn_never_begins_when_it_is_cancelled(run, monkeypatch):
    monkeypatch.setattr(aio, "MAX_CALLS", 1)
    first, second = Waiting(), Waiting()

    async def story():
        async with anyio.create_task_group() as group:
            group.start_soon(Calls(first).wait, None)
            await wait_in_thread(first.begun)
            with anyio.move_on_after(0.01):
                await Calls(second).wait(None)
            first.release.set()
        return second.begun.is_set()

    assert run(story) is False


def test_what_was_opened_too_late_to_be_received_is_discarded(run):
    late = Late()

    async def story():
        async with anyio.create_task_group() as group:
            group.start_soon(Calls(late).late, None)
            await wait_in_thread(late.begun)
            group.cancel_scope.cancel()
            late.release.set()
        return late.closed

    assert run(story) == [late]


def test_an_error_of_discarding_does_not_take_the_place_of_the_cancellation(run, caplog):
    class Broken(Late):
        def close(self):
            super().close()
            raise OSError("the disk is gone")

    broken = Broken()

    async def story():
        async with anyio.create_task_group() as group:
            group.start_soon(Calls(broken).late, None)
            await wait_in_thread(broken.begun)
            group.cancel_scope.cancel()
            broken.release.set()
        return broken.closed

    assert run(story) == [broken]
    assert "the disk is gone" in caplog.text


def test_what_the_remote_cache_may_have_to_ask_for_is_awaited(run):
    class Remote:
        instance_name = "main"

        @property
        def digest_function(self):
            return DigestFunction.BLAKE3 if threading.current_thread() is not loop else None

        update_enabled = digest_function

    loop = threading.current_thread()
    remote = aio.RemoteCache(Remote())  # type: ignore[arg-type]

    async def story():
        return await remote.digest_function(), await remote.update_enabled(), remote.instance_name

    assert run(story) == (DigestFunction.BLAKE3, DigestFunction.BLAKE3, "main")


def test_an_unpacked_snapshot_that_nobody_receives_leaves_no_files(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir" / "sub").mkdir(parents=True)
    cleanup = []

    class Cleanup:
        def close(self):
            cleanup.append("closed")

    unpacked = UnpackedSnapshot(
        None,
        {"file": tmp_path / "file"},
        {},
        {"dir": tmp_path / "dir"},
        Cleanup(),  # type: ignore[arg-type]
    )
    aio._remove_unpacked(unpacked)
    assert cleanup == ["closed"]
    assert list(tmp_path.iterdir()) == []


def test_called_off_from_elsewhere_is_the_error_of_the_library(run):
    """Not the event loop's: nobody cancelled the task."""

    class Closing(Waiting):
        def get_snapshot(self, _key_set):
            raise Cancelled("the loader was closed")

    class ClosingCalls(Calls):
        wait = aio._method(Closing.get_snapshot)

    async def story():
        await ClosingCalls(Closing()).wait(None)

    with pytest.raises(Cancelled):
        run(story)


def test_a_store_has_the_calls_that_touch_content():
    for name in ("read_at", "readinto_at", "view", "write_at", "resize", "sync", "export", "statistics"):
        assert aio.COWStore.__dict__[name].__doc__ == getattr(cow.COWStore, name).__doc__


def test_a_task_that_is_cancelled_twice_still_waits_for_the_end_of_its_call():
    late = Late()

    async def story():
        task = asyncio.create_task(Calls(late).late(None))
        await asyncio.to_thread(late.begun.wait)
        for _ in range(2):
            task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        is_waiting = not task.done()
        late.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return is_waiting

    assert asyncio.run(story())
    assert late.closed == [late]


def test_what_was_restored_too_late_to_be_received_is_removed(loader, tmp_path):
    (tmp_path / "disk").write_bytes(b"x" * 1000)
    saved = loader.cache_snapshot(SnapshotKey(ref="main"), files={"disk": tmp_path / "disk"})
    result = loader.restore_snapshot(loader.get_snapshot_by_id(saved.snapshot_id), tmp_path / "out")
    aio._remove_written(result)
    assert list((tmp_path / "out").iterdir()) == []
    for name in ("restore_snapshot", "restore_directory"):
        assert aio.SnapshotLoader.__dict__[name]._discard is aio._remove_written
