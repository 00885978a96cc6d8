"""What a call brings along: whose fields count, and how it ends early."""

import threading
import time
from dataclasses import dataclass

import pytest

from snaploader import context
from snaploader.context import CallContext, Cancellation, Headers, RequestMetadata, in_context
from snaploader.errors import Cancelled, DeadlineExceeded, InvalidArgument
from snaploader.remote import BearerToken
from snaploader.workers import WorkerPool


class Service:
    """Has one method that tells in which context it runs."""

    def __init__(self, default: CallContext | None = None) -> None:
        self._default_context = default

    @in_context
    def current(self, *, context: CallContext | None = None) -> CallContext:
        return current()


current = context.current


def test_outside_of_calls_the_context_is_empty():
    assert current() == CallContext()
    assert Service().current() == CallContext()


def test_a_call_begins_with_its_own_context_and_ends_with_the_one_before():
    given = CallContext(group_id="a")
    assert Service().current(context=given).group_id == "a"
    assert current().group_id is None


def test_a_field_that_is_left_open_comes_from_the_call_around_then_from_the_constructor():
    metadata = [RequestMetadata(action_id=name) for name in ("default", "around", "given")]
    service = Service(CallContext(group_id="default", request_metadata=metadata[0]))
    assert service.current().group_id == "default"
    with CallContext(group_id="around").use():
        assert service.current().group_id == "around"
        assert service.current().request_metadata is metadata[0]
        given = CallContext(request_metadata=metadata[2])
        assert service.current(context=given).group_id == "around"
        assert service.current(context=given).request_metadata is metadata[2]


def test_headers_and_credentials_come_from_one_context_together():
    service = Service(CallContext(headers={"x-api-key": "default"}))
    mine = BearerToken("mine")
    assert service.current(context=CallContext(credentials=mine)).headers is None
    assert service.current(context=CallContext(group_id="a")).headers == (("x-api-key", "default"),)


def test_the_earliest_deadline_counts():
    now = time.monotonic()
    with CallContext(deadline_s=now + 50).use():
        assert Service().current(context=CallContext(deadline_s=now + 90)).deadline_s == now + 50
        assert Service().current(context=CallContext(deadline_s=now + 10)).deadline_s == now + 10
        found = Service().current(context=CallContext(timeout_s=20)).deadline_s
        assert found is not None
        assert now + 20 <= found < now + 50


def test_a_time_of_the_call_stands_before_that_of_the_constructor():
    service = Service(CallContext(timeout_s=10))
    assert service.current().remaining_s <= 10
    assert service.current(context=CallContext(timeout_s=100)).remaining_s > 90


def test_a_call_without_time_left_does_not_begin():
    with pytest.raises(DeadlineExceeded):
        Service().current(context=CallContext(timeout_s=0))


def test_each_cancellation_ends_the_call():
    inner, outer = Cancellation(), Cancellation()
    for first in (inner, outer):
        other = Cancellation()
        with CallContext(cancellation=first).use(), CallContext(cancellation=other).use():
            current().check()
            first.cancel()
            with pytest.raises(Cancelled):
                current().check()


def test_a_call_with_a_set_cancellation_does_not_begin():
    flag = Cancellation()
    flag.cancel()
    with pytest.raises(Cancelled):
        Service().current(context=CallContext(cancellation=flag))


def test_cancelling_reaches_what_descends_and_what_is_made_later():
    parent = Cancellation()
    child = Cancellation(Cancellation(), parent)
    parent.cancel()
    parent.cancel()
    assert child.is_cancelled
    assert Cancellation(parent).is_cancelled


def test_cancelling_reaches_what_descends_from_one_that_nobody_else_keeps():
    root = Cancellation()
    grandchild = Cancellation(Cancellation(root))
    root.cancel()
    assert grandchild.is_cancelled


def test_a_handler_of_a_signal_may_cancel_while_its_thread_begins_to_listen(monkeypatch):
    flag, calls = Cancellation(), []

    class Interrupted(dict):
        def __setitem__(self, name, callback):
            super().__setitem__(name, callback)
            flag.cancel()  # with the lock held, as a signal's handler may find it

    monkeypatch.setattr(flag, "_callbacks", Interrupted())
    with flag.calling(lambda: calls.append("called")):
        assert calls


def test_a_callback_is_called_in_its_block_only():
    flag, calls = Cancellation(), []
    with flag.calling(lambda: calls.append("before")):
        pass
    with flag.calling(lambda: calls.append("within")):
        flag.cancel()
    with flag.calling(lambda: calls.append("after")):
        pass
    assert calls == ["within", "after"]


def test_a_sleep_ends_when_the_call_is_called_off():
    flag = Cancellation()
    thread = threading.Timer(0, flag.cancel)
    thread.start()
    with pytest.raises(Cancelled), CallContext(cancellation=flag).use():
        current().sleep(600)
    thread.join()


