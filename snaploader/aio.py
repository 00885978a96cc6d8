"""The loader, the caches and the stores for asyncio and trio: the same names, each call awaited.

    async with aio.SnapshotLoader(SnapshotLoader(file_cache, remote_cache)) as loader:
        key_set = await loader.snapshot_key_set(task, configuration_hash)
        async with await loader.unpack_snapshot(await loader.get_snapshot(key_set), "/run/vm") as unpacked:
            header = await unpacked.chunked_files["disk"].read_at(0, 4096)

Each class here takes the object of the same name that does the work, and gives it back as `wrapped`; both
may be used at once. Arguments, results and errors are those of the method of the same name; where that takes
an object, such as a store to save, one of those here will do too. A call runs on a
thread, of which an event loop has `MAX_CALLS` for all these objects together. Cancelling the task that awaits
it, also by a timeout, ends the call (see `snaploader.CallContext`) before the task goes on: within a tenth of
a second.

Needs anyio (the `aio` extra).
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

import cow
from snaploader import filecache, loader, remote
from snaploader.context import CallContext, Cancellation
from snaploader.digest import DigestFunction
from snaploader.files import remove_tree

log = logging.getLogger(__name__)

P = ParamSpec("P")
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")
U = TypeVar("U")

MAX_CALLS = 64
"""Calls that an event loop has under way at a time; more wait for their turn."""

_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("snaploader_calls")


def _ignore(_: object) -> None:
    """Discard a result that holds nothing."""


async def _call(function: Callable[[], T], discard: Callable[[T], object] = _ignore) -> T:
    """Run `function` on a thread. When the task is cancelled, call it off and wait for its end.

    A result that came too late to be received is given to `discard`.
    """
    limiter = _limiter.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(MAX_CALLS)
        _limiter.set(limiter)
    cancellation = Cancellation()
    begun, ended = threading.Event(), threading.Event()
    results: list[T] = []

    def work() -> T:
        begun.set()
        try:
            with CallContext(cancellation=cancellation).use():
                cancellation.check()
                results.append(function())
            return results[0]
        finally:
            ended.set()

    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except anyio.get_cancelled_exc_class():
        cancellation.cancel()
        # What has not begun finds itself called off, should it still begin.
        if begun.is_set():
            with anyio.CancelScope(shield=True):
                while not ended.is_set():
                    # A shield does not keep asyncio's own Task.cancel() out, should it come once more.
                    with suppress(anyio.get_cancelled_exc_class()):
                        await _on_own_thread(ended.wait)
                for result in results:
                    await _discard(discard, result)
        raise


async def _discard(discard: Callable[[T], object], result: T) -> None:
    """Discard a result. An error of that must not take the place of the cancellation."""
    try:
        await _on_own_thread(lambda: discard(result))
    except Exception as error:  # noqa: BLE001 - whatever it raises
        log.warning("what a cancelled call had opened could not be discarded: %s", error)


async def _on_own_thread(function: Callable[[], object]) -> None:
    await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))


class _Wraps(Protocol[S_co]):
    """An object whose methods call those of another."""

    @property
    def wrapped(self) -> S_co: ...


class _Method(Generic[S, P, T, U]):
    """Describes an async method: that of the wrapped object, on a thread, its result given to `wrap`."""

    def __init__(
        self,
        method: Callable[Concatenate[S, P], T],
        wrap: Callable[[T], U],
        discard: Callable[[T], object],
    ) -> None:
        self._method = method
        self._wrap = wrap
        self._discard = discard
        functools.update_wrapper(cast("Callable[..., object]", self), method)

    def __get__(
        self, instance: _Wraps[S] | None, owner: type | None = None
    ) -> Callable[P, Coroutine[object, None, U]]:
        if instance is None:  # looked up on the class, as documentation tools do
            return cast("Callable[P, Coroutine[object, None, U]]", self)

        @functools.wraps(self._method)
        async def call(*args: P.args, **kwargs: P.kwargs) -> U:
            given: tuple[Any, ...] = tuple(_unwrapped(each) for each in args)
            named: dict[str, Any] = {name: _unwrapped(each) for name, each in kwargs.items()}
            result = await _call(
                lambda: self._method(instance.wrapped, *given, **named), discard=self._discard
            )
            return self._wrap(result)

        return call


def _method(
    method: Callable[Concatenate[S, P], T], *, discard: Callable[[T], object] = _ignore
) -> _Method[S, P, T, T]:
    return _Method(method, lambda result: result, discard)


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class _Wrapper(Generic[C]):
    """What all classes here have: the object that does the work, which is closed with the block."""

    def __init__(self, wrapped: C) -> None:
        self._wrapped = wrapped

    @property
    def wrapped(self) -> C:
        """The object that does the work."""
        return self._wrapped

    async def close(self) -> None:
        """Close the wrapped object. The task may be cancelled meanwhile; this goes on to its end."""
        with anyio.CancelScope(shield=True):
            await _on_own_thread(self._wrapped.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.{type(self).__name__}({self._wrapped!r})"


def _unwrapped(argument: object) -> object:
    """An argument as the wrapped object takes it: its own kind in place of the wrappers here."""
    if isinstance(argument, _Wrapper):
        return argument.wrapped
    if isinstance(argument, Mapping) and any(isinstance(each, _Wrapper) for each in argument.values()):
        return {name: _unwrapped(each) for name, each in argument.items()}
    return argument


class COWStore(_Wrapper[cow.COWStore]):
    """A `cow.COWStore`: a read may have to fetch a chunk, so all that touches content is awaited.

    Checkpoints, chunks one by one, and the store as a file of Python are had of `wrapped` alone.
    """

    read_at = _method(cow.COWStore.read_at)
    readinto_at = _method(cow.COWStore.readinto_at)
    view = _method(cow.COWStore.view)
    write_at = _method(cow.COWStore.write_at)
    resize = _method(cow.COWStore.resize)
    sync = _method(cow.COWStore.sync)
    export = _method(cow.COWStore.export)
    statistics = _method(cow.COWStore.statistics)

    @property
    def size(self) -> int:
        """Size of the file, in bytes."""
        return self.wrapped.size

    @property
    def chunk_size(self) -> int:
        """Bytes in each chunk but perhaps the last."""
        return self.wrapped.chunk_size


class UnpackedSnapshot(_Wrapper[loader.UnpackedSnapshot]):
    """A `snaploader.UnpackedSnapshot` with async stores."""

    def __init__(self, wrapped: loader.UnpackedSnapshot) -> None:
        super().__init__(wrapped)
        self.chunked_files: Mapping[str, COWStore] = {
            name: COWStore(store) for name, store in wrapped.chunked_files.items()
        }
        """Store of each chunked file, by name. Closed with the snapshot."""

    @property
    def snapshot(self) -> loader.Snapshot:
        """The snapshot that was unpacked."""
        return self.wrapped.snapshot

    @property
    def files(self) -> Mapping[str, Path]:
        """Path of each plain file, by name."""
        return self.wrapped.files

    @property
    def directories(self) -> Mapping[str, Path]:
        """Path of each directory, by name."""
        return self.wrapped.directories

    statistics = _method(loader.UnpackedSnapshot.statistics)


def _remove_unpacked(unpacked: loader.UnpackedSnapshot) -> None:
    unpacked.close()
    _remove_written(unpacked)


def _remove_written(written: loader.UnpackedSnapshot | loader.RestoreResult) -> None:
    for file in written.files.values():
        file.unlink(missing_ok=True)
    for directory in written.directories.values():
        remove_tree(directory)


class SnapshotReader(_Wrapper[loader.SnapshotReader]):
    """A `snaploader.SnapshotReader`: what touches content is awaited. Files of Python come of `wrapped`."""

    entry = _method(loader.SnapshotReader.entry)
    names = _method(loader.SnapshotReader.names)
    resolve = _method(loader.SnapshotReader.resolve)
    read_at = _method(loader.SnapshotReader.read_at)
    read_ranges = _method(loader.SnapshotReader.read_ranges)

    @property
    def snapshot(self) -> loader.Snapshot:
        """The snapshot that is read."""
        return self.wrapped.snapshot


class SnapshotLoader(_Wrapper[loader.SnapshotLoader]):
    """A `snaploader.SnapshotLoader`. Progress callbacks are called on its threads, not on the loop's."""

    snapshot_key_set = _method(loader.SnapshotLoader.snapshot_key_set)
    get_snapshot = _method(loader.SnapshotLoader.get_snapshot)
    explain = _method(loader.SnapshotLoader.explain)
    get_snapshot_by_id = _method(loader.SnapshotLoader.get_snapshot_by_id)
    unpack_snapshot = _Method(loader.SnapshotLoader.unpack_snapshot, UnpackedSnapshot, _remove_unpacked)
    read_snapshot = _Method(loader.SnapshotLoader.read_snapshot, SnapshotReader, loader.SnapshotReader.close)
    restore_snapshot = _method(loader.SnapshotLoader.restore_snapshot, discard=_remove_written)
    restore_directory = _method(loader.SnapshotLoader.restore_directory, discard=_remove_written)
    cache_snapshot = _method(loader.SnapshotLoader.cache_snapshot)
    derive_snapshot = _method(loader.SnapshotLoader.derive_snapshot)
    upload_snapshot = _method(loader.SnapshotLoader.upload_snapshot)
    delete_snapshot = _method(loader.SnapshotLoader.delete_snapshot)
    invalidate_snapshot = _method(loader.SnapshotLoader.invalidate_snapshot)


