"""Retries: transient failures are tried again, with growing random waits, within a budget, until called off.

This is the one retry layer. gRPC's own retries are off, since they end at the first byte of a response. Here
an operation that made progress (a stream that moved, a batch that lost some of its items) starts counting
anew, and continues where it was. tenacity runs the attempts; what to try again, how long to wait and when to
stop are strategies of its kind.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

import tenacity

from snaploader.errors import Cancelled, DeadlineExceeded, SnaploaderError, Unauthenticated
from snaploader.remote.config import RetryCallback, RetryEvent, RetryPolicy
from snaploader.remote.status import retry_after_s


class Cancellation:
    """A flag that calls work off: set once, by `cancel`, and its children with it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.event = threading.Event()
        """The flag itself, to wait for."""
        self._children: weakref.WeakSet[Cancellation] = weakref.WeakSet()

    def child(self) -> Cancellation:
        """Make a flag that is set with this one, or alone."""
        child = Cancellation()
        with self._lock:
            self._children.add(child)
            if self.event.is_set():
                child.event.set()
        return child

    def cancel(self) -> None:
        """Set the flag here and below, and wake those who sleep on it."""
        with self._lock:
            self.event.set()
            children = list(self._children)
        for child in children:
            child.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether the flag is set."""
        return self.event.is_set()

    def check(self) -> None:
        """Raise Cancelled when the flag is set."""
        if self.event.is_set():
            raise Cancelled("called off: the remote cache was closed, or another part of the transfer failed")

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise Cancelled as soon as the flag is set."""
        self.event.wait(seconds)
        self.check()


T = TypeVar("T")


class Attempts:
    """The attempts at one operation: how many failed, what time is left. Not thread-safe."""

    def __init__(
        self, operation: str, policy: RetryPolicy, extra_s: float, cancellation: Cancellation
    ) -> None:
        self.operation = operation
        self.cancellation = cancellation
        self.number = 0
        self.fruitless = 0
        """Failed attempts since the last one that made progress."""
        self.share = 0.0
        """Random, from 0 to 1: of the jitter in the next wait."""
        self._deadline = time.monotonic() + policy.budget_s + extra_s
        self._progressed = False

    @property
    def remaining_s(self) -> float:
        """What is left of the budget."""
        return self._deadline - time.monotonic()

    def timeout_s(self, wanted: float) -> float:
        """Return the time for one call: `wanted`, or what is left. DeadlineExceeded when nothing is."""
        remaining = self.remaining_s
        if remaining <= 0:
            raise DeadlineExceeded(f"{self.operation} failed: its time budget is used up", transient=False)
        return min(wanted, remaining)

    def progressed(self) -> None:
        """Note that this attempt moved something for good: should it fail, counting starts anew."""
        self._progressed = True

    def failed(self) -> None:
        """Note that this attempt failed."""
        self.fruitless = 1 if self._progressed else self.fruitless + 1
        self._progressed = False
        self.share = random.random()  # noqa: S311 - spreads load, keeps no secret


class Backoff(tenacity.wait.wait_base):
    """Waits that double with each fruitless attempt, capped, a share random; or longer, if the server asks.

    None after credentials were renewed.
    """

    def __init__(self, policy: RetryPolicy, attempts: Attempts) -> None:
        self._policy = policy
        self._attempts = attempts

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = _error(retry_state)
        if isinstance(error, Unauthenticated):
            return 0.0
        policy, attempts = self._policy, self._attempts
        full = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** min(attempts.fruitless - 1, 60))
        return max(full * (1.0 - policy.jitter * attempts.share), retry_after_s(error) or 0.0)


class _RetryAfterRenewal(tenacity.retry_base):
    """Tries again, once, after Unauthenticated, when the credentials could be renewed."""

    def __init__(self, refresh: Callable[[], bool]) -> None:
        self._refresh = refresh
        self._was_tried = False

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        if self._was_tried or outcome is None or not isinstance(outcome.exception(), Unauthenticated):
            return False
        self._was_tried = True
        return self._refresh()


class _StopAfterFruitless(tenacity.stop.stop_base):
    """Stops after so many attempts without progress. Renewing credentials is none of them."""

    def __init__(self, limit: int, attempts: Attempts) -> None:
        self._limit = limit
        self._attempts = attempts

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return self._attempts.fruitless >= self._limit and _error(retry_state).transient


class _StopBeforeDeadline(tenacity.stop.stop_base):
    """Stops when the next wait would use up what is left of the budget."""

    def __init__(self, wait: Backoff, attempts: Attempts) -> None:
        self._wait = wait
        self._attempts = attempts

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return self._wait(retry_state) >= self._attempts.remaining_s


class Retrier:
    """Runs operations until they succeed or fail for good. Thread-safe.

    Args:
        policy: When to retry.
        on_retry: Sees every retry before its wait.
        refresh: Renews the credentials; called once per operation, when a server does not accept them.
    """

    def __init__(
        self, policy: RetryPolicy, on_retry: RetryCallback | None, refresh: Callable[[], bool] = lambda: False
    ) -> None:
        self._policy = policy
        self._on_retry = on_retry
        self._refresh = refresh

    def run(
        self,
        operation: str,
        attempt: Callable[[Attempts], T],
        cancellation: Cancellation,
        *,
        extra_s: float = 0.0,
    ) -> T:
        """Call `attempt` until it returns, or raises what is not worth another try.

        Args:
            operation: For messages and events, such as "reading 1f…/4096".
            extra_s: Time on top of the policy's budget, for what is big.
        """
        attempts = Attempts(operation, self._policy, extra_s, cancellation)

        def once() -> T:
            cancellation.check()
            attempts.number += 1
            try:
                return attempt(attempts)
            except SnaploaderError as error:
                attempts.failed()
                if not isinstance(error, Cancelled):
                    cancellation.check()
                raise

        try:
            return once()  # tenacity's machinery costs a tenth of a small read, so it begins with a failure
        except SnaploaderError as error:
            failures = [error]

        def again() -> T:
            if failures:
                raise failures.pop()
            return once()

        wait = Backoff(self._policy, attempts)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient) | _RetryAfterRenewal(self._refresh),
            wait=wait,
            stop=(
                tenacity.stop_when_event_set(cancellation.event)
                | _StopAfterFruitless(self._policy.attempts, attempts)
                | _StopBeforeDeadline(wait, attempts)
            ),
            before_sleep=lambda state: self._tell(attempts, wait(state), _error(state)),
            sleep=cancellation.sleep,
            reraise=True,
        )
        return retrying(again)

    def _tell(self, attempts: Attempts, delay_s: float, error: SnaploaderError) -> None:
        if self._on_retry is not None:
            self._on_retry(RetryEvent(attempts.operation, attempts.number, delay_s, error))


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, SnaploaderError) and error.transient


def _error(state: tenacity.RetryCallState) -> SnaploaderError:
    """What an attempt failed with that is tried again."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, SnaploaderError)
    return error
