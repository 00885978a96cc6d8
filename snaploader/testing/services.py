"""The embedded server's services of single requests, and what all share: content, threads, errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from snaploader import errors
from snaploader._proto import any_pb2, duration_pb2, remote_execution_pb2 as reapi, semver_pb2, status_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, InvalidArgument, NotFound
from snaploader.remote.codec import compress, decompress
from snaploader.testing.options import ServerOptions
from snaploader.testing.storage import Partition, Storage, result_key

logger = logging.getLogger("snaploader.testing")

T = TypeVar("T")

_WORKERS = 4
_RETRY_AFTER_S = 1.0
_DETAILS_KEY = "grpc-status-details-bin"
_IDENTITY = reapi.Compressor.IDENTITY
_ZSTD = reapi.Compressor.ZSTD
_ITEM_OVERHEAD_BYTES = 128
_TREE_PAGE_DIRECTORIES = 1000
_MAX_TREE_DIRECTORIES = 1_000_000
_MAX_TREE_BYTES = 256 * 1024 * 1024

SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little") + bytes(8)
"""A zstd frame that decoders pass over: its magic number, the size of what follows, and that."""


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
        error = errors.from_os_error(error, "the server's storage failed")
        logger.warning("%s", error.message)
        if not isinstance(error, errors.ResourceExhausted):
            return Failure(grpc.StatusCode.INTERNAL, error.message)
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
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def run_to_end(self, work: Callable[..., T], *args: object) -> T:
        """Do as `run`, for work on what the caller closes: when it is cancelled, the work ends first."""
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
        raise InvalidArgument(f"the digest function {number} is not offered here")

    def resolve(self, request: Any) -> tuple[DigestFunction, Partition]:
        """The digest function and the content that a request is about."""
        return self.function(request.digest_function), self.partition(request.instance_name)

    def check_size(self, digest: Digest) -> None:
        """InvalidArgument for a blob bigger than this server takes."""
        limit = self.options.max_cas_blob_size_bytes
        if limit and digest.size_bytes > limit:
            raise InvalidArgument(f"the blob {digest} is bigger than max_cas_blob_size_bytes, {limit} bytes")

    def check_writable(self) -> None:
        if self.options.read_only:
            raise errors.PermissionDenied("this server is read-only")

    def get_capabilities(self, request: reapi.GetCapabilitiesRequest) -> reapi.ServerCapabilities:
        """What this server offers, as its options say."""
        options = self.options
        self.partition(request.instance_name)
        major, minor = options.api_version
        return reapi.ServerCapabilities(
            cache_capabilities=reapi.CacheCapabilities(
                digest_functions=[function.name for function in options.digest_functions],
                action_cache_update_capabilities=reapi.ActionCacheUpdateCapabilities(
                    update_enabled=options.update_enabled and not options.read_only
                ),
                max_batch_total_size_bytes=options.max_batch_total_size_bytes,
                max_cas_blob_size_bytes=options.max_cas_blob_size_bytes,
                symlink_absolute_path_strategy=reapi.SymlinkAbsolutePathStrategy.ALLOWED,
                supported_compressors=[_ZSTD] if options.zstd_streams else [],
                supported_batch_update_compressors=[_ZSTD] if options.zstd_batches else [],
            ),
            low_api_version=semver_pb2.SemVer(major=2),
            high_api_version=semver_pb2.SemVer(major=major, minor=minor),
        )


def digest_of(message: reapi.Digest, function: DigestFunction) -> Digest:
    return Digest.checked(message.hash, message.size_bytes, function)


def status_of(code: grpc.StatusCode, message: str = "") -> status_pb2.Status:
    return status_pb2.Status(code=code.value[0], message=message)


class ContentAddressableStorage:
    """The methods, each from request to response, to be run on a worker thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def find_missing_blobs(self, request: reapi.FindMissingBlobsRequest) -> reapi.FindMissingBlobsResponse:
        function, partition = self._backend.resolve(request)
        digests = request.blob_digests
        missing = [found for found in digests if not partition.contains(digest_of(found, function))]
        return reapi.FindMissingBlobsResponse(missing_blob_digests=missing)

    def batch_update_blobs(self, request: reapi.BatchUpdateBlobsRequest) -> reapi.BatchUpdateBlobsResponse:
        """BatchUpdateBlobs: each blob has a status of its own."""
        function, partition = self._backend.resolve(request)
        self._backend.check_writable()
        self._check_total(sum(item.digest.size_bytes for item in request.requests))
        response = reapi.BatchUpdateBlobsResponse()
        for item in request.requests:
            try:
                self._store(partition, item, function)
                status = status_of(grpc.StatusCode.OK)
            except Exception as error:  # noqa: BLE001 - each item's error is its own
                failure = as_failure(error)
                status = status_of(failure.code, failure.message)
            response.responses.add(digest=item.digest, status=status)
        return response

    def _store(
        self, partition: Partition, item: reapi.BatchUpdateBlobsRequest.Request, function: DigestFunction
    ) -> None:
        digest = digest_of(item.digest, function)
        self._backend.check_size(digest)
        data = item.data
        options = self._backend.options
        if item.compressor == _ZSTD and options.zstd_batches:
            data = decompress(data, digest.size_bytes)
        elif item.compressor != _IDENTITY:
            raise InvalidArgument(f"the compressor {item.compressor} is not supported in batches")
        verify = options.verify_writes
        if verify and options.batch_hash_function is not None:
            if options.batch_hash_function.hash(data) != digest.hash:
                raise DataLoss(f"the bytes that came do not have the digest {digest}")
            verify = False
        partition.put(digest, data, verify=verify)

    def batch_read_blobs(self, request: reapi.BatchReadBlobsRequest) -> reapi.BatchReadBlobsResponse:
        options = self._backend.options
        function, partition = self._backend.resolve(request)
        digests = [digest_of(message, function) for message in request.digests]
        total = sum(digest.size_bytes for digest in digests)
        self._check_total(total)
        if total + len(digests) * _ITEM_OVERHEAD_BYTES > options.max_message_bytes:
            raise InvalidArgument(f"{total} bytes in {len(digests)} blobs do not fit in one response")
        may_compress = options.zstd_batches and _ZSTD in request.acceptable_compressors
        response = reapi.BatchReadBlobsResponse()
        for message, digest in zip(request.digests, digests, strict=True):
            data = self._load(partition, digest)
            if data is None:
                status = status_of(grpc.StatusCode.NOT_FOUND, f"no blob {digest}")
                response.responses.add(digest=message, status=status)
                continue
            compressor, packed = _IDENTITY, compress(data) if may_compress else None
            if packed is not None:
                compressor = _ZSTD
                data = SKIPPABLE_FRAME + packed if options.zstd_skippable_frame else packed
            status = status_of(grpc.StatusCode.OK)
            response.responses.add(digest=message, data=data, compressor=compressor, status=status)
        return response

    def _load(self, partition: Partition, digest: Digest) -> bytes | None:
        data = partition.load(digest)
        if data and self._backend.options.verify_reads and digest.function.hash(data) != digest.hash:
            logger.warning("the stored blob %s was damaged and is dropped", digest)
            partition.delete(digest)
            return None
        return data

    def _check_total(self, total: int) -> None:
        limit = self._backend.options.batch_bytes
        if limit and total > limit:
            raise InvalidArgument(f"{total} bytes are more than max_batch_total_size_bytes, {limit}")

    def get_tree(self, request: reapi.GetTreeRequest) -> Iterator[reapi.GetTreeResponse]:
        """GetTree: breadth first from the root, each directory once, those that are missing left out.

        A page token is the number of directories already given. `page_size` is honoured up to 1,000.
        """
        if not self._backend.options.get_tree:
            raise Failure(grpc.StatusCode.UNIMPLEMENTED, "GetTree is not implemented here")
        function, partition = self._backend.resolve(request)
        skip = _page_token(request.page_token)
        page_size = min(request.page_size or _TREE_PAGE_DIRECTORIES, _TREE_PAGE_DIRECTORIES)
        page: list[reapi.Directory] = []
        page_bytes = 0
        limit_bytes = self._backend.options.max_message_bytes // 2
        for index, directory in enumerate(self._walk(partition, digest_of(request.root_digest, function))):
            if index < skip:
                continue
            size = directory.ByteSize()
            if page and (len(page) >= page_size or page_bytes + size > limit_bytes):
                yield reapi.GetTreeResponse(directories=page, next_page_token=str(index))
                page, page_bytes = [], 0
            page.append(directory)
            page_bytes += size
        yield reapi.GetTreeResponse(directories=page)

    def _walk(self, partition: Partition, root: Digest) -> Iterator[reapi.Directory]:
        queue = [root]
        seen = {root}
        for digest in queue:
            data = partition.load(digest)
            if data is None:
                if digest == root:
                    raise NotFound(f"no directory {digest}")
                continue
            directory = reapi.Directory.FromString(data)
            yield directory
            for child in directory.directories:
                child_digest = digest_of(child.digest, root.function)
                if child_digest not in seen:
                    seen.add(child_digest)
                    queue.append(child_digest)
            if len(seen) > _MAX_TREE_DIRECTORIES:
                raise InvalidArgument(f"the tree {root} has more than {_MAX_TREE_DIRECTORIES} directories")


