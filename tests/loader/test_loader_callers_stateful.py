"""Two groups and two sets of credentials at once on one loader, against a model: neither sees the other's."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from loader_hosts import CHUNK, CONFIGURATION, image, metadata, task

from snaploader import BearerToken, CallContext, FileCache, RequestMetadata, SnapshotLoader, UnpackedSnapshot
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.context import current
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import NotFound, PermissionDenied
from snaploader.testing import FakeCAS

CALLERS = ("a", "b")
CHUNKS = 6


def context_of(caller: str) -> CallContext:
    """A group, a token and ids of one's own."""
    return CallContext(
        group_id=caller,
        credentials=BearerToken(caller),
        request_metadata=RequestMetadata(action_id=f"action-{caller}"),
    )


class RecordingServer:
    """A store for each token; notes of every request who made it, and what for."""

    digest_function = DigestFunction.SHA256
    update_enabled = True

    def __init__(self) -> None:
        self.stores = {BearerToken(caller): FakeCAS() for caller in CALLERS}
        self.mixed: list[str] = []
        self.asked: dict[str, set[Digest]] = {caller: set() for caller in CALLERS}
        self._lock = threading.Lock()

    def _store(self, digests: Collection[Digest] = ()) -> FakeCAS:
        context = current()
        credentials, group = context.credentials, context.group_id
        who = context.request_metadata
        with self._lock:
            if group is None or who is None or context.caller != context_of(group).caller:
                self.mixed.append(f"{context}")
                raise PermissionDenied("whose request is this?")
            if who.action_id != f"action-{group}":
                self.mixed.append(f"{context}")
            self.asked[group].update(digests)
        assert isinstance(credentials, BearerToken)
        return self.stores[credentials]

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        return self._store(digests).find_missing(digests)

    def read(self, digest: Digest) -> bytes:
        return self._store([digest]).read(digest)

    def read_many(self, digests: Iterable[Digest], sink: Sink) -> None:
        wanted = list(digests)
        self._store(wanted).read_many(wanted, sink)

    def read_to(self, digest: Digest, write: Callable[[Buffer], object]) -> None:
        self._store([digest]).read_to(digest, write)

    def write(self, digest: Digest, source: Any) -> None:
        self._store([digest]).write(digest, source)

    def write_many(self, uploads: Iterable[Upload]) -> TransferStatistics:
        given = list(uploads)
        return self._store([upload.digest for upload in given]).write_many(given)

    def get_action_result(self, action_digest: Digest) -> reapi.ActionResult:
        return self._store([action_digest]).get_action_result(action_digest)

    def update_action_result(self, action_digest: Digest, action_result: reapi.ActionResult) -> None:
        self._store([action_digest]).update_action_result(action_digest, action_result)


class Callers(RuleBasedStateMachine):
    """Both save, find and read under the same branches; stores outlast the calls that opened them."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.folder = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.server = RecordingServer()
        self.cache = self.cleanup.enter_context(FileCache(self.folder / "cache"))
        self.loader = self.cleanup.enter_context(SnapshotLoader(self.cache, self.server))
        self.numbers = itertools.count()
        self.saved: dict[tuple[str, str], bytes] = {}
        """What each caller saved last under a branch."""
        self.ids: dict[str, tuple[str, bytes]] = {}
        self.open: list[tuple[UnpackedSnapshot, str, bytes]] = []

    def teardown(self) -> None:
        for unpacked, _, _ in self.open:
            unpacked.close()
        self.cleanup.close()

    @rule(caller=st.sampled_from(CALLERS), branch=st.sampled_from(["main", "x"]))
    def save(self, caller: str, branch: str) -> None:
        content = image(next(self.numbers), chunks=CHUNKS, holes=())
        path = self.folder / "disk"
        path.write_bytes(content)
        with context_of(caller).use():
            key = self.loader.snapshot_key_set(task(branch), "conf").write_key
            result = self.loader.cache_snapshot(
                key,
                chunked_files={"disk": path},
                chunk_size=CHUNK,
                vm_configuration=CONFIGURATION,
                vm_metadata=metadata(time.time()),
            )
        assert result.saved_remotely
        self.saved[caller, branch] = content
        self.ids[result.snapshot_id] = caller, content

    @rule(
        caller=st.sampled_from(CALLERS),
        branch=st.sampled_from(["main", "x"]),
        policy=st.sampled_from(["newest", "local-first", "local-only"]),
    )
    def find(self, caller: str, branch: str, policy: str) -> None:
        expected = self.saved.get((caller, branch), self.saved.get((caller, "main")))
        context = context_of(caller)
        keys = self.loader.snapshot_key_set(task(branch), "conf", context=context)
        try:
            snapshot = self.loader.get_snapshot(keys, policy, context=context)
        except NotFound:
            assert expected is None or policy == "local-only"  # it may have been evicted
            return
        assert expected is not None
        into = self.folder / f"out-{next(self.numbers)}"
        unpacked = self.loader.unpack_snapshot(snapshot, into, context=context)
        self.open.append((unpacked, caller, expected))

    @rule(data=st.data(), caller=st.sampled_from(CALLERS))
    def look_up(self, data: st.DataObject, caller: str) -> None:
        if not self.ids:
            return
        id_ = data.draw(st.sampled_from(sorted(self.ids, key=list(self.ids).index)))
        owner, _ = self.ids[id_]
        try:
            self.loader.get_snapshot_by_id(id_, context=context_of(caller))
        except NotFound:
            assert owner != caller
        else:
            assert owner == caller

    @rule(data=st.data(), reader=st.sampled_from([None, *CALLERS]))
    def read(self, data: st.DataObject, reader: str | None) -> None:
        """Whoever reads, and on whatever thread: what is fetched is fetched as who unpacked it."""
        if not self.open:
            return
        unpacked, _, content = data.draw(st.sampled_from(self.open))
        disk = unpacked.chunked_files["disk"]
        with contextlib.nullcontext() if reader is None else context_of(reader).use():
            for chunk in range(data.draw(st.integers(1, CHUNKS))):
                assert disk.read_at(chunk * CHUNK, 9) == content[chunk * CHUNK : chunk * CHUNK + 9]

    @rule()
    def evict(self) -> None:
        self.cache.prune(0)

    @rule(caller=st.sampled_from(CALLERS))
    def invalidate(self, caller: str) -> None:
        key = self.loader.snapshot_key_set(task(), "conf", context=context_of(caller)).write_key
        self.loader.invalidate_snapshot(key, context=context_of(caller))
        for branch in ("main", "x"):
            self.saved.pop((caller, branch), None)

    @invariant()
    def every_request_was_one_callers_through_and_through(self) -> None:
        assert not self.server.mixed
        own = [set(store.blobs) for store in (self.server.stores[BearerToken(caller)] for caller in CALLERS)]
        assert not own[0] & own[1]
        assert not self.server.asked["a"] & own[1]
        assert not self.server.asked["b"] & own[0]


def test_two_callers_on_one_loader_never_see_each_other() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Callers, settings=settings(max_examples=25, stateful_step_count=25, deadline=None)
    )
