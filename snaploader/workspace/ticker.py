"""Ticks at whole multiples of an interval on the wall clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime

from snaploader.errors import InvalidArgument

Wait = Callable[[threading.Event, float], bool]
"""Waits for an event for so many seconds, and says whether it is set: `threading.Event.wait`."""


def ticks(
    stop: threading.Event, interval_s: float, *, clock: Callable[[], datetime], wait: Wait
) -> Iterator[datetime]:
    """The time at once, then at each multiple of `interval_s` since 1970, until `stop` is set.

    The next tick is looked for when the one before was dealt with: two never overlap, those that were missed
    are left out, and delays do not add up. A clock that is set to another time gives a tick at once or within
    one interval.

    Raises:
        InvalidArgument: the interval is not above zero.
    """
    if not 0 < interval_s < float("inf"):
        raise InvalidArgument(f"the interval of ticks must be above 0 s: it is {interval_s!r}")
    last = None
    while not stop.is_set():
        now = clock()
        number = now.timestamp() // interval_s
        if number != last:  # else it was woken a little early
            last = number
            yield now
        left_s = interval_s - clock().timestamp() % interval_s
        if wait(stop, left_s):
            return
