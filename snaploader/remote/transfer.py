"""Which way each blob goes (batch or stream, this thread or a worker's), and sending it there."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import ResourceExhausted
from snaploader.remote.batching import batches, chunked, distinct
from snaploader.remote.bulk import Task, run_all
from snaploader.remote.cancel import Cancellation
from snaploader.remote.compression import compress
from snaploader.remote.content import load
from snaploader.remote.encoding import Item
from snaploader.remote.session import Clients, Session, checked_digest

T = TypeVar("T")

_DIGEST_BYTES = 80
"""A digest in a message, about."""


def find_missing(session: Session, digests: Collection[Digest]) -> set[Digest]:
    """See RemoteCache.find_missing."""
    clients = session.clients
    by_function: dict[DigestFunction, list[Digest]] = defaultdict(list)
    for digest in distinct(digests):
        by_function[digest.function].append(digest)
    for group in by_function.values():
        checked_digest(group[0], clients.connection.capabilities)
    count = clients.connection.limits.find_missing_digests
    pages = [page for group in by_function.values() for page in chunked(group, count)]
    if len(pages) <= 1:
        return clients.cas.find_missing(pages[0], session.cancellation) if pages else set()
    missing: set[Digest] = set()
    lock = threading.Lock()

    def ask(page: Sequence[Digest], cancellation: Cancellation) -> None:
        found = clients.cas.find_missing(page, cancellation)
        with lock:
            missing.update(found)

    tasks = ((len(page) * _DIGEST_BYTES, partial(ask, page)) for page in pages)
    run_all(tasks, session.executor, session.budget, session.cancellation)
    return missing


def read(session: Session, digest: Digest) -> bytes:
    """See RemoteCache.read."""
    clients = session.clients
    checked_digest(digest, clients.connection.capabilities)
    if not digest.size_bytes:
        return b""
    if not clients.connection.batch_limit.fits(digest.size_bytes):
        return clients.reader.read(digest, session.cancellation)
    found: list[bytes] = []
    clients.cas.read([digest], lambda _digest, data: found.append(data), session.cancellation)
    return found[0]


def read_to(session: Session, digest: Digest, write: Callable[[Buffer], object]) -> None:
    """See RemoteCache.read_to."""
    clients = session.clients
    checked_digest(digest, clients.connection.capabilities)
    if digest.size_bytes:
        clients.reader.read_to(digest, write, session.cancellation)


def read_into_file(session: Session, digest: Digest, fd: int) -> None:
    """See RemoteCache.read_into_file."""
    clients = session.clients
    checked_digest(digest, clients.connection.capabilities)
    if digest.size_bytes:
        clients.reader.read_into_file(digest, fd, session.cancellation)


def read_many(session: Session, digests: Iterable[Digest], sink: Sink) -> None:
    """See RemoteCache.read_many."""
    clients = session.clients
    limit = clients.connection.batch_limit

    def take(group: list[Digest], cancellation: Cancellation) -> None:
        if len(group) > 1 or limit.fits(group[0].size_bytes):
            clients.cas.read(group, sink, cancellation)
        else:
            sink(group[0], clients.reader.read(group[0], cancellation))

    def tasks() -> Iterator[Task]:
        wanted = dict.fromkeys(checked_digest(d, clients.connection.capabilities) for d in digests)
        for digest in wanted:
            if not digest.size_bytes:
                sink(digest, b"")
        for group in _groups(clients, distinct(wanted), lambda digest: digest):
            yield sum(digest.size_bytes for digest in group), partial(take, group)

    run_all(tasks(), session.executor, session.budget, session.cancellation)


def write(session: Session, upload: Upload) -> None:
    """See RemoteCache.write."""
    clients = session.clients
    _check_upload(clients, upload)
    if upload.digest.size_bytes:
        _write_group(clients, [upload], session.cancellation)


def write_many(session: Session, uploads: Iterable[Upload]) -> TransferStatistics:
    """See RemoteCache.write_many."""
    clients = session.clients
    total = TransferStatistics()
    lock = threading.Lock()

    def send(group: list[Upload], cancellation: Cancellation) -> None:
        nonlocal total
        done = _write_group(clients, group, cancellation)
        with lock:
            total += done

    def tasks() -> Iterator[Task]:
        for group in _groups(clients, _wanted(clients, uploads), lambda upload: upload.digest):
            yield sum(_held_bytes(clients, upload) for upload in group), partial(send, group)

    run_all(tasks(), session.executor, session.budget, session.cancellation)
    return total


def _groups(clients: Clients, items: Iterable[T], digest_of: Callable[[T], Digest]) -> Iterator[list[T]]:
    """Batches of items whose digests have one function, since a message names only one."""
    connection = clients.connection
    for _function, same in itertools.groupby(items, key=lambda item: digest_of(item).function):
        yield from batches(
            same,
            lambda item: digest_of(item).size_bytes,
            connection.batch_limit,
            connection.limits.batch_blobs,
        )


def _wanted(clients: Clients, uploads: Iterable[Upload]) -> Iterator[Upload]:
    """Each blob once, without the empty one, checked as it comes."""
    seen: set[Digest] = set()
    for upload in uploads:
        if upload.digest not in seen and upload.digest.size_bytes:
            seen.add(upload.digest)
            _check_upload(clients, upload)
            yield upload


def _check_upload(clients: Clients, upload: Upload) -> None:
    capabilities = clients.connection.capabilities
    digest = checked_digest(upload.digest, capabilities)
    if 0 < capabilities.max_blob_bytes < digest.size_bytes:
        raise ResourceExhausted(
            f"blob {digest} is too big: the server takes at most {capabilities.max_blob_bytes} bytes",
            transient=False,
        )


def _held_bytes(clients: Clients, upload: Upload) -> int:
    """What an upload keeps in memory: streamed ones only a few frames."""
    size = upload.digest.size_bytes
    if clients.connection.batch_limit.fits(size):
        return size
    return min(size, 2 * clients.connection.limits.stream_frame_bytes)


def _write_group(clients: Clients, group: list[Upload], cancellation: Cancellation) -> TransferStatistics:
    """Blobs of one batch, or one that is streamed; loaded, verified and compressed on this thread."""
    connection = clients.connection
    if len(group) == 1 and not connection.batch_limit.fits(group[0].digest.size_bytes):
        return clients.writer.write(group[0], cancellation)
    items = [_item(upload, zstd=connection.capabilities.zstd_batch_updates) for upload in group]
    return clients.cas.update(items, cancellation)


def _item(upload: Upload, *, zstd: bool) -> Item:
    data = load(upload)
    compressed = compress(data) if zstd else None
    return Item(upload, data if compressed is None else compressed, compressed is not None)
