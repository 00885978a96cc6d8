"""Several callers at once through one cache: each request carries what its own caller says of itself."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from remote_data import BLAKE3, KIB, QUICK, MakeRemote, MakeServer, named, noise, uploads

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import TieredStore
from snaploader.context import REQUEST_METADATA_HEADER, CallContext, Cancellation, Headers, RequestMetadata
from snaploader.digest import Digest
from snaploader.errors import Cancelled, PermissionDenied, SnaploaderError, Unauthenticated
from snaploader.remote import BearerToken, Limits, RemoteCache, RetryEvent
from snaploader.testing import Call, EmbeddedServer, FakeCAS, Fault

LIMITS = Limits(batch_bytes=128 * KIB, stream_frame_bytes=64 * KIB, workers=3)
SENT = ("authorization", "x-key", "x-project")
"""The headers that callers send here."""


class Rotating:
    """Credentials of which each refusal makes new ones."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.refreshed = 0

    def headers(self) -> Headers:
        return (("authorization", f"Bearer {self.name}-{self.refreshed}"),)

    def refresh(self) -> bool:
        self.refreshed += 1
        return True


@dataclass(eq=False)
class Asker:
    """Someone who calls, and what each of their requests must carry."""

    name: str
    headers: dict[str, str]
    has_token: bool = True
    refusals: int = 0

    def __post_init__(self) -> None:
        self.credentials = Rotating(self.name) if self.has_token else None

    def metadata(self, action_id: str) -> RequestMetadata:
        return RequestMetadata(action_id=action_id, tool_name=self.name, tool_invocation_id=self.name)

    def context(self, action_id: str) -> CallContext:
        return CallContext(
            credentials=self.credentials, headers=self.headers, request_metadata=self.metadata(action_id)
        )

    def is_of(self, call: Call) -> bool:
        """Whether a request carries just what this caller has to prove who it is."""
        sent = {name: call.metadata[name] for name in SENT if name in call.metadata}
        token = str(sent.pop("authorization", ""))
        return sent == self.headers and (
            token.startswith(f"Bearer {self.name}-") if self.has_token else not token
        )


def metadata_of(call: Call) -> reapi.RequestMetadata:
    raw = call.metadata[REQUEST_METADATA_HEADER]
    assert isinstance(raw, bytes)
    return reapi.RequestMetadata.FromString(raw)


@dataclass
class Content:
    """What one piece of work is about, and no other."""

    seed: int

    def __post_init__(self) -> None:
        self.small = named(*(noise(500, self.seed * 100 + n) for n in range(5)))
        self.blobs = self.small | named(*(noise(60_000, self.seed * 100 + n) for n in range(3)))
        self.big = named(noise(180_000, self.seed))
        self.blobs |= self.big
        self.key = Digest.of(f"action {self.seed}".encode(), BLAKE3)


def write_small(remote: RemoteCache, content: Content, context: CallContext | None) -> None:
    remote.write_many(uploads(content.small), context=context)


def upload(remote: RemoteCache, content: Content, context: CallContext | None) -> None:
    remote.upload_missing(uploads(content.blobs), context=context)


def round_trip(remote: RemoteCache, content: Content, context: CallContext | None) -> None:
    remote.write_many(uploads(content.blobs), context=context)
    got: dict[Digest, bytes] = {}
    remote.read_many(content.blobs, got.__setitem__, context=context)
    assert got == content.blobs


def stream(remote: RemoteCache, content: Content, context: CallContext | None) -> None:
    ((digest, data),) = content.big.items()
    remote.write(digest, data, context=context)
    remote.read_to(digest, lambda _: None, context=context)
    assert remote.read(digest, context=context) == data


def publish(remote: RemoteCache, content: Content, context: CallContext | None) -> None:
    remote.update_action_result(content.key, reapi.ActionResult(stdout_raw=b"out"), context=context)
    remote.get_action_result(content.key, context=context)


Job: TypeAlias = Callable[[RemoteCache, Content, CallContext | None], None]

FAULTS: tuple[dict[str, Any], ...] = (
    {"status": "UNAVAILABLE"},
    {"status": "UNAUTHENTICATED"},
    {"cut_after_bytes": 70_000},
    {"lose_reply": True},
    {"item_status": "RESOURCE_EXHAUSTED"},
    {"flip_bit": 77},
)


