"""The services of single requests: ContentAddressableStorage, ActionCache and Capabilities."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
from google.protobuf.message import DecodeError

from snaploader._proto import remote_execution_pb2 as reapi, semver_pb2, status_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, InvalidArgument, NotFound
from snaploader.remote.codec import compress, decompress
from snaploader.testing.backend import (
    Backend,
    Failure,
    as_failure,
    blob_bytes,
    digest_of,
    is_present,
    logger,
)
from snaploader.testing.byte_stream import SKIPPABLE_FRAME
from snaploader.testing.storage import Partition, result_key

_IDENTITY = reapi.Compressor.IDENTITY
_ZSTD = reapi.Compressor.ZSTD
_ITEM_OVERHEAD_BYTES = 128
_TREE_PAGE_DIRECTORIES = 1000
_MAX_TREE_DIRECTORIES = 1_000_000
_MAX_TREE_BYTES = 256 * 1024 * 1024


def status_of(code: grpc.StatusCode, message: str = "") -> status_pb2.Status:
    """A status inside a message."""
    return status_pb2.Status(code=code.value[0], message=message)


class ContentAddressableStorage:
    """The methods, each from request to response, to be run on a worker thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def find_missing_blobs(self, request: reapi.FindMissingBlobsRequest) -> reapi.FindMissingBlobsResponse:
        """FindMissingBlobs."""
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
        missing = [
            message
            for message in request.blob_digests
            if not is_present(partition, digest_of(message, function))
        ]
        return reapi.FindMissingBlobsResponse(missing_blob_digests=missing)

    def batch_update_blobs(self, request: reapi.BatchUpdateBlobsRequest) -> reapi.BatchUpdateBlobsResponse:
        """BatchUpdateBlobs: each blob has a status of its own."""
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
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
        """BatchReadBlobs: each blob has a status of its own."""
        options = self._backend.options
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
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
                response.responses.add(
                    digest=message, status=status_of(grpc.StatusCode.NOT_FOUND, f"no blob {digest}")
                )
                continue
            packed = compress(data) if may_compress else None
            if packed is not None and options.zstd_skippable_frame:
                packed = SKIPPABLE_FRAME + packed
            response.responses.add(
                digest=message,
                data=data if packed is None else packed,
                compressor=_IDENTITY if packed is None else _ZSTD,
                status=status_of(grpc.StatusCode.OK),
            )
        return response

    def _load(self, partition: Partition, digest: Digest) -> bytes | None:
        data = blob_bytes(partition, digest)
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
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
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
            data = blob_bytes(partition, digest)
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
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
        digest = digest_of(request.action_digest, function)
        data = partition.get_result(result_key(digest, has_size=options.result_key_has_size))
        if data is None or (options.empty_result_not_found and not data):
            raise NotFound(f"no action result for {digest}")
        result = reapi.ActionResult.FromString(data)
        if options.check_completeness:
            for named in named_digests(result, partition, function):
                if not is_present(partition, digest_of(named, function)):
                    raise NotFound(f"the action result for {digest} names {named.hash}, which is gone")
        return result

    def update_action_result(self, request: reapi.UpdateActionResultRequest) -> reapi.ActionResult:
        """UpdateActionResult: replaces what stood there, unless the options say otherwise."""
        options = self._backend.options
        function = self._backend.function(request.digest_function)
        partition = self._backend.partition(request.instance_name)
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


def named_digests(
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
    data = blob_bytes(partition, digest_of(digest, function))
    if data is None:
        raise NotFound(f"the tree {digest.hash} is gone")
    try:
        tree = reapi.Tree.FromString(data)
    except DecodeError:
        raise NotFound(f"the blob {digest.hash} is not a Tree") from None
    for directory in (tree.root, *tree.children):
        for file in directory.files:
            yield file.digest


class Capabilities:
    """The method GetCapabilities."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def get_capabilities(self, request: reapi.GetCapabilitiesRequest) -> reapi.ServerCapabilities:
        """What this server offers, as its options say."""
        options = self._backend.options
        self._backend.partition(request.instance_name)
        zstd = [reapi.Compressor.ZSTD]
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
                supported_compressors=zstd if options.zstd_streams else [],
                supported_batch_update_compressors=zstd if options.zstd_batches else [],
            ),
            low_api_version=semver_pb2.SemVer(major=2),
            high_api_version=semver_pb2.SemVer(major=major, minor=minor),
        )