def test_a_sleep_ends_with_the_deadline():
    with pytest.raises(DeadlineExceeded), CallContext(timeout_s=0.001, cancellation=Cancellation()).use():
        current().sleep(600)


def test_the_threads_of_a_pool_work_in_the_context_of_the_call():
    barrier = threading.Barrier(2, timeout=60)
    seen = []

    def look(_: int) -> None:
        barrier.wait()
        seen.append((threading.get_ident(), current().group_id))

    with WorkerPool(2) as pool, CallContext(group_id="a").use():
        pool.for_each(look, range(2))
    assert {group for _, group in seen} == {"a"}
    assert len({thread for thread, _ in seen}) == 2


def test_a_pool_takes_no_item_after_the_call_was_called_off():
    flag, done = Cancellation(), []

    def work(item: int) -> None:
        done.append(item)
        flag.cancel()

    with WorkerPool(1) as pool, CallContext(cancellation=flag).use(), pytest.raises(Cancelled):
        pool.for_each(work, range(10))
    assert done == [0]


def test_an_identity_has_no_bounds():
    given = CallContext(timeout_s=1, deadline_s=2, cancellation=Cancellation(), group_id="a")
    assert given.identity() == CallContext(group_id="a")


def test_callers_are_told_apart_by_group_and_proof():
    same = CallContext(group_id="a", credentials=BearerToken("x"), timeout_s=4)
    assert same.caller == CallContext(group_id="a", credentials=BearerToken("x")).caller
    others = [
        CallContext(group_id="b", credentials=BearerToken("x")),
        CallContext(group_id="a", credentials=BearerToken("y")),
        CallContext(group_id="a", headers={"x": "y"}),
        CallContext(group_id="a"),
    ]
    assert len({same.caller, *(other.caller for other in others)}) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": "5"},
        {"headers": 5},
        {"headers": "abc"},
        {"headers": {1: "x"}},
        {"credentials": "Bearer x"},
        {"request_metadata": "x"},
        {"cancellation": "x"},
        {"group_id": 5},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"deadline_s": float("nan")},
        {"headers": {"ü": "x"}},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(InvalidArgument):
        CallContext(**wrong)


def test_secrets_are_not_shown():
    headers = {"authorization": "hunter2", "token-bin": b"hunter2"}
    shown = repr(CallContext(headers=headers, credentials=BearerToken("hunter2")))
    assert "hunter2" not in shown


def test_credentials_that_cannot_be_remembered_by_are_refused():
    @dataclass
    class Unhashable:
        name: str

        def headers(self) -> Headers:
            return ()

        def refresh(self) -> bool:
            return False

    with pytest.raises(InvalidArgument, match="hash"):
        CallContext(credentials=Unhashable("a"))


class EarlyEvent(threading.Event):
    """The first wait for it ends too early, as a coarse clock has it, and it comes during the second."""

    waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        if self.waits == 2:
            self.set()
        return self.is_set()


@pytest.mark.parametrize("bounds", [CallContext(), CallContext(timeout_s=600)])
def test_a_wait_that_ends_a_clocks_grain_early_goes_on(bounds: CallContext) -> None:
    with bounds.use():
        assert current().wait(EarlyEvent())
        assert current().wait(EarlyEvent(), 600)


def test_a_wait_for_so_long_at_most_says_that_nothing_came() -> None:
    assert not CallContext().wait(threading.Event(), 0.001)
    assert not CallContext().wait(threading.Event(), 0)


def test_the_error_says_why_work_was_called_off() -> None:
    closing = Cancellation(reason="the shop was closed")
    child = Cancellation(Cancellation(), closing, reason="not this")
    grandchild = Cancellation(child)
    closing.cancel()
    child.cancel()
    for flag in (closing, child, grandchild, Cancellation(child)):
        assert flag.reason == "the shop was closed"
        with pytest.raises(Cancelled, match="the shop was closed"):
            flag.check()


def test_what_was_called_off_first_is_the_reason() -> None:
    closing = Cancellation(reason="the shop was closed")
    child = Cancellation(closing)
    child.cancel()
    closing.cancel()
    with pytest.raises(Cancelled, match="the call was called off"):
        child.check()


@pytest.mark.parametrize("wrong", [5, "\ud800", None])
def test_request_metadata_is_text(wrong):
    with pytest.raises(InvalidArgument, match="action_id"):
        RequestMetadata(action_id=wrong)


@pytest.mark.parametrize("wrong", [None, 5, ""])
def test_a_bearer_token_is_text_or_a_function(wrong):
    with pytest.raises(InvalidArgument, match="token"):
        BearerToken(wrong)
