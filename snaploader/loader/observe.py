"""What a loader tells its observer: each of its calls, and what it brings from behind the file cache."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from snaploader.blobstore import BlobStore, Sink, TransferStatistics, Upload
from snaploader.context import current
from snaploader.digest import Buffer, Digest
from snaploader.keys import SnapshotKey, SnapshotKeySet, SnapshotTask
from snaploader.loader.results import DeriveResult, RestoreResult, SaveResult, Snapshot
from snaploader.telemetry import NOBODY, Observer

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_SUBJECTS = ("snapshot", "key_set", "key", "task", "snapshot_id")
"""The parameters that say what a call is about."""


def observed(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Decorator of a loader's method: its calls are operations. The object has its observer in `_observer`.

    It stands below `in_context`, so that an operation knows who asks.
    """
    name = f"loader.{method.__name__}"
    parameters = list(inspect.signature(method).parameters)[1:]
    places = {subject: parameters.index(subject) for subject in _SUBJECTS if subject in parameters}

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> T:
        observer: Observer = self._observer
        if observer is NOBODY:
            return method(self, *args, **kwargs)
        attributes = _caller()
        for subject, place in places.items():
            value = args[place] if place < len(args) else kwargs.get(subject)
            if subject == "snapshot_id" and value is not None:
                attributes["snapshot_id"] = value
            attributes |= _told_of(value)
        with observer.operation(name, **attributes) as operation:
            result = method(self, *args, **kwargs)
            operation.set(**_told_of(result))
            return result

    return cast("Callable[Concatenate[S, P], T]", call)


def _caller() -> dict[str, object]:
    """Who asks, as far as the context says."""
    context = current()
    told: dict[str, object] = {}
    if context.group_id is not None:
        told["group_id"] = context.group_id
    if context.request_metadata is not None:
        told["action_id"] = context.request_metadata.action_id
        told["invocation_id"] = context.request_metadata.tool_invocation_id
    return told


def _told_of(value: object) -> dict[str, object]:
    """What an operation tells of one of its arguments, or of its result."""
    match value:
        case SnapshotTask():
            ids = ("task_id", "invocation_id", "action_digest")
            return {name: getattr(value, name) for name in ids if getattr(value, name)}
        case SnapshotKeySet():
            return {"key": value.write_key}
        case SnapshotKey():
            return {"key": value}
        case Snapshot():
            found = {"snapshot_id": value.key.snapshot_id} if value.key.snapshot_id else {}
            return {"key": value.key, "source": value.source, "degraded": value.degraded, **found}
        case SaveResult():
            names = ("snapshot_id", "saved_remotely", "uploaded_blobs", "uploaded_bytes")
            return {name: getattr(value, name) for name in names}
        case DeriveResult():
            return _told_of(value.snapshot) | {"uploaded_bytes": value.uploaded_bytes}
        case RestoreResult():
            return {
                name: getattr(value, name) for name in ("written_bytes", "fetched_blobs", "fetched_bytes")
            }
    return {}


class ObservedStore:
    """A blob store, and an observer that is told of what is read. Thread-safe as far as both are."""

    def __init__(self, store: BlobStore, observer: Observer) -> None:
        self._store = store
        self._observer = observer

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """As the store does."""
        return self._store.find_missing(digests)

    def read(self, digest: Digest) -> bytes:
        """As the store does; an operation "fetch"."""
        with self._observer.operation("fetch", mode="one", blobs=1, bytes=digest.size_bytes):
            return self._store.read(digest)

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """As the store does; one operation "fetch", which counts what arrived."""
        sizes: list[int] = []

        def count(digest: Digest, data: bytes) -> None:
            sizes.append(len(data))
            sink(digest, data)

        with self._observer.operation("fetch", mode="many") as operation:
            try:
                self._store.read_many(digests, count)
            finally:
                operation.set(blobs=len(sizes), bytes=sum(sizes))

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """As the store does; an operation "fetch"."""
        with self._observer.operation("fetch", mode="stream", blobs=1, bytes=digest.size_bytes):
            self._store.read_to(digest, write)

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """As the store does."""
        self._store.write(digest, source)

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """As the store does."""
        return self._store.write_many(uploads)
