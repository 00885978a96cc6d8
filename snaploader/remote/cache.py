"""`RemoteCache`: a Remote Execution API server as a blob store and an action cache; and its connection."""

from __future__ import annotations

import itertools
import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import NoReturn, Self, cast

import grpc

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.context import (
    CallContext,
    Cancellation,
    RequestMetadata,
    checked_headers,
    current,
    in_context,
)
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    SnaploaderError,
    Unimplemented,
)
from snaploader.formats.digests import DigestArray
from snaploader.remote import streams
from snaploader.remote.auth import make_credentials
from snaploader.remote.calls import (
    Caller,
    Recorder,
    RemoteStatistics,
    Retrier,
    Settings,
    SinkFailed,
    Transport,
)
from snaploader.remote.capabilities import (
    MESSAGE_LIMIT_BYTES,
    RemoteCapabilities,
    negotiate,
    without_capabilities,
)
from snaploader.remote.cas import (
    BatchLimit,
    ByteBudget,
    CASClient,
    Task,
    batches,
    function_field,
    run_all,
    to_message,
)
from snaploader.remote.codec import instance_name_error
from snaploader.remote.config import (
    Limits,
    RetryCallback,
    RetryEvent,
    RetryPolicy,
    Timeouts,
    TLSConfig,
    parse_endpoint,
)
from snaploader.telemetry import NOBODY, Observer
from snaploader.workers import Once, WorkerPool

_MAX_CALLERS = 256
"""For so many callers it is remembered what the server offers them."""

_DIGEST_BYTES = 80  # a digest in a message, about