class Callers(RuleBasedStateMachine):
    """Whatever is called at once, and whatever goes wrong: no request speaks for another caller."""

    def __init__(self) -> None:
        super().__init__()
        self.askers = [
            Asker("constructor", {"x-key": "constructor"}),
            Asker("a", {"x-key": "a", "x-project": "a"}),
            Asker("b", {}),
            Asker("c", {"x-key": "c"}, has_token=False),
        ]
        self.server = EmbeddedServer().start()
        self.remote = RemoteCache(
            self.server.url,
            retry=QUICK,
            limits=LIMITS,
            compression=False,
            headers=self.askers[0].headers,
            bearer_token=lambda: "constructor-0",
            request_metadata=self.askers[0].metadata("default"),
        )
        self.by_hash: dict[str, tuple[Asker, str]] = {}
        self.jobs = 0

    def teardown(self) -> None:
        self.remote.close()
        self.server.stop()

    @rule(
        method=st.sampled_from(("*", "Read", "Write", "BatchReadBlobs")),
        fault=st.sampled_from(FAULTS),
        after=st.integers(0, 3),
    )
    def break_something(self, method: str, fault: dict[str, Any], after: int) -> None:
        self.server.faults.add(Fault(method, after=after, **fault))

    @rule(
        jobs=st.lists(
            st.tuples(st.integers(0, 3), st.sampled_from((write_small, upload, round_trip, stream, publish))),
            min_size=2,
            max_size=5,
        )
    )
    def call_at_once(self, jobs: list[tuple[int, Job]]) -> None:
        start = threading.Barrier(len(jobs), timeout=300)
        failures: list[BaseException] = []

        def run(job: Job, content: Content, context: CallContext | None) -> None:
            try:
                start.wait()
                job(self.remote, content, context)
            except SnaploaderError:
                pass  # what faults did
            except BaseException as error:
                failures.append(error)

        threads = []
        for number, job in jobs:
            self.jobs += 1
            asker, content = self.askers[number], Content(self.jobs)
            action_id = f"job {self.jobs}" if number else "default"
            for digest in (*content.blobs, content.key):
                self.by_hash[digest.hash] = (asker, action_id)
            context = asker.context(action_id) if number else None
            threads.append(threading.Thread(target=run, args=(job, content, context)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []

    @invariant()
    def each_request_speaks_for_its_caller(self) -> None:
        assert self.server.wait_idle(300)
        for call in self.server.requests:
            metadata = metadata_of(call)
            (asker,) = (one for one in self.askers if one.name == metadata.tool_details.tool_name)
            assert asker.is_of(call), (asker, call)
            for named_hash in call.hashes:
                assert self.by_hash[named_hash] == (asker, metadata.action_id)
            if call.status == "UNAUTHENTICATED":
                asker.refusals += 1
        self.server.clear_log()
        for asker in self.askers[1:]:
            if asker.credentials is not None:
                refreshed = asker.credentials.refreshed
                assert refreshed <= asker.refusals
                assert bool(refreshed) == bool(asker.refusals)


Callers.TestCase.settings = settings(stateful_step_count=6)
TestCallers = Callers.TestCase


def test_what_the_server_offers_is_remembered_for_each_caller(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    def may_not(call: Call) -> bool:
        return call.metadata.get("authorization") == "Bearer reader"

    server = make_server(Fault("GetCapabilities", status="PERMISSION_DENIED", matches=may_not, times=None))
    remote = make_remote(server)
    for _ in range(3):
        for token in ("one", "two"):
            remote.capabilities(context=CallContext(credentials=BearerToken(token)))
        with pytest.raises(PermissionDenied):
            remote.capabilities(context=CallContext(credentials=BearerToken("reader")))
    asked = [call.metadata["authorization"] for call in server.requests]
    assert asked == ["Bearer one", "Bearer two", "Bearer reader", "Bearer reader", "Bearer reader"]


def test_what_is_remembered_of_callers_is_bounded(
    make_server: MakeServer, make_remote: MakeRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snaploader.remote.cache._MAX_CALLERS", 2)
    server = make_server()
    remote = make_remote(server)
    for name in ("one", "two", "one", "three", "one", "two"):
        remote.capabilities(context=CallContext(headers={"x-key": name}))
    assert [call.metadata["x-key"] for call in server.requests] == ["one", "two", "three", "two"]


def test_a_batch_that_was_too_large_for_one_caller_is_not_tried_for_the_next(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(max_batch_total_size_bytes=0, enforced_batch_bytes=100_000)
    remote = make_remote(server, limits=Limits(batch_bytes=400_000, workers=1))
    for seed, name in enumerate(("one", "two")):
        blobs = named(*(noise(50_000, 10 * seed + n) for n in range(6)))
        remote.write_many(uploads(blobs), context=CallContext(headers={"x-key": name}))
    refused = [call for call in server.requests if call.status not in ("OK", None)]
    assert {call.metadata["x-key"] for call in refused} == {"one"}


def test_tiers_work_in_the_context_that_is_current(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server()
    near = FakeCAS(BLAKE3)  # knows nothing of contexts
    tiers = TieredStore(near, make_remote(server))
    digest = Digest.of(b"x", BLAKE3)
    with CallContext(headers={"x-key": "mine"}, request_metadata=RequestMetadata(action_id="a")).use():
        tiers.write(digest, b"x")
        near.blobs.clear()
        assert tiers.read(digest) == b"x"
    assert {call.metadata["x-key"] for call in server.requests} == {"mine"}
    assert {metadata_of(call).action_id for call in server.requests} == {"a"}
    flag = Cancellation()
    flag.cancel()
    near.blobs.clear()
    with pytest.raises(Cancelled), CallContext(cancellation=flag).use():
        tiers.read(digest)


def test_no_secret_is_shown(
    make_server: MakeServer, make_remote: MakeRemote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = make_server(
        Fault("FindMissingBlobs", status="UNAVAILABLE"),
        Fault("FindMissingBlobs", status="UNAUTHENTICATED", times=None),
    )
    events: list[RetryEvent] = []
    remote = make_remote(server, on_retry=events.append)
    context = CallContext(credentials=BearerToken("s3cret"), headers={"x-api-key": "s3cret"})
    with pytest.raises(Unauthenticated) as caught:
        remote.find_missing([Digest.of(b"x", BLAKE3)], context=context)
    shown = (
        *traceback.format_exception(caught.value),
        caplog.text,
        repr(events),
        repr(context),
        repr(remote),
    )
    assert "s3cret" not in "".join(shown)
    assert server.requests[-1].metadata["x-api-key"] == "s3cret"