def _page_token(token: str) -> int:
    if token and not (token.isdecimal() and len(token) <= 9):
        raise InvalidArgument(f"the page token {token[:40]!r} was not given by this server")
    return int(token or 0)


class ActionCache:
    """The methods, each from request to response, to be run on a worker thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._written: dict[str, dict[str, None]] = {}
        """By instance, the keys in the order they were written; only where their number is bounded."""

    def get_action_result(self, request: reapi.GetActionResultRequest) -> reapi.ActionResult:
        """GetActionResult: NOT_FOUND also when a blob that the result names is gone."""
        options = self._backend.options
        function, partition = self._backend.resolve(request)
        digest = digest_of(request.action_digest, function)
        data = partition.get_result(result_key(digest, has_size=options.result_key_has_size))
        if data is None or (options.empty_result_not_found and not data):
            raise NotFound(f"no action result for {digest}")
        result = reapi.ActionResult.FromString(data)
        if options.check_completeness:
            for named in _named_digests(result, partition, function):
                if not partition.contains(digest_of(named, function)):
                    raise NotFound(f"the action result for {digest} names {named.hash}, which is gone")
        return result

    def update_action_result(self, request: reapi.UpdateActionResultRequest) -> reapi.ActionResult:
        """UpdateActionResult: replaces what stood there, unless the options say otherwise."""
        options = self._backend.options
        function, partition = self._backend.resolve(request)
        if options.read_only or not options.update_enabled:
            raise Failure(options.update_disabled_status, "updates of the action cache are not enabled")
        digest = digest_of(request.action_digest, function)
        if not request.HasField("action_result"):
            raise InvalidArgument("the request has no action_result")
        for named in _direct_digests(request.action_result):
            digest_of(named, function)
        data = request.action_result.SerializeToString()
        key = result_key(digest, has_size=options.result_key_has_size)
        with self._lock:
            if options.update_again_status is not None and partition.get_result(key) is not None:
                raise Failure(options.update_again_status, f"the action result for {digest} is there already")
            partition.put_result(key, data)
            if options.max_action_results:
                written = self._written.setdefault(request.instance_name, {})
                written.pop(key, None)
                written[key] = None
                while len(written) > options.max_action_results:
                    oldest = next(iter(written))
                    del written[oldest]
                    partition.delete_result(oldest)
        return request.action_result


def _named_digests(
    result: reapi.ActionResult, partition: Partition, function: DigestFunction
) -> Iterator[reapi.Digest]:
    """Every blob that a result needs: output files, trees and what is in them, stdout and stderr.

    A tree comes before its content, so that a caller who stops at the first absent blob never gets to an
    absent tree's content. NotFound for one that is not a Tree.
    """
    yield from _direct_digests(result)
    for directory in result.output_directories:
        if directory.HasField("tree_digest"):
            yield from _tree_digests(directory.tree_digest, partition, function)


def _direct_digests(result: reapi.ActionResult) -> Iterator[reapi.Digest]:
    for file in result.output_files:
        yield file.digest
    for directory in result.output_directories:
        if directory.HasField("tree_digest"):
            yield directory.tree_digest
        if directory.HasField("root_directory_digest"):
            yield directory.root_directory_digest
    if result.HasField("stdout_digest"):
        yield result.stdout_digest
    if result.HasField("stderr_digest"):
        yield result.stderr_digest


def _tree_digests(
    digest: reapi.Digest, partition: Partition, function: DigestFunction
) -> Iterator[reapi.Digest]:
    if digest.size_bytes > _MAX_TREE_BYTES:
        raise NotFound(f"the tree {digest.hash} is too big to be checked")
    data = partition.load(digest_of(digest, function))
    if data is None:
        raise NotFound(f"the tree {digest.hash} is gone")
    try:
        tree = reapi.Tree.FromString(data)
    except DecodeError:
        raise NotFound(f"the blob {digest.hash} is not a Tree") from None
    for directory in (tree.root, *tree.children):
        for file in directory.files:
            yield file.digest
