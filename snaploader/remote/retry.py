"""Retries: transient failures are tried again, with growing random waits, within a budget, until called off.

This is the one retry layer. gRPC's own retries are off, since they end at the first byte of a response. Here
an operation that made progress (a stream that moved, a batch that lost some of its items) starts counting
anew, and continues where it was. tenacity runs the attempts, with strategies of its kind.
"""

from __future__ import annotations

import math
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
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

    def check(self) -> None:
        """Raise Cancelled when the flag is set."""
        if self.event.is_set():
            raise Cancelled("called off: the remote cache was closed, or another part of the transfer failed")

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise Cancelled as soon as the flag is set."""
        self.event.wait(seconds)
        self.check()


class SinkFailed(Exception):
    """Carries what a sink raised past the retry layer: it is no failure of the transfer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def deliver(sink: Callable[..., object], *arguments: object) -> None:
    """Call a sink within an attempt. SinkFailed for what it raises."""
    try:
        sink(*arguments)
    except Exception as error:
        raise SinkFailed(error) from error


T = TypeVar("T")


class Attempts:
    """The attempts at one operation: how many failed, what time is left. Not thread-safe."""

    def __init__(
        self, operation: str, policy: RetryPolicy, extra_s: float, cancellation: Cancellation
    ) -> None:
        self.operation = operation
        self.cancellation = cancellation
        self.number = 0
        self.fruitless = 0  # failed since the last one that made progress
        self._share = 0.0  # random, of the jitter in the next wait
        self._policy = policy
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
        self._share = random.random()  # noqa: S311 - spreads load, keeps no secret

    def delay_s(self, error: SnaploaderError) -> float:
        """Return the wait after an error: doubled with each fruitless attempt, capped, a share random.

        Longer, if the server asks; none after credentials were renewed.
        """
        if isinstance(error, Unauthenticated):
            return 0.0
        policy = self._policy
        full = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** min(self.fruitless - 1, 60))
        return max(full * (1.0 - policy.jitter * self._share), retry_after_s(error) or 0.0)

    def are_over(self, error: SnaploaderError) -> bool:
        """Tell whether there were enough without progress, or the next wait would use up the budget."""
        if self.fruitless >= self._policy.attempts and error.transient:  # renewing credentials is no attempt
            return True
        return self.delay_s(error) >= self.remaining_s


@dataclass(frozen=True, slots=True)
class Retrier:
    """Runs operations until they succeed or fail for good. Thread-safe."""

    policy: RetryPolicy
    on_retry: RetryCallback
    """Sees every retry before its wait."""
    refresh: Callable[[], bool] = lambda: False
    """Renews the credentials; called once per operation, when a server does not accept them."""
    min_bytes_per_s: float = math.inf
    """Gives what is big more time than the policy's budget."""

    def run(
        self,
        operation: str,
        attempt: Callable[[Attempts], T],
        cancellation: Cancellation,
        size_bytes: int = 0,
    ) -> T:
        """Call `attempt` until it returns, or raises what is not worth another try.

        Args:
            operation: For messages and events, such as "reading 1f…/4096".
            size_bytes: What is transferred.
        """
        attempts = Attempts(operation, self.policy, size_bytes / self.min_bytes_per_s, cancellation)

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

        was_refreshed = False

        def is_worth_a_try(error: BaseException) -> bool:
            nonlocal was_refreshed
            if isinstance(error, SnaploaderError) and error.transient:
                return True
            if was_refreshed or not isinstance(error, Unauthenticated):
                return False
            was_refreshed = True
            return self.refresh()

        def tell(state: tenacity.RetryCallState) -> None:
            error = _error(state)
            self.on_retry(RetryEvent(operation, attempts.number, attempts.delay_s(error), error))

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_a_try),
            wait=lambda state: attempts.delay_s(_error(state)),
            stop=lambda state: cancellation.event.is_set() or attempts.are_over(_error(state)),
            before_sleep=tell,
            sleep=cancellation.sleep,
            reraise=True,
        )(again)


def _error(state: tenacity.RetryCallState) -> SnaploaderError:
    """What an attempt failed with that is tried again."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, SnaploaderError)
    return error
