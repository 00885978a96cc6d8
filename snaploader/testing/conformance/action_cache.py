"""Checks of the action cache, with results such as snapshots are published in."""

from __future__ import annotations

import grpc

from snaploader._proto import any_pb2, remote_execution_pb2 as reapi
from snaploader.digest import Digest, DigestFunction
from snaploader.testing.conformance.endpoint import (
    CheckFailed,
    CheckSkipped,
    Endpoint,
    Suite,
    fresh,
    message,
    require,
    store,
)

check = Suite()

_TREE_FILES = 2000
_REFUSALS = frozenset(
    {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }
)


@check
def unknown_actions_are_not_found(endpoint: Endpoint) -> None:
    """GetActionResult of what was never stored ends with NOT_FOUND."""
    for function in endpoint.functions:
        require(not _is_found(endpoint, fresh(100, function)[0]), "a result was found that was never stored")


@check
def results_come_back(endpoint: Endpoint) -> None:
    """A result returns with its files, trees, exit code and auxiliary metadata, byte for byte."""
    _require_updates(endpoint)
    for function in endpoint.functions:
        key, _ = fresh(100, function)
        result = _result(endpoint, function, files=3)
        endpoint.update_action_result(key, result)
        _require_same(endpoint.get_action_result(key), result)


@check
def a_later_result_replaces_the_first(endpoint: Endpoint) -> None:
    """UpdateActionResult of a known key leaves the latest."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    key, _ = fresh(100, function)
    first, second = (_result(endpoint, function, files=1) for _ in range(2))
    endpoint.update_action_result(key, first)
    endpoint.update_action_result(key, second)
    _require_same(endpoint.get_action_result(key), second)


@check
def results_of_many_chunks_come_back(endpoint: Endpoint) -> None:
    """A result may name a tree of 2,000 files."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    key, _ = fresh(100, function)
    result = _result(endpoint, function, files=_TREE_FILES)
    endpoint.update_action_result(key, result)
    _require_same(endpoint.get_action_result(key), result)


@check
def incomplete_results_are_not_found(endpoint: Endpoint) -> None:
    """A result that names an output file that is absent is refused or not found."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    result = _result(endpoint, function, files=1)
    result.output_files.add(path="absent", digest=message(fresh(10, function)[0]))
    _require_incomplete(endpoint, function, result)


@check
def results_with_incomplete_trees_are_not_found(endpoint: Endpoint) -> None:
    """A result whose tree names a file that is absent is refused or not found."""
    _require_updates(endpoint)
    function = endpoint.functions[0]
    tree = _tree([*(fresh(10, function)[0] for _ in range(2))])
    result = reapi.ActionResult(exit_code=0)
    result.output_directories.add(path="disk", tree_digest=message(_stored(endpoint, tree, function)))
    _require_incomplete(endpoint, function, result)


@check
def updates_are_refused_where_they_are_not_enabled(endpoint: Endpoint) -> None:
    """A server that states that updates are not enabled does not take them."""
    if endpoint.update_enabled:
        raise CheckSkipped("the server states that updates are enabled")
    key, _ = fresh(100, endpoint.functions[0])
    try:
        endpoint.update_action_result(key, reapi.ActionResult(stdout_raw=b"x"))
    except grpc.RpcError as error:
        require(error.code() in _REFUSALS, f"the refusal is {error.code().name}, which looks transient")
    require(not _is_found(endpoint, key), "an update was taken though updates are not enabled")


def _require_updates(endpoint: Endpoint) -> None:
    if not endpoint.update_enabled:
        raise CheckSkipped("the server states that updates are not enabled")


def _is_found(endpoint: Endpoint, key: Digest) -> bool:
    try:
        endpoint.get_action_result(key)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return False
        raise
    return True


def _stored(endpoint: Endpoint, data: bytes, function: DigestFunction) -> Digest:
    digest = Digest.of(data, function)
    if len(data) <= endpoint.batch_bytes // 2:
        store(endpoint, [(digest, data)])
    else:
        endpoint.write(digest, data)
    return digest


def _tree(digests: list[Digest]) -> bytes:
    """A tree as a chunked file has it: a file per chunk, named by its offset."""
    tree = reapi.Tree()
    for index, digest in enumerate(digests):
        tree.root.files.add(name=str(index * 4096), digest=message(digest))
    return tree.SerializeToString(deterministic=True)


def _result(endpoint: Endpoint, function: DigestFunction, files: int) -> reapi.ActionResult:
    """A result like a snapshot's manifest, all of whose blobs are stored."""
    blobs = [fresh(8, function) for _ in range(files)]
    for start in range(0, files, 500):
        store(endpoint, blobs[start : start + 500])
    result = reapi.ActionResult(exit_code=0)
    plain = _stored(endpoint, fresh(100)[1], function)
    result.output_files.add(path="vmstate", digest=message(plain), is_executable=True)
    tree = _stored(endpoint, _tree([digest for digest, _ in blobs]), function)
    result.output_directories.add(path="disk", tree_digest=message(tree))
    for name in ("VMConfiguration", "VMMetadata"):
        packed = any_pb2.Any(type_url=f"type.googleapis.com/snaploader.v1.{name}", value=b"\x08\x02")
        result.execution_metadata.auxiliary_metadata.append(packed)
    return result


def _require_same(found: reapi.ActionResult, stored: reapi.ActionResult) -> None:
    """Only what a snapshot needs: servers may fill in a worker, or append metadata."""
    require(found.exit_code == stored.exit_code, f"exit_code came back as {found.exit_code}")
    require(list(found.output_files) == list(stored.output_files), "output_files came back changed")
    trees = [(d.path, d.tree_digest.hash, d.tree_digest.size_bytes) for d in found.output_directories]
    expected = [(d.path, d.tree_digest.hash, d.tree_digest.size_bytes) for d in stored.output_directories]
    require(trees == expected, "output_directories came back changed")
    metadata = [item.SerializeToString() for item in found.execution_metadata.auxiliary_metadata]
    wanted = [item.SerializeToString() for item in stored.execution_metadata.auxiliary_metadata]
    require(metadata[: len(wanted)] == wanted, "auxiliary_metadata came back changed")


def _require_incomplete(endpoint: Endpoint, function: DigestFunction, result: reapi.ActionResult) -> None:
    key, _ = fresh(100, function)
    try:
        endpoint.update_action_result(key, result)
    except grpc.RpcError as error:
        if error.code() in (*_REFUSALS, grpc.StatusCode.NOT_FOUND):
            return
        raise CheckFailed(f"an incomplete result was answered with {error.code().name}") from error
    if _is_found(endpoint, key):
        raise CheckSkipped("the server does not check that results are complete; clients must")
