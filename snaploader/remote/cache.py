"""`RemoteCache`: a Remote Execution API server as a blob store and an action cache."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import grpc

from snaploader._proto import remote_execution_pb2
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import FailedPrecondition, InvalidArgument
from snaploader.remote import names, transfer
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.cas import SinkFailed
from snaploader.remote.config import Limits, RetryCallback, RetryPolicy, Timeouts, TLSConfig
from snaploader.remote.credentials import make_credentials
from snaploader.remote.endpoint import parse_endpoint
from snaploader.remote.metadata import RequestMetadata, checked_headers
from snaploader.remote.session import Session, Settings, checked_digest
from snaploader.remote.statistics import Recorder, RemoteStatistics

_inherited: list[Session] = []
"""Sessions of a parent process, kept so that gRPC's destructors do not run on them in a child."""


class RemoteCache:
    """A REAPI server: content-addressable storage and action cache of one instance.

    Making one does nothing but check its arguments; the connection is made at the first call.
    Thread-safe. A child of a fork makes its own connection at its first call, and leaves alone what
    it inherited. Fork while no call runs: gRPC promises nothing else.

    Every blob that comes out is verified against its digest, every blob that goes in too. Transient
    failures are retried (`RetryPolicy`); no call outlasts its budget. Errors are those of
    `snaploader.errors`: Unavailable, DeadlineExceeded, Unauthenticated, PermissionDenied and so on
    for what the server says, DataLoss for wrong bytes, Cancelled for what `close` interrupted,
    FailedPrecondition for any use after `close`.

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
        if problem := names.instance_name_error(instance_name):
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
        self._session: Session | None = None
        self._closed = False
        self._pid = os.getpid()

    def capabilities(self) -> RemoteCapabilities:
        """What the server offers. Asked for once; a failure is not remembered."""
        return self._open().clients.connection.capabilities

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
        """Those of `digests` that the server does not hold. Servers count this as a use of those they do."""
        return transfer.find_missing(self._open(), digests)

    def read(self, digest: Digest) -> bytes:
        """One blob, fetched on the caller's thread: it never waits for bulk transfers.

        NotFound when the server does not hold it, DataLoss when its bytes are wrong.
        """
        with _sink_errors():
            return transfer.read(self._open(), digest)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        """Stream one blob, of any size, on the caller's thread, piece by piece, into `write`.

        The pieces come in order and are verified as a whole: only when this returns were they right.
        On DataLoss, and any other error, discard what was written. What `write` raises is raised.
        """
        with _sink_errors():
            transfer.read_to(self._open(), digest, write)

    def read_into_file(self, digest: Digest, fd: int) -> None:
        """Write one blob, of any size, to the start of a file; verified when this returns.

        The descriptor's position is not used. After an error the file's content is undefined.
        """
        with _sink_errors():
            transfer.read_into_file(self._open(), digest, fd)

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        """Hand each blob to `sink`, from the workers' threads, in any order, each once.

        Each blob is in memory as a whole: for big ones see `read_to`. The first error calls off the
        rest and is raised, when all have stopped. `sink` must not call bulk methods of this cache.
        """
        with _sink_errors():
            transfer.read_many(self._open(), digests, sink)

    def write(self, digest: Digest, source: Buffer | str | os.PathLike[str]) -> None:
        """Store one blob, from memory or a file, on the caller's thread.

        DataLoss when the content does not have this digest; ResourceExhausted when it is bigger than
        the server takes.
        """
        transfer.write(self._open(), Upload(digest, source))

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store blobs, without asking which are there. `uploads` is consumed as there is room.

        The first error calls off the rest and is raised, when all have stopped.
        """
        return transfer.write_many(self._open(), uploads)

    def upload_missing(self, uploads: Iterable[Upload]) -> TransferStatistics:
        """Store those blobs that the server does not hold yet; the others count as `present_blobs`."""
        session = self._open()
        iterator = iter(uploads)
        total = TransferStatistics()
        while window := list(itertools.islice(iterator, self._settings.limits.find_missing_digests)):
            by_digest = {upload.digest: upload for upload in window}
            missing = transfer.find_missing(session, by_digest)
            done = transfer.write_many(
                session, (by_digest[digest] for digest in by_digest if digest in missing)
            )
            total += done + TransferStatistics(present_blobs=len(by_digest) - len(missing))
        return total

    def get_action_result(self, action_digest: Digest) -> remote_execution_pb2.ActionResult:
        """The result kept under a digest. NotFound when there is none, or when a blob it names is gone."""
        session = self._open()
        clients = session.clients
        checked_digest(action_digest, clients.connection.capabilities)
        return clients.actions.get(action_digest, session.cancellation)

    def update_action_result(
        self, action_digest: Digest, action_result: remote_execution_pb2.ActionResult
    ) -> None:
        """Keep a result under a digest, replacing what stood there.

        FailedPrecondition or PermissionDenied where that is not allowed. Some servers pretend
        success for read-only credentials: read it back where it matters.
        """
        session = self._open()
        clients = session.clients
        checked_digest(action_digest, clients.connection.capabilities)
        clients.actions.update(action_digest, action_result, session.cancellation)

    def statistics(self) -> RemoteStatistics:
        """What was done so far. Works after `close` too."""
        return self._recorder.snapshot()

    def close(self) -> None:
        """Call off what runs, close the connection and join the threads. Idempotent.

        Not to be called from a sink: it waits for the thread the sink is on.
        """
        self._leave_inherited()
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteCache({self.url!r}, instance_name={self.instance_name!r})"

    def _open(self) -> Session:
        self._leave_inherited()
        with self._lock:
            if self._closed:
                raise FailedPrecondition(f"the remote cache {self.url} is closed")
            if self._session is None:
                self._session = Session(self._settings, self._recorder)
            return self._session

    def _leave_inherited(self) -> None:
        """In a child of a fork: leave alone what the parent had, its lock too, which may be held for ever."""
        if self._pid != os.getpid():
            if self._session is not None:
                _inherited.append(self._session)
            self._session = None
            self._lock = threading.Lock()
            self._pid = os.getpid()


@contextmanager
def _sink_errors() -> Iterator[None]:
    """Raise what a sink raised, as itself."""
    try:
        yield
    except SinkFailed as failure:
        raise failure.error from failure.error.__cause__
