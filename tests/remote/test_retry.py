"""Retries: what, how often, how long; with a fake clock's worth of short delays and no sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from snaploader._proto import duration_pb2, status_pb2
from snaploader.context import Cancellation
from snaploader.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    SnaploaderError,
    Unauthenticated,
    Unavailable,
)
from snaploader.remote.calls import Attempts, Retrier, from_message
from snaploader.remote.config import RetryEvent, RetryPolicy

FAST = RetryPolicy(initial_delay_s=0.0, max_delay_s=0.0)


def run(
    attempt: Callable[[Attempts], object],
    policy: RetryPolicy = FAST,
    *,
    events: list[RetryEvent] | None = None,
    refresh: Callable[[], bool] = lambda: False,
    cancellation: Cancellation | None = None,
) -> object:
    retrier = Retrier(policy, (events if events is not None else []).append, refresh)
    return retrier.run("testing", attempt, cancellation or Cancellation())


def failing(*errors: SnaploaderError, then: object = "done") -> Callable[[Attempts], object]:
    left = list(errors)

    def attempt(_attempts: Attempts) -> object:
        if left:
            raise left.pop(0)
        return then

    return attempt


def test_transient_errors_are_tried_again_and_told() -> None:
    events: list[RetryEvent] = []
    assert run(failing(Unavailable("a"), Internal("b", transient=True)), events=events) == "done"
    assert [(e.operation, e.attempt, str(e.error)) for e in events] == [
        ("testing", 1, "a"),
        ("testing", 2, "b"),
    ]


@pytest.mark.parametrize("error", [NotFound("x"), DataLoss("x"), Internal("x"), Cancelled("x")])
def test_final_errors_are_not_tried_again(error: SnaploaderError) -> None:
    events: list[RetryEvent] = []
    with pytest.raises(type(error)) as caught:
        run(failing(error), events=events)
    assert caught.value is error
    assert not events


def test_foreign_errors_pass_through() -> None:
    def attempt(_attempts: Attempts) -> object:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(attempt)


def test_attempts_are_bounded() -> None:
    numbers = []

    def attempt(attempts: Attempts) -> object:
        numbers.append(attempts.number)
        raise Unavailable("down")

    with pytest.raises(Unavailable, match="down"):
        run(attempt, RetryPolicy(attempts=3, initial_delay_s=0, max_delay_s=0))
    assert numbers == [1, 2, 3]


def test_progress_starts_the_count_anew() -> None:
    def attempt(attempts: Attempts) -> object:
        if attempts.number < 20:
            attempts.progressed()
            raise Unavailable("cut")
        return attempts.number

    assert run(attempt, RetryPolicy(attempts=2, initial_delay_s=0, max_delay_s=0)) == 20


def test_budget_ends_retries_before_a_wait_that_would_pass_it() -> None:
    calls = []
    with pytest.raises(Unavailable):
        run(
            lambda attempts: calls.append(1) or failing(Unavailable("x"))(attempts),
            RetryPolicy(budget_s=5, initial_delay_s=10, max_delay_s=10, jitter=0),
        )
    assert len(calls) == 1


def test_time_for_a_call_is_what_is_left() -> None:
    seen = []

    def attempt(attempts: Attempts) -> None:
        seen.append((attempts.timeout_s(5), attempts.timeout_s(1000)))

    run(attempt, RetryPolicy(budget_s=100))
    (short, long) = seen[0]
    assert short == 5
    assert 99 < long <= 100


def test_no_call_begins_without_time() -> None:
    attempts = Attempts("testing", RetryPolicy(budget_s=1), -2.0, Cancellation())
    with pytest.raises(DeadlineExceeded, match="budget"):
        attempts.timeout_s(10)


def test_credentials_are_refreshed_once() -> None:
    refreshed = []

    def refresh() -> bool:
        refreshed.append(1)
        return True

    assert run(failing(Unauthenticated("old")), refresh=refresh) == "done"
    with pytest.raises(Unauthenticated, match="two"):
        run(failing(Unauthenticated("one"), Unauthenticated("two")), refresh=refresh)
    assert len(refreshed) == 2


def test_renewing_credentials_counts_for_no_attempt() -> None:
    policy = RetryPolicy(attempts=1, initial_delay_s=1000)
    assert run(failing(Unauthenticated("old")), policy, refresh=lambda: True) == "done"


def test_credentials_that_cannot_be_refreshed_end_it() -> None:
    with pytest.raises(Unauthenticated):
        run(failing(Unauthenticated("no")))


def wait(policy: RetryPolicy, error: SnaploaderError, failures: int = 1) -> float:
    """The wait after an error that is the last of so many in a row."""
    attempts = Attempts("testing", policy, 0, Cancellation())
    for _ in range(failures):
        attempts.failed()
    return attempts.delay_s(error)


def test_server_says_how_long_to_wait() -> None:
    duration = duration_pb2.Duration(seconds=3, nanos=500_000_000).SerializeToString()
    status = status_pb2.Status(code=8, message="busy")
    detail = status.details.add()
    detail.type_url = "type.googleapis.com/google.rpc.RetryInfo"
    detail.value = b"\x0a" + bytes([len(duration)]) + duration
    error = from_message(status, "writing")
    assert isinstance(error, ResourceExhausted)
    assert wait(FAST, error) == 3.5


def test_waits_double_up_to_a_cap_and_jitter_shortens_them() -> None:
    policy = RetryPolicy(jitter=0)
    waits = [round(wait(policy, Unavailable("x"), failures), 3) for failures in (1, 2, 3, 7, 5000)]
    assert waits == [0.1, 0.2, 0.4, 5.0, 5.0]
    waits = [wait(RetryPolicy(jitter=0.5), Unavailable("x"), 3) for _ in range(100)]
    assert len(set(waits)) > 50
    assert all(0.2 <= waited <= 0.4 for waited in waits)


def test_cancelling_wakes_the_sleeper() -> None:
    cancellation = Cancellation()
    asleep = threading.Event()
    caught: list[BaseException] = []

    def work() -> None:
        retrier = Retrier(RetryPolicy(initial_delay_s=60, max_delay_s=60, jitter=0), lambda _: asleep.set())
        try:
            retrier.run("testing", failing(Unavailable("x")), Cancellation(cancellation))
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert asleep.wait(300)
    cancellation.cancel()
    thread.join(300)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_child_made_after_cancelling_is_cancelled() -> None:
    parent = Cancellation()
    parent.cancel()
    with pytest.raises(Cancelled):
        Cancellation(parent).check()


def test_child_alone_does_not_cancel_its_parent() -> None:
    parent = Cancellation()
    Cancellation(parent).cancel()
    assert not parent.is_cancelled


def test_callback_that_raises_ends_the_operation() -> None:
    def on_retry(_event: RetryEvent) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Retrier(FAST, on_retry).run("testing", failing(Unavailable("x")), Cancellation())
