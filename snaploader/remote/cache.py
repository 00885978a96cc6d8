"""`RemoteCache`: a Remote Execution API server as a blob store and an action cache."""

from __future__ import annotations

import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import grpc

from snaploader._proto import remote_execution_pb2
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument
from snaploader.formats.digests import DigestArray
from snaploader.remote.auth import RequestMetadata, checked_headers, make_credentials
from snaploader.remote.bulk import Task, batches, chunked, distinct
from snaploader.remote.calls import Caller
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.cas import SinkFailed
from snaploader.remote.codec import instance_name_error
from snaploader.remote.config import Limits, RetryCallback, RetryPolicy, Timeouts, TLSConfig, parse_endpoint
from snaploader.remote.connection import Clients, Connection, Settings
from snaploader.remote.retry import Cancellation
from snaploader.remote.statistics import Recorder, RemoteStatistics

_DIGEST_BYTES = 80
"""A digest in a message, about."""

_inherited: list[Connection] = []
"""Connections of a parent process, kept so that gRPC's destructors do not run on them in a child."""


T = TypeVar("T")


class RemoteCache:
    """A client of one instance on a REAPI server: its content-addressable storage and its action cache.

    Making one does nothing but check its arguments; the connection is made at the first call.
    Thread-safe. A child of a fork makes its own connection at its first call, and leaves alone what
    it inherited. Fork while no call runs: gRPC promises nothing else.

    Every blob that comes out is verified against its digest; every blob that goes in too, unless the caller
    has done so (`Upload.verified`). Transient failures are retried (`RetryPolicy`); no call outlasts its
    budget. Errors are those of `snaploader.errors`: Unavailable, DeadlineExceeded, Unauthenticated,
    PermissionDenied and so on for what the server says, DataLoss for wrong bytes, Cancelled for what `close`
    interrupted, FailedPrecondition for any use after `close`.

    Args:
        url: grpc://host:port, grpcs://host:port (TLS) or unix:/path.
        instance_name: The instance on the server; "" is its default one.
        headers: Sent with every call; a mapping or pairs. Values of names ending in -bin are bytes.
        tls: Certificates for grpcs://.
        timeouts: Times for connecting, calls and streams.
        retry: When to try again.
        limits: Threads, memory and message sizes.
        digest_function: The one to use; None takes BLAKE3 where the server offers it, else SHA-256.
        compression: Whether to use zstd where the server offers it.
        credential_helper: A program that gives headers (Bazel's credential helper protocol).
        bearer_token: Sent as `authorization: Bearer …`; or a function that gives the current one.
        netrc: A .netrc file with a login for the host, sent as `authorization: Basic …`.
        request_metadata: Who asks, for the server's logs; a fresh invocation id by default.
        on_retry: Sees every retry; see `RetryCallback`.
        channel: Makes the channel to speak on, such as one with interceptors, or a fake. The default connects
            to `url` with `tls`. Called again after a connection that could not be made, and in the child of a
            fork. The channels are closed by this cache.
    """

    def __init__(
        self,
        url: str,
        *,
        instance_name: str = "",
        headers: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]] = (),
        tls: TLSConfig | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - frozen
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        limits: Limits = Limits(),  # noqa: B008 - frozen
        digest_function: DigestFunction | None = None,
        compression: bool = True,
        credential_helper: str | os.PathLike[str] | None = None,
        bearer_token: str | Callable[[], str] | None = None,
        netrc: str | os.PathLike[str] | None = None,
        request_metadata: RequestMetadata | None = None,
        on_retry: RetryCallback | None = None,
        channel: Callable[[], grpc.Channel] | None = None,
    ) -> None:
        endpoint = parse_endpoint(url)
        if tls is not None and not endpoint.secure:
            raise InvalidArgument(f"TLS settings need a grpcs:// URL, not {url!r}")
        if problem := instance_name_error(instance_name):
            raise InvalidArgument(f"instance name {instance_name!r} {problem}")
        self.url = url
        self._settings = Settings(
            endpoint=endpoint,
            instance_name=instance_name,
            headers=((request_metadata or RequestMetadata()).header(), *checked_headers(headers)),
            credentials=make_credentials(
                bearer_token=bearer_token,
                credential_helper=credential_helper,
                netrc_file=netrc,
                host=endpoint.host,
                uri=endpoint.uri,
                helper_timeout_s=timeouts.credential_helper_s,
            ),
            tls=tls or TLSConfig(),
            timeouts=timeouts,
            retry=retry,
            limits=limits,
            digest_function=digest_function,
            compression=compression,
            on_retry=on_retry,
            open_channel=channel,
        )
        self._recorder = Recorder()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._closed = False
        self._pid = os.getpid()

    def capabilities(self) -> RemoteCapabilities:
        """Return what the server offers. It is asked once; a failure is not remembered."""
        return self._ensure_connection().clients.caller.capabilities

    @property
    def instance_name(self) -> str:
        """The instance on the server."""
        return self._settings.instance_name

    @property
    def digest_function(self) -> DigestFunction:
        """The function to name blobs with. May ask the server, and raise what that raises."""
        return self.capabilities().digest_function

    @property
    def update_enabled(self) -> bool:
        """Whether action results may be written, as far as the server says; raises as `digest_function`."""
        return self.capabilities().update_enabled

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """Return those of `digests` that the server does not hold. It counts this as a use of the others."""
        connection, clients = self._connect()
        groups: list[Sequence[Digest]] = []
        if isinstance(digests, DigestArray):
            wanted = digests.take(digests.sizes > 0)
            groups = [wanted] if len(wanted) else []
        else:
            by_function: dict[DigestFunction, list[Digest]] = defaultdict(list)
            for digest in distinct(digests):
                by_function[digest.function].append(digest)
            groups += by_function.values()
        for group in groups:
            clients.check(group[0])
        count = self._settings.limits.find_missing_digests
        pages = [page for group in groups for page in chunked(group, count)]
        if len(pages) <= 1:
            return clients.cas.find_missing(pages[0], connection.cancellation) if pages else set()
        missing: list[set[Digest]] = []

        def ask(page: Sequence[Digest], cancellation: Cancellation) -> None:
            missing.append(clients.cas.find_missing(page, cancellation))

        connection.run_all((len(page) * _DIGEST_BYTES, partial(ask, page)) for page in pages)
        return set().union(*missing)

    def read(self, digest: Digest) -> bytes:
        """Fetch one blob on the caller's thread, which never waits for bulk transfers.

        NotFound when the server does not hold it, DataLoss when its bytes are wrong.
        """
        connection, clients = self._connect()
        clients.check(digest)
        if not digest.size_bytes:
            return b""
        with _sink_errors():
            if not clients.caller.batch_limit.fits(digest.size_bytes):
                return clients.reader.read(digest, connection.cancellation)
            found: list[bytes] = []
            clients.cas.read([digest], lambda _digest, data: found.append(data), connection.cancellation)
            return found[0]

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """Stream one blob, of any size, on the caller's thread, piece by piece, into `write`.

        The pieces come in order and are verified as a whole: only when this returns were they right.
        On DataLoss, and any other error, discard what was written. What `write` raises is raised.
        """
        connection, clients = self._connect()
        clients.check(digest)
        if digest.size_bytes:
            with _sink_errors():
                clients.reader.read_to(digest, write, connection.cancellation)

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Hand each blob to `sink`, from several threads, in any order, each once.

        Each blob is in memory as a whole: for big ones see `read_to`. The first error calls off the
        rest and is raised, when all have stopped. `sink` must not call bulk methods of this cache.
        """
        connection, clients = self._connect()

        def take(group: list[Digest], cancellation: Cancellation) -> None:
            if len(group) > 1 or clients.caller.batch_limit.fits(group[0].size_bytes):
                clients.cas.read(group, sink, cancellation)
            else:
                sink(group[0], clients.reader.read(group[0], cancellation))

        def tasks() -> Iterator[Task]:
            wanted = dict.fromkeys(clients.check(digest) for digest in digests)
            for digest in wanted:
                if not digest.size_bytes:
                    sink(digest, b"")
            for group in _batches(clients.caller, distinct(wanted), lambda digest: digest):
                yield sum(digest.size_bytes for digest in group), partial(take, group)

        with _sink_errors():
            connection.run_all(tasks())

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """Store one blob, from memory or a file, on the caller's thread.

        DataLoss when the content does not have this digest; ResourceExhausted when it is bigger than
        the server takes.
        """
        connection, clients = self._connect()
        upload = Upload(digest, source)
        clients.check_upload(upload)
        if digest.size_bytes:
            clients.write([upload], connection.cancellation)

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store blobs, without asking which are there. `uploads` is consumed as there is room.

        `uploads` is advanced by one thread at a time, whichever is free. The first error calls off the
        rest and is raised, when all have stopped.
        """
        connection, clients = self._connect()
        done: list[TransferStatistics] = []

        def send(group: list[Upload], cancellation: Cancellation) -> None:
            done.append(clients.write(group, cancellation))

        def wanted() -> Iterator[Upload]:
            seen: set[Digest] = set()
            for upload in uploads:
                if upload.digest not in seen and upload.digest.size_bytes:
                    seen.add(upload.digest)
                    clients.check_upload(upload)
                    yield upload

        connection.run_all(
            (sum(clients.held_bytes(upload) for upload in group), partial(send, group))
            for group in _batches(clients.caller, wanted(), lambda upload: upload.digest)
        )
        return sum(done, TransferStatistics())

    def upload_missing(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store those blobs that the server does not hold yet; the others count as `present_blobs`."""
        iterator = iter(uploads)
        total = TransferStatistics()
        while window := list(itertools.islice(iterator, self._settings.limits.find_missing_digests)):
            by_digest = {upload.digest: upload for upload in window}
            missing = self.find_missing(by_digest)
            done = self.write_many(by_digest[digest] for digest in by_digest if digest in missing)
            total += done + TransferStatistics(present_blobs=len(by_digest) - len(missing))
        return total

    def get_action_result(self, action_digest: Digest) -> remote_execution_pb2.ActionResult:
        """Return the result kept under a digest. NotFound when there is none, or a blob it names is gone."""
        connection, clients = self._connect()
        clients.check(action_digest)
        return clients.actions.get(action_digest, connection.cancellation)

    def update_action_result(
        self, action_digest: Digest, action_result: remote_execution_pb2.ActionResult
    ) -> None:
        """Keep a result under a digest, in place of what stood there.

        FailedPrecondition or PermissionDenied where that is not allowed. Some servers pretend
        success for read-only credentials: read it back where it matters.
        """
        connection, clients = self._connect()
        clients.check(action_digest)
        clients.actions.update(action_digest, action_result, connection.cancellation)

    def statistics(self) -> RemoteStatistics:
        """Return counters of what was done so far. Works after `close` too."""
        return self._recorder.snapshot()

    def close(self) -> None:
        """Call off what runs, close the connection and join the threads. Idempotent.

        Not to be called from a sink: it waits for the thread the sink is on.
        """
        self._leave_inherited()
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteCache({self.url!r}, instance_name={self.instance_name!r})"

    def _connect(self) -> tuple[Connection, Clients]:
        """Return the connection and the clients on it; asks for the server's capabilities at first."""
        connection = self._ensure_connection()
        return connection, connection.clients

    def _ensure_connection(self) -> Connection:
        self._leave_inherited()
        with self._lock:
            if self._closed:
                raise FailedPrecondition(f"the remote cache {self.url} is closed")
            if self._connection is None:
                self._connection = Connection(self._settings, self._recorder)
            return self._connection

    def _leave_inherited(self) -> None:
        """Leave alone, in a child of a fork, what the parent had; its lock too, which may be held forever."""
        if self._pid != os.getpid():
            if self._connection is not None:
                _inherited.append(self._connection)
            self._connection = None
            self._lock = threading.Lock()
            self._pid = os.getpid()


@contextmanager
def _sink_errors() -> Iterator[None]:
    """Raise what a sink raised, as itself."""
    try:
        yield
    except SinkFailed as failure:
        raise failure.error from failure.error.__cause__


def _batches(caller: Caller, items: Iterable[T], digest_of: Callable[[T], Digest]) -> Iterator[list[T]]:
    """Group items into batches whose digests have one function, since a message names only one."""
    for _function, same in itertools.groupby(items, key=lambda item: digest_of(item).function):
        yield from batches(
            same,
            lambda item: digest_of(item).size_bytes,
            caller.batch_limit,
            caller.limits.batch_blobs,
        )
