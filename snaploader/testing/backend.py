"""What all services of the embedded server share: options, content, worker threads, errors as statuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import grpc

from snaploader import errors
from snaploader._proto import any_pb2, duration_pb2, status_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.testing.options import ServerOptions
from snaploader.testing.storage import Partition, Storage

if TYPE_CHECKING:
    from snaploader._proto import remote_execution_pb2

logger = logging.getLogger("snaploader.testing")

T = TypeVar("T")

_WORKERS = 4
_RETRY_AFTER_S = 1.0
_DETAILS_KEY = "grpc-status-details-bin"


class Failure(Exception):
    """Ends a call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def overloaded(message: str) -> Failure:
    """The refusal of a call that would be taken a little later."""
    return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=_RETRY_AFTER_S)


_CODES: dict[type[errors.SnaploaderError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    # Uploaded bytes that do not match their digest are the client's mistake (REAPI, BatchUpdateBlobs).
    errors.DataLoss: grpc.StatusCode.INVALID_ARGUMENT,
}


def as_failure(error: Exception) -> Failure:
    """The status for an error. What is not expected is logged, and INTERNAL."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError) and not isinstance(error, errors.SnaploaderError):
        typed = errors.from_os_error(error, "the server's storage failed")
        logger.warning("%s", typed.message)
        is_full = isinstance(typed, errors.ResourceExhausted)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if is_full else grpc.StatusCode.INTERNAL
        return Failure(code, typed.message)
    if isinstance(error, errors.SnaploaderError) and type(error) in _CODES:
        return Failure(_CODES[type(error)], error.message)
    # As text: a kept traceback would keep the call, and with it gRPC's threads.
    logger.error("a call failed inside the server\n%s", "".join(traceback.format_exception(error)))
    return Failure(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def trailers(failure: Failure) -> tuple[tuple[str, bytes], ...]:
    """Status details, as google.rpc has them: a RetryInfo, when the failure has a delay."""
    if failure.retry_after_s is None:
        return ()
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(failure.retry_after_s * 1e9))
    packed = delay.SerializeToString()
    # RetryInfo{Duration retry_delay = 1}: a tag, one byte of length (a Duration is short), the Duration.
    info = any_pb2.Any(
        type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\x0a" + bytes([len(packed)]) + packed
    )
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message, details=[info])
    return ((_DETAILS_KEY, status.SerializeToString()),)


class Backend:
    """Options and content, and the threads that work on them. Disk and hashing never run on the loop."""

    def __init__(self, options: ServerOptions, storage: Storage) -> None:
        self.options = options
        self.storage = storage
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="snaploader-server")

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Run `work(*args)` on a worker thread."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def run_to_end(self, work: Callable[..., T], *args: object) -> T:
        """The same, but when the caller is cancelled, it is so only after the work has ended.

        For work on what the caller closes or hands on afterwards.
        """
        future = self.run(work, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # retrieved, or asyncio would report it as forgotten
            raise

    def partition(self, instance_name: str) -> Partition:
        """The content of an instance, which must be one that is served."""
        served = self.options.instance_names
        if served is not None and instance_name not in served:
            raise Failure(
                self.options.unknown_instance_status,
                f"the instance {instance_name[:200]!r} is not served here",
            )
        return self.storage.partition(instance_name)

    def function(self, requested: int) -> DigestFunction:
        """The digest function of a request whose field `digest_function` says `requested`."""
        if self.options.ignores_digest_function:
            return self.options.digest_functions[0]
        # Hashes of 64 digits without a function are SHA-256 (REAPI, DigestFunction.UNKNOWN).
        number = requested or DigestFunction.SHA256.value
        for function in self.options.digest_functions:
            if function.value == number:
                return function
        raise errors.InvalidArgument(f"the digest function {number} is not offered here")

    def check_size(self, digest: Digest) -> None:
        """InvalidArgument for a blob bigger than this server takes."""
        limit = self.options.max_cas_blob_size_bytes
        if limit and digest.size_bytes > limit:
            raise errors.InvalidArgument(
                f"the blob {digest} is bigger than max_cas_blob_size_bytes, {limit} bytes"
            )

    def check_writable(self) -> None:
        """PermissionDenied on a server that is read-only."""
        if self.options.read_only:
            raise errors.PermissionDenied("this server is read-only")


def digest_of(message: remote_execution_pb2.Digest, function: DigestFunction) -> Digest:
    """A digest of a request. InvalidArgument when malformed."""
    return Digest.checked(message.hash, message.size_bytes, function)


def is_present(partition: Partition, digest: Digest) -> bool:
    """Whether a blob is there; the empty one always is."""
    return digest.size_bytes == 0 or partition.contains(digest)


def blob_bytes(partition: Partition, digest: Digest) -> bytes | None:
    """A whole blob, for those known to be small."""
    if digest.size_bytes == 0:
        return b""
    reader = partition.open(digest)
    if reader is None:
        return None
    try:
        return reader.read(0, reader.size)
    finally:
        reader.close()
