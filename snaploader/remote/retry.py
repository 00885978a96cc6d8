"""The one retry layer: transient failures are tried again, with growing random waits, within a budget.

gRPC's own retries are off, since they end at the first byte of a response. Here an operation that
made progress (a stream that moved, a batch that lost some of its items) starts counting anew, and
continues where it was.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from snaploader.errors import Cancelled, DeadlineExceeded, SnaploaderError, Unauthenticated
from snaploader.remote.cancel import Cancellation
from snaploader.remote.config import RetryCallback, RetryEvent, RetryPolicy
from snaploader.remote.status import retry_after_s

T = TypeVar("T")


class Attempts:
    """The attempts at one operation: how many failed, what time is left. Of one thread."""

    def __init__(
        self, operation: str, policy: RetryPolicy, extra_s: float, cancellation: Cancellation
    ) -> None:
        self.operation = operation
        self.cancellation = cancellation
        self.number = 0
        self.delay_s = 0.0
        self._policy = policy
        self._deadline = time.monotonic() + policy.budget_s + extra_s
        self._fruitless = 0
        self._progressed = False
        self._refreshed = False

    @property
    def remaining_s(self) -> float:
        """What is left of the budget."""
        return self._deadline - time.monotonic()

    def timeout_s(self, wanted: float) -> float:
        """The time for one call: `wanted`, or what is left. DeadlineExceeded when nothing is."""
        remaining = self.remaining_s
        if remaining <= 0:
            raise DeadlineExceeded(f"{self.operation} failed: its time budget is used up", transient=False)
        return min(wanted, remaining)

    def progressed(self) -> None:
        """This attempt moved something for good: should it fail, counting starts anew."""
        self._progressed = True

    def failed(self, error: SnaploaderError, refresh: Callable[[], bool]) -> bool:
        """Whether to try again after `error`, in `delay_s`. `refresh` says whether it renewed credentials."""
        if self._progressed:
            self._fruitless, self._progressed = 0, False
        self._fruitless += 1
        if isinstance(error, Unauthenticated):
            may_retry, self._refreshed = not self._refreshed and refresh(), True
            self.delay_s = 0.0
            return may_retry
        if not error.transient or self._fruitless >= self._policy.attempts or self.cancellation.cancelled:
            return False
        self.delay_s = max(backoff_s(self._policy, self._fruitless), retry_after_s(error) or 0.0)
        return self.delay_s < self.remaining_s


def backoff_s(policy: RetryPolicy, failures: int) -> float:
    """The wait after so many failures in a row: doubled for each, capped, a share of it random."""
    full = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** min(failures - 1, 60))
    return full * (1.0 - policy.jitter * random.random())  # noqa: S311 - spreads load, keeps no secret


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
        """The result of `attempt`, called until it returns or raises what is not worth another try.

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
                if not isinstance(error, Cancelled):
                    cancellation.check()
                raise

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._may_retry(attempts, error)),
            wait=lambda _state: attempts.delay_s,
            stop=tenacity.stop_never,
            before_sleep=lambda state: self._tell(attempts, state),
            sleep=cancellation.sleep,
            reraise=True,
        )
        return retrying(once)

    def _may_retry(self, attempts: Attempts, error: BaseException) -> bool:
        return isinstance(error, SnaploaderError) and attempts.failed(error, self._refresh)

    def _tell(self, attempts: Attempts, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if self._on_retry is not None and isinstance(error, SnaploaderError):
            self._on_retry(RetryEvent(attempts.operation, attempts.number, attempts.delay_s, error))
