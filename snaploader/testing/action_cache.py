"""The services ActionCache and Capabilities."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from google.protobuf.message import DecodeError

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader._proto import semver_pb2
from snaploader.digest import DigestFunction
from snaploader.errors import InvalidArgument, NotFound
from snaploader.testing.backend import Backend, Failure, blob_bytes, digest_of, is_present
from snaploader.testing.storage import Partition, result_key

_MAX_TREE_BYTES = 256 * 1024 * 1024


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