_inherited: list[Connection] = []
"""Connections of a parent process, kept so that gRPC's destructors do not run on them in a child."""


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
        context: What each call goes by where its own `context` leaves something open; see
            `snaploader.CallContext`. Headers or credentials in a context are sent instead of those above.
        observer: Is told of calls and retries, and reads the counts of this cache; see docs/monitoring.md.
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
        context: CallContext | None = None,
        observer: Observer | None = None,
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
            headers=checked_headers(headers),
            credentials=make_credentials(
                endpoint,
                bearer_token=bearer_token,
                credential_helper=credential_helper,
                netrc_file=netrc,
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
            request_metadata=request_metadata or RequestMetadata(),
            observer=observer or NOBODY,
        )
        self._default_context = context
        self._recorder = Recorder()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._closed = False
        self._pid = os.getpid()
        self._stop_watching = self._settings.observer.watch(self)

    @in_context
    def capabilities(self, *, context: CallContext | None = None) -> RemoteCapabilities:
        """Return what the server offers. It is asked once; a failure is not remembered."""
        return self._connect().cas.caller.capabilities

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

    @in_context
    def find_missing(self, digests: Collection[Digest], *, context: CallContext | None = None) -> set[Digest]:
        """Return those of `digests` that the server does not hold. It counts this as a use of the others."""
        connection, cas = self._connected()
        by_function: dict[DigestFunction, Sequence[Digest]] = {}
        if isinstance(digests, DigestArray):
            by_function[digests.function] = digests.take(digests.sizes > 0)
        else:
            wanted = dict.fromkeys(digest for digest in digests if digest.size_bytes)
            for function in {digest.function: None for digest in wanted}:
                by_function[function] = [digest for digest in wanted if digest.function is function]
        count = self._settings.limits.find_missing_digests
        pages = [
            group[at : at + count] for group in by_function.values() for at in range(0, len(group), count)
        ]
        if len(pages) <= 1:
            return cas.find_missing(pages[0], connection.cancellation()) if pages else set()
        missing: list[set[Digest]] = []

        def ask(page: Sequence[Digest], cancellation: Cancellation) -> None:
            missing.append(cas.find_missing(page, cancellation))

        connection.run_all((len(page) * _DIGEST_BYTES, partial(ask, page)) for page in pages)
        return set().union(*missing)

    @in_context
    def read(self, digest: Digest, *, context: CallContext | None = None) -> bytes:
        """Fetch one blob on the caller's thread, which never waits for bulk transfers.

        NotFound when the server does not hold it, DataLoss when its bytes are wrong.
        """
        connection, cas = self._connected()
        cas.check(digest)
        if not digest.size_bytes:
            return b""
        found: dict[Digest, bytes] = {}
        cas.read([digest], found.__setitem__, connection.cancellation())
        return found[digest]

    @in_context
    def read_to(
        self, digest: Digest, write: Callable[[Buffer], object], *, context: CallContext | None = None
    ) -> None:
        """Stream one blob, of any size, on the caller's thread, piece by piece, into `write`.

        The pieces come in order and are verified as a whole: only when this returns were they right.
        On DataLoss, and any other error, discard what was written. What `write` raises is raised.
        """
        connection, cas = self._connected()
        cas.check(digest)
        if digest.size_bytes:
            with _sink_errors():
                streams.read_to(cas.caller, digest, write, connection.cancellation())

    @in_context
    def read_many(self, digests: Iterable[Digest], sink: Sink, *, context: CallContext | None = None) -> None:
        """Hand each blob to `sink`, from several threads, in any order, each once.

        Each blob is in memory as a whole: for big ones see `read_to`. The first error calls off the
        rest and is raised, when all have stopped. `sink` must not call bulk methods of this cache.
        """
        connection, cas = self._connected()
        max_blobs = self._settings.limits.batch_blobs

        def tasks() -> Iterator[Task]:
            wanted = dict.fromkeys(cas.check(digest) for digest in digests)
            for digest in wanted:
                if not digest.size_bytes:
                    sink(digest, b"")
            filled = (digest for digest in wanted if digest.size_bytes)
            for group in batches(filled, lambda digest: digest, cas.batch_limit, max_blobs):
                yield sum(digest.size_bytes for digest in group), partial(cas.read, group, sink)

        with _sink_errors():
            connection.run_all(tasks())

    @in_context
    def write(
        self, digest: Digest, source: Buffer | str | os.PathLike[str], *, context: CallContext | None = None
    ) -> None:
        """Store one blob, from memory or a file, on the caller's thread.

        DataLoss when the content does not have this digest; ResourceExhausted when it is bigger than
        the server takes.
        """
        connection, cas = self._connected()
        upload = Upload(digest, source)
        cas.check_upload(upload)
        if digest.size_bytes:
            cas.write([upload], connection.cancellation())

    @in_context
    def write_many(
        self, uploads: Iterable[Upload], *, context: CallContext | None = None
    ) -> TransferStatistics:
        """Store blobs, without asking which are there. `uploads` is consumed as there is room.

        `uploads` is advanced by one thread at a time, whichever is free. The first error calls off the
        rest and is raised, when all have stopped.
        """
        connection, cas = self._connected()
        max_blobs = self._settings.limits.batch_blobs
        done: list[TransferStatistics] = []

        def send(group: list[Upload], cancellation: Cancellation) -> None:
            done.append(cas.write(group, cancellation))

        def wanted() -> Iterator[Upload]:
            seen: set[Digest] = set()
            for upload in uploads:
                if upload.digest not in seen and upload.digest.size_bytes:
                    seen.add(upload.digest)
                    cas.check_upload(upload)
                    yield upload

        groups = batches(wanted(), lambda upload: upload.digest, cas.batch_limit, max_blobs)
        tasks = ((sum(map(cas.held_bytes, group)), partial(send, group)) for group in groups)
        connection.run_all(tasks)
        return reduce(operator.add, done) if done else TransferStatistics()

    @in_context
    def upload_missing(
        self, uploads: Iterable[Upload], *, context: CallContext | None = None
    ) -> TransferStatistics:
        """Store those blobs that the server does not hold yet; the others count as `present_blobs`."""
        iterator = iter(uploads)
        total = TransferStatistics()
        while window := list(itertools.islice(iterator, self._settings.limits.find_missing_digests)):
            by_digest = {upload.digest: upload for upload in window}
            missing = self.find_missing(by_digest)
            done = self.write_many(by_digest[digest] for digest in by_digest if digest in missing)
            total += done + TransferStatistics(present_blobs=len(by_digest) - len(missing))
        return total

    @in_context
    def get_action_result(
        self, action_digest: Digest, *, context: CallContext | None = None
    ) -> reapi.ActionResult:
        """Return the result kept under a digest. NotFound when there is none, or a blob it names is gone."""
        connection, cas = self._connected()
        cas.check(action_digest)
        request = reapi.GetActionResultRequest(
            instance_name=self.instance_name,
            action_digest=to_message(action_digest),
            digest_function=function_field(action_digest.function),
        )
        operation = f"getting action result {action_digest}"
        answer = cas.caller.unary(operation, "GetActionResult", request, connection.cancellation())
        return cast("reapi.ActionResult", answer)

    @in_context
    def update_action_result(
        self, action_digest: Digest, action_result: reapi.ActionResult, *, context: CallContext | None = None
    ) -> None:
        """Keep a result under a digest, in place of what stood there.

        FailedPrecondition or PermissionDenied where that is not allowed. Some servers pretend
        success for read-only credentials: read it back where it matters.
        """
        connection, cas = self._connected()
        cas.check(action_digest)
        if not cas.caller.capabilities.update_enabled:
            raise _not_allowed(action_digest)
        request = reapi.UpdateActionResultRequest(
            instance_name=self.instance_name,
            action_digest=to_message(action_digest),
            action_result=action_result,
            digest_function=function_field(action_digest.function),
        )
        size = request.ByteSize()
        if size > MESSAGE_LIMIT_BYTES:
            raise ResourceExhausted(
                f"action result {action_digest} has {size} bytes; servers take {MESSAGE_LIMIT_BYTES} at most:"
                " save fewer or smaller files in one snapshot",
                transient=False,
            )
        operation = f"updating action result {action_digest}"
        try:
            cas.caller.unary(operation, "UpdateActionResult", request, connection.cancellation())
        except Unimplemented as error:
            raise _not_allowed(action_digest) from error

    def statistics(self) -> RemoteStatistics:
        """Return counters of what was done so far. Works after `close` too."""
        return self._recorder.snapshot()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a RemoteCache cannot be pickled or copied, as it has a connection: make one with the same "
            "arguments in each process"
        )

    def close(self) -> None:
        """Call off what runs, close the connection and join the threads. Idempotent.

        Not to be called from a sink: it waits for the thread the sink is on.
        """
        self._leave_inherited()
        self._stop_watching()
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteCache({self.url!r}, instance_name={self.instance_name!r})"

    def _connected(self) -> tuple[Connection, CASClient]:
        connection = self._connect()
        return connection, connection.cas

    def _connect(self) -> Connection:
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