class FileCache(_Wrapper[filecache.FileCache]):
    """A `snaploader.FileCache`."""

    find_missing = _method(filecache.FileCache.find_missing)
    read = _method(filecache.FileCache.read)
    read_to = _method(filecache.FileCache.read_to)
    read_many = _method(filecache.FileCache.read_many)
    write = _method(filecache.FileCache.write)
    write_many = _method(filecache.FileCache.write_many)
    open = _method(filecache.FileCache.open, discard=os.close)
    path = _method(filecache.FileCache.path)
    put_verified = _method(filecache.FileCache.put_verified)
    put_file = _method(filecache.FileCache.put_file)
    put_private = _method(filecache.FileCache.put_private)
    find_private = _method(filecache.FileCache.find_private)
    add_file = _method(filecache.FileCache.add_file)
    writer = _method(filecache.FileCache.writer, discard=lambda writer: writer.close())
    materialize = _method(filecache.FileCache.materialize)
    remove = _method(filecache.FileCache.remove)
    lease = _method(filecache.FileCache.lease, discard=lambda lease: lease.release())
    get_ref = _method(filecache.FileCache.get_ref)
    put_ref = _method(filecache.FileCache.put_ref)
    delete_ref = _method(filecache.FileCache.delete_ref)
    refs = _method(filecache.FileCache.refs)
    pin = _method(filecache.FileCache.pin)
    unpin = _method(filecache.FileCache.unpin)
    pins = _method(filecache.FileCache.pins)
    pinned = _method(filecache.FileCache.pinned)
    entries = _method(filecache.FileCache.entries)
    statistics = _method(filecache.FileCache.statistics)
    prune = _method(filecache.FileCache.prune)
    prune_plan = _method(filecache.FileCache.prune_plan)
    verify = _method(filecache.FileCache.verify)
    sync = _method(filecache.FileCache.sync)

    @property
    def root(self) -> str:
        """The folder, absolute."""
        return self.wrapped.root

    @property
    def group_id(self) -> str:
        """The partition worked in: that of the context in use, else the one that the cache was made with."""
        return self.wrapped.group_id

    @property
    def max_bytes(self) -> int:
        """The bound, in bytes of disk blocks."""
        return self.wrapped.max_bytes


