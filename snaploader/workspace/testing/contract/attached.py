"""Checks of disks and memory files beside a workspace's folder."""

from __future__ import annotations

from functools import partial

from cow import COWStore
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.model import Scope
from snaploader.workspace.testing.contract.model import (
    CHUNK,
    Harness,
    Suite,
    capture,
    new_store,
    place,
    require,
    require_error,
    workspace,
)

check = Suite()


@check
def an_attached_store_is_in_full_snapshots(harness: Harness) -> None:
    """A store that is attached is captured with Full, not with Data, and comes back as a lazy store."""
    runtime = harness.runtime
    content = bytes(range(256)) * (CHUNK // 256)
    with workspace(harness) as spec, new_store(harness, 4 * CHUNK) as store:
        store.write_at(CHUNK, content)
        runtime.attach(spec.workspace_id, "disk", store)
        require(runtime.attachments(spec.workspace_id) == {"disk": store}, "it is not among the attachments")
        data = capture(harness, spec, Scope.DATA)
        require(not data.manifest.chunked_files, "a Data snapshot holds the disk")
        full = capture(harness, spec, Scope.FULL)
        require(set(full.manifest.chunked_files) == {"disk"}, "a Full snapshot does not hold the disk")
        store.write_at(0, b"later")
        place(harness, spec, full, "t")
        require(not store.closed, "the caller's store was closed")
        placed = runtime.attachments(spec.workspace_id)["disk"]
        require(isinstance(placed, COWStore) and placed is not store, f"the disk came back as {placed}")
        assert isinstance(placed, COWStore)
        lazy = placed.statistics().lazy_chunks
        require(lazy == 1, f"{lazy} chunks of the disk are to be fetched, and not the one that has data")
        require(placed.read_at(0, 5) == bytes(5), "the disk has what was written after the snapshot")
        require(placed.read_at(CHUNK, CHUNK) == content, "the disk came back with other content")
        placed.write_at(0, b"changed")
        changed = capture(harness, spec, Scope.FULL)
        place(harness, spec, changed, "u")
        require(placed.closed, "a store that was opened by place was not closed by the next one")
        again = runtime.attachments(spec.workspace_id)["disk"]
        assert isinstance(again, COWStore)
        require(again.read_at(0, 7) == b"changed", "a change of the disk is not in the next snapshot")


@check
def attachments_are_told_apart_by_name(harness: Harness) -> None:
    """A name is used once, until it is detached; bad names are refused."""
    runtime = harness.runtime
    with workspace(harness) as spec, new_store(harness, CHUNK) as store:
        runtime.attach(spec.workspace_id, "disk", store)
        require_error(FailedPrecondition, lambda: runtime.attach(spec.workspace_id, "disk", store))
        for bad in ("", "..", "a/b", "root", "volume.data"):
            require_error(InvalidArgument, partial(runtime.attach, spec.workspace_id, bad, store))
        runtime.detach(spec.workspace_id, "disk")
        require(not store.closed, "detaching closed the caller's store")
        require_error(NotFound, lambda: runtime.detach(spec.workspace_id, "disk"))
        runtime.attach(spec.workspace_id, "disk", store)


@check
def a_store_of_another_process_is_not_left_out(harness: Harness) -> None:
    """Capturing with Full where a store is not open is FailedPrecondition, rather than without it."""
    with workspace(harness) as spec, new_store(harness, CHUNK) as store:
        other = harness.another()
        try:
            other.attach(spec.workspace_id, "disk", store)
            require(not harness.runtime.attachments(spec.workspace_id), "the other's store is told as usable")
            require_error(FailedPrecondition, lambda: capture(harness, spec, Scope.FULL))
            capture(harness, spec, Scope.DATA)
        finally:
            other.close()
        require_error(FailedPrecondition, lambda: capture(harness, spec, Scope.FULL))
        harness.runtime.detach(spec.workspace_id, "disk")
        capture(harness, spec, Scope.FULL)