def _not_allowed(action_digest: Digest) -> SnaploaderError:
    return FailedPrecondition(
        f"the server does not let action result {action_digest} be updated:"
        " use an endpoint, an instance or credentials that may write"
    )


class Connection:
    """One process's connection: the whole stack is put together here. Thread-safe."""

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self._closing = Cancellation(reason=f"the remote cache {settings.endpoint.url} was closed")
        self._pool = WorkerPool(
            settings.limits.workers, owner="the remote cache", thread_name="snaploader-remote"
        )
        self.budget = ByteBudget(settings.limits.in_flight_bytes)
        self._settings = settings
        self._recorder = recorder
        self._transport = Transport(settings, recorder)
        self._batch_limit = BatchLimit(settings.limits.batch_bytes)
        self._lock = threading.Lock()
        self._clients: OrderedDict[object, Once[CASClient]] = OrderedDict()

    @property
    def cas(self) -> CASClient:
        """The client of whoever calls. Asks for the server's capabilities at first, and raises as that.

        Others may be offered more or less: whether action results may be updated is a matter of rights.
        """
        proof = current().proof
        with self._lock:
            client = self._clients.get(proof)
            if client is None:
                client = self._clients[proof] = Once(self._make_client)
            self._clients.move_to_end(proof)
            if len(self._clients) > _MAX_CALLERS:
                self._clients.popitem(last=False)
        return client.get()

    def cancellation(self) -> Cancellation:
        """What calls off the call that runs: closing this connection, or its own cancellation."""
        own = current().cancellation
        return self._closing if own is None else Cancellation(self._closing, own)

    def run_all(self, tasks: Iterable[Task]) -> None:
        run_all(tasks, self._pool, self.budget, self.cancellation())

    def close(self) -> None:
        """Call everything off, close the connection, join the threads."""
        self._closing.cancel()
        self._transport.close()
        self._pool.close()

    def _on_retry(self, event: RetryEvent) -> None:
        self._recorder.add(retries=1)
        self._settings.observer.event(
            "retry", attempt=event.attempt, delay_s=event.delay_s, error=event.error.message
        )
        if self._settings.on_retry is not None:
            self._settings.on_retry(event)

    def _make_client(self) -> CASClient:
        settings = self._settings

        def refresh() -> bool:
            _, credentials = settings.proof_of(current())
            return credentials is not None and credentials.refresh()

        caller = Caller(
            settings.endpoint.url,
            settings.instance_name,
            self._transport,
            Retrier(settings.retry, self._on_retry, refresh, settings.timeouts.min_bytes_per_s),
            settings.limits,
            self._recorder,
        )
        request = reapi.GetCapabilitiesRequest(instance_name=settings.instance_name)
        operation = f"asking {settings.endpoint.url} for its capabilities"
        try:
            answer = caller.unary(operation, "GetCapabilities", request, self.cancellation())
        except Unimplemented:
            capabilities = without_capabilities(settings.digest_function)
        else:
            capabilities = negotiate(
                answer, wanted=settings.digest_function, compression=settings.compression
            )
        self._batch_limit.lower(capabilities.message_limit_bytes)
        return CASClient(replace(caller, capabilities=capabilities), self._batch_limit)