class RemoteCache(_Wrapper[remote.RemoteCache]):
    """A `snaploader.RemoteCache`. What may ask the server is awaited, so these are methods here:
    `digest_function` and `update_enabled`.
    """

    capabilities = _method(remote.RemoteCache.capabilities)
    find_missing = _method(remote.RemoteCache.find_missing)
    read = _method(remote.RemoteCache.read)
    read_to = _method(remote.RemoteCache.read_to)
    read_many = _method(remote.RemoteCache.read_many)
    write = _method(remote.RemoteCache.write)
    write_many = _method(remote.RemoteCache.write_many)
    upload_missing = _method(remote.RemoteCache.upload_missing)
    get_action_result = _method(remote.RemoteCache.get_action_result)
    update_action_result = _method(remote.RemoteCache.update_action_result)
    statistics = _method(remote.RemoteCache.statistics)

    @property
    def instance_name(self) -> str:
        """The instance on the server."""
        return self.wrapped.instance_name

    async def digest_function(self) -> DigestFunction:
        """The function to name blobs with. May ask the server, and raise what that raises."""
        return await _call(lambda: self.wrapped.digest_function)

    async def update_enabled(self) -> bool:
        """Whether action results may be written, as far as the server says; raises as `digest_function`."""
        return await _call(lambda: self.wrapped.update_enabled)
