"""What the parts tell of what they do: operations that begin and end, events, and objects that count.

A loader and the caches are given an `Observer`; without one they tell nobody, which costs next to nothing.
`snaploader.metrics` and `snaploader.tracing` have one each, and an embedder can write another. A part tells
only what has a duration, or what it does not count. What it counts anyway, as in `FileCache.statistics()`, is
read from it when somebody wants to know: a part that begins to work hands itself to `Observer.watch`.

The names of operations, and what is told of each besides how long it took and how it ended:

| name | what it is | attributes |
|---|---|---|
| loader.… | a call of `SnapshotLoader`, by the name of the method | ids of the task, snapshot and key |
| lookup | looking for a manifest, and for the blobs it names | `source`, `key` |
| save.… | a stage of a save: `store`, `publish`, `upload`, `publish_remotely` | `bytes` |
| fetch | bringing blobs from behind the file cache | `mode`: `one`, `many` or `stream`; `blobs`, `bytes` |
| stall | a reader waits for a chunk that is not at hand | |
| rpc | a call of a server; each attempt is one | `path`, `address`, `port` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from snaploader.context import Headers
from snaploader.errors import SnaploaderError

OK = "ok"
_CAPITALS = re.compile(r"(?<!^)(?=[A-Z])")


class Operation:
    """Something that is being done: a context manager around it. It belongs to the thread that does it.

    This class is one that nobody watches.
    """

    __slots__ = ()

    def set(self, **attributes: object) -> None:
        """Say more of it, such as what came of it."""

    def headers(self) -> Headers:
        """What to send to a server with a request that is part of it, so that the server's traces join."""
        return ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Note that it ended, and with which error, if any."""


class Observer:
    """Is told what a loader and its caches do. Its methods are called from any thread, and must not raise.

    This class does nothing; override what is wanted. One may serve any number of loaders and caches.
    """

    def operation(self, name: str, /, **attributes: object) -> Operation:  # noqa: ARG002
        """Return what is entered and left around an operation; the module's docstring lists the names.

        Args:
            attributes: What is known when it begins. Values are of any type, such as a digest: turn them into
                text only where they are used. Nothing in them is secret.
        """
        return UNWATCHED

    def event(self, name: str, /, **attributes: object) -> None:
        """Take note of something that has no duration: "retry", with `attempt`, `delay_s` and `error`."""

    def watch(self, part: object, /) -> Callable[[], None]:  # noqa: ARG002
        """Read the counts of `part` from now on; return what is called right before it is closed.

        Args:
            part: A FileCache, RemoteCache or UnpackedSnapshot. Refer to it weakly: not everybody closes it.
        """
        return _nothing


class Observers(Observer):
    """Several observers as one, each of which is told everything."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def operation(self, name: str, /, **attributes: object) -> Operation:
        """Begin the operation with each observer."""
        begun = [observer.operation(name, **attributes) for observer in self._observers]
        watched = [operation for operation in begun if operation is not UNWATCHED]
        return watched[0] if len(watched) == 1 else _Operations(watched) if watched else UNWATCHED

    def event(self, name: str, /, **attributes: object) -> None:
        """Tell each observer."""
        for observer in self._observers:
            observer.event(name, **attributes)

    def watch(self, part: object, /) -> Callable[[], None]:
        """Hand the part to each observer."""
        ends = [observer.watch(part) for observer in self._observers]

        def end() -> None:
            for each in ends:
                each()

        return end


class _Operations(Operation):
    """An operation that several observers watch."""

    __slots__ = ("_operations",)

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._operations = tuple(operations)

    def set(self, **attributes: object) -> None:
        for operation in self._operations:
            operation.set(**attributes)

    def headers(self) -> Headers:
        return tuple(header for operation in self._operations for header in operation.headers())

    def __enter__(self) -> Self:
        for operation in self._operations:
            operation.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for operation in reversed(self._operations):
            operation.__exit__(kind, error, traceback)


def _nothing() -> None:
    """Nobody waits for the end of a part."""


UNWATCHED = Operation()
NOBODY = Observer()
"""Who is told where no observer was given."""


def outcome(error: BaseException | None) -> str:
    """How an operation ended, in a word: "ok", or what docs/errors.md calls it, as in "not_found".

    "cancelled" stands for interrupts, too, and "unknown" for errors that are not this library's.
    """
    if error is None:
        return OK
    if isinstance(error, SnaploaderError):
        # Of a class of its own, such as SnapshotIdTaken, what it is of those that everybody knows.
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == SnaploaderError.__module__)
        if known is not SnaploaderError:
            return _CAPITALS.sub("_", known.__name__).lower()
    return "unknown" if isinstance(error, Exception) else "cancelled"
