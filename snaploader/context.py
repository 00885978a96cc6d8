"""What travels with a call: how long it may take, what calls it off, who asks and with which proof.

Every method of the loader and of the caches takes `context=`. While the call runs, its context is
*current*, as a context variable is, so that the code in between need not pass it on: the threads of a
`WorkerPool` work in the context of the call that they work for. A read of a store that faults a chunk in
takes no `context=`, but goes by the current one too: `CallContext.use` makes a context current for a block.

A field that a context leaves open is that of the call around it, then that of the object's constructor. The
earliest deadline and every cancellation count.
"""

from __future__ import annotations

import functools
import math
import re
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, fields, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, cast

from snaploader._version import __version__
from snaploader.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    SnaploaderError,
    translate_thread_errors,
)

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

Headers: TypeAlias = tuple[tuple[str, str | bytes], ...]

REQUEST_METADATA_HEADER = "build.bazel.remote.execution.v2.requestmetadata-bin"
"""Named by the REAPI, in the comment of RequestMetadata."""

_NAME = re.compile(r"[0-9a-z_.-]{1,256}")
_VALUE = re.compile(r"[\x20-\x7e]{0,8192}")


class Secret(str):
    """A text that its `repr` does not show, as in a traceback with the values of variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


class SecretBytes(bytes):
    """The same for bytes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "b'…'"


class _Checked(tuple[tuple[str, str | bytes], ...]):
    """Headers that were checked: a context is made anew for each call, and they need it once."""

    __slots__ = ()


def checked_headers(headers: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]) -> Headers:
    """Return headers as gRPC takes them: names in lower case. InvalidArgument for what it would refuse.

    Values appear neither in messages nor in the `repr` of what this returns: they may be secrets.
    """
    if isinstance(headers, _Checked):
        return headers
    checked: list[tuple[str, str | bytes]] = []
    try:
        pairs = list(dict(headers).items() if isinstance(headers, Mapping) else headers)
        named = [(given.strip().lower(), value) for given, value in pairs]
    except (TypeError, ValueError, AttributeError):
        raise InvalidArgument("headers are a mapping of names to values, or pairs of them") from None
    for name, value in named:
        if not _NAME.fullmatch(name) or name.startswith("grpc-"):
            raise InvalidArgument(
                f"header name {name[:80]!r} is not allowed: use letters, digits, '-', '_' and '.'"
            )
        if name.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidArgument(f"header {name!r} ends in -bin, so its value must be bytes")
        elif not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise InvalidArgument(
                f"the value of header {name!r} must be printable ASCII text of at most 8 KiB"
            )
        checked.append((name, SecretBytes(value) if isinstance(value, bytes) else Secret(value)))
    return _Checked(checked)


class Credentials(Protocol):
    """A source of headers that prove who asks. Thread-safe and hashable.

    Two that are equal count as the same caller, of whom the same is remembered. One that takes long to get
    its headers ends that with the call, as `current().wait_for` does.
    """

    def headers(self) -> Headers:
        """Return what to send now. Unauthenticated when it cannot be had."""

    def refresh(self) -> bool:
        """Forget what the server did not accept; False when nothing else could be sent."""


@dataclass(frozen=True, slots=True)
class RequestMetadata:
    """Says who asks, for a server's logs and to follow a task over several services (see the REAPI)."""

    action_id: str = ""
    """The action a request belongs to."""
    tool_invocation_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """One run of the tool; a new UUID by default."""
    correlated_invocations_id: str = ""
    """Several runs that belong together, such as a build's."""
    action_mnemonic: str = ""
    target_id: str = ""
    configuration_id: str = ""
    tool_name: str = "snaploader"
    tool_version: str = __version__

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            try:
                value.encode()
            except (AttributeError, UnicodeEncodeError):
                raise InvalidArgument(f"{one.name} of the request metadata is no text") from None

    def header(self) -> tuple[str, bytes]:
        """Return this as the metadata of a call: a name and a value."""
        from snaploader._proto import (
            remote_execution_pb2,  # not everyone who has a context speaks to a server
        )

        message = remote_execution_pb2.RequestMetadata(
            tool_details=remote_execution_pb2.ToolDetails(
                tool_name=self.tool_name, tool_version=self.tool_version
            ),
            action_id=self.action_id,
            tool_invocation_id=self.tool_invocation_id,
            correlated_invocations_id=self.correlated_invocations_id,
            action_mnemonic=self.action_mnemonic,
            target_id=self.target_id,
            configuration_id=self.configuration_id,
        )
        return REQUEST_METADATA_HEADER, message.SerializeToString()


class Cancellation:
    """Calls work off: a flag that is set once, by `cancel`, with all that descend from it. Thread-safe.

    Args:
        parents: When one of them is set, so is this one.
        reason: Message of the error that ends the work when this one, and not a parent, is cancelled.
            Default: that the call was called off.
    """

    def __init__(self, *parents: Cancellation, reason: str = "the call was called off") -> None:
        self._reason = reason
        self._lock = threading.RLock()  # a signal's handler may cancel what its thread is just looking at
        self._event = threading.Event()
        self._parents = parents  # they know their children only weakly: one between must not be lost
        self._children: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._callbacks: dict[object, Callable[[], object]] = {}
        for parent in parents:
            with parent._lock:
                parent._children.add(self)
            if parent.is_cancelled:
                self._cancel(parent.reason)

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called, here or above."""
        return self._event.is_set()

    @property
    def reason(self) -> str:
        """Message of the error that ends the work: once it is cancelled, that of the one that was."""
        return self._reason

    def cancel(self) -> None:
        """Call off whatever runs with this or what descends from it, and wake what waits. Again is fine."""
        self._cancel(self._reason)

    def _cancel(self, reason: str) -> None:
        with self._lock:
            if not self._event.is_set():
                self._reason = reason
            self._event.set()
            children = list(self._children)
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            callback()
        for child in children:
            child._cancel(self._reason)

    def check(self) -> None:
        """Raise Cancelled when the flag is set."""
        if self._event.is_set():
            raise Cancelled(self._reason, transient=False)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the flag is set, or for so long; return whether it is."""
        return self._event.wait(timeout_s)

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call `callback` when the flag is set during the block, or at once when it is set already.

        It runs on the thread that cancels, perhaps twice, and perhaps a little after the block ended. It
        must neither wait nor raise.
        """
        name = object()
        with self._lock:
            self._callbacks[name] = callback
        try:
            if self.is_cancelled:
                callback()
            yield
        finally:
            with self._lock:
                del self._callbacks[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """What a call brings along. Immutable, thread-safe, and good for any number of calls at once.

    A call that is called off, or whose time is up, ends within a tenth of a second with `Cancelled` or
    `DeadlineExceeded`, and leaves nothing behind: what it was writing is removed, what it was publishing is
    not visible. What others wait for too, such as a chunk that two readers want, goes on for them.

    Raises:
        InvalidArgument: a time is negative or no number, a header malformed, or credentials not hashable.
    """

    timeout_s: float | None = None
    """How long each call may take, in seconds from its beginning."""
    deadline_s: float | None = None
    """When a call must have ended, by `time.monotonic()`. With `timeout_s`, the earlier one counts."""
    cancellation: Cancellation | None = None
    """Calls off what runs with this context, and makes later calls with it fail."""
    request_metadata: RequestMetadata | None = None
    """Who asks, for the server's logs."""
    headers: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]] | None = None
    """Sent with every request to a server."""
    credentials: Credentials | None = None
    """Proof of who asks, such as a `snaploader.BearerToken`. A context with headers or credentials has both:
    neither of the constructor's is sent then."""
    group_id: str | None = None
    """The partition of the file cache to work in; see `FileCache`."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "deadline_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not math.isnan(value)
            if value is not None and not (is_number and (name == "deadline_s" or value >= 0)):
                raise InvalidArgument(f"{name} is {value!r}: give seconds, 0 or more, or None for no bound")
        for name, kind in (
            ("cancellation", Cancellation),
            ("request_metadata", RequestMetadata),
            ("group_id", str),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InvalidArgument(f"{name} is of type {type(value).__name__}: give a {kind.__name__}")
        for name in ("headers", "refresh"):
            if self.credentials is not None and not callable(getattr(self.credentials, name, None)):
                raise InvalidArgument(
                    f"credentials of type {type(self.credentials).__name__} have no method {name}: "
                    "give a snaploader.BearerToken, or an object like it"
                )
        if self.headers is not None:
            object.__setattr__(self, "headers", checked_headers(self.headers))
        if self.credentials is not None and type(self.credentials).__hash__ is None:
            raise InvalidArgument(
                f"credentials of type {type(self.credentials).__name__} are not hashable: define __hash__ "
                "beside __eq__, or freeze the dataclass"
            )

    @property
    def proof(self) -> tuple[Headers | None, Credentials | None]:
        """The headers and credentials: what a server knows the caller by."""
        return cast("Headers | None", self.headers), self.credentials

    @property
    def caller(self) -> tuple[object, ...]:
        """Who asks, as a key to remember things by: what one caller was told is not told another."""
        return self.group_id, *self.proof

    def identity(self) -> CallContext:
        """The same caller without bounds: for what outlasts the call, such as reads of what it opened."""
        return replace(self, timeout_s=None, deadline_s=None, cancellation=None)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; infinity when there is none."""
        return math.inf if self.deadline_s is None else self.deadline_s - time.monotonic()

    @property
    def is_bounded(self) -> bool:
        """Whether anything may end the call early."""
        return self.deadline_s is not None or self.cancellation is not None

    @property
    def is_over(self) -> bool:
        """Whether the call was called off, or its time is up: an error of it may then concern nobody else."""
        return self.remaining_s <= 0 or (self.cancellation is not None and self.cancellation.is_cancelled)

    def check(self) -> None:
        """Raise Cancelled when the call was called off, DeadlineExceeded when its time is up."""
        if self.cancellation is not None:
            self.cancellation.check()
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise DeadlineExceeded("the time given for the call is up", transient=False)

    def wait_s(self, most_s: float = math.inf) -> float | None:
        """How long to wait for something at most, as `threading` takes it: None for no bound."""
        value = min(most_s, self.remaining_s)
        return None if value == math.inf else max(0.0, min(value, threading.TIMEOUT_MAX))

    def wait(self, until: threading.Event, most_s: float = math.inf) -> bool:
        """Wait for an event, for so long at most; return whether it came. Errors as `check`, as they occur.

        Args:
            until: The caller's own: it is set, too, when the call is called off.
        """
        end_s = time.monotonic() + most_s
        with nullcontext() if self.cancellation is None else self.cancellation.calling(until.set):
            # A wait may end a clock's grain early.
            while not until.wait(self.wait_s(end_s - time.monotonic())) and time.monotonic() < end_s:
                self.check()
            self.check()
            return until.is_set()

    def wait_until_done(self, future: Future[Any]) -> None:
        """Wait for a future, whatever it ends with. Errors as `check`, as they occur."""
        ended = threading.Event()
        future.add_done_callback(lambda _: ended.set())
        self.wait(ended)

    def sleep(self, seconds: float) -> None:
        """Sleep. Errors as `check`, as soon as they occur."""
        self.wait(threading.Event(), seconds)

    def wait_for(self, work: Callable[[], T]) -> T:
        """Call a function that knows nothing of contexts. Errors as `check`, as they occur.

        Where the call has bounds, the function runs on a thread of its own, and is left there to end by
        itself when the call is over before.
        """
        if not self.is_bounded:
            return work()
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                done.set_exception(error)

        thread = threading.Thread(target=copy_context().run, args=(run,), name="snaploader-wait", daemon=True)
        with translate_thread_errors("the interpreter is shutting down"):
            thread.start()
        self.wait_until_done(done)
        return done.result()

    @contextmanager
    def on_behalf(self) -> Iterator[None]:
        """Run the block as this caller, and as no other, within the bounds of the call that runs."""
        around = _current.get()
        bounded = replace(
            self, timeout_s=None, deadline_s=around.deadline_s, cancellation=around.cancellation
        )
        token = _current.set(bounded)
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Make this the context of what the block does on this thread, and of the calls that it makes.

        `timeout_s` counts from the beginning of the block.
        """
        token = _current.set(_begun(self, None))
        try:
            yield
        finally:
            _current.reset(token)


_NOTHING = CallContext()
_current: ContextVar[CallContext] = ContextVar("snaploader_call_context", default=_NOTHING)


def current() -> CallContext:
    """The context of the call that runs on this thread; an empty one when none does."""
    return _current.get()


@contextmanager
def unbounded() -> Iterator[None]:
    """Run the block to its end, whatever becomes of the call that it is part of. It must be short.

    What takes back a step that failed belongs in such a block, and what must not stop half-way.
    """
    token = _current.set(_current.get().identity())
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def own_errors() -> Iterator[None]:
    """Around work that others may wait for: what it raises because the call is over does not concern them."""
    try:
        yield
    except SnaploaderError as error:
        error.is_callers_own = error.is_callers_own or _current.get().is_over
        raise


def in_context(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Decorator of a method with an argument `context`: runs it in that, and in the object's default context.

    The method does not see the argument. The object has its default, or None, in `_default_context`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, context: CallContext | None = None, **kwargs: Any) -> T:
        given, default = context, cast("CallContext | None", self._default_context)
        if given is None and default is None:
            return method(self, *args, **kwargs)
        token = _current.set(_begun(given, default))
        try:
            _current.get().check()
            return method(self, *args, **kwargs)
        finally:
            _current.reset(token)

    return cast("Callable[Concatenate[S, P], T]", call)


def _begun(given: CallContext | None, default: CallContext | None) -> CallContext:
    """The context of a call that begins now."""
    around = _current.get()
    by_rank = [one for one in (given, around, default) if one is not None]
    chosen = {}
    for name in ("request_metadata", "group_id"):
        values = (getattr(one, name) for one in by_rank)
        chosen[name] = next((value for value in values if value is not None), None)
    proof = next((one for one in by_rank if one.headers is not None or one.credentials is not None), _NOTHING)
    bounds = given
    if given is None or (given.timeout_s is None and given.deadline_s is None):
        bounds = default
    deadlines = [around.deadline_s]
    if bounds is not None:
        deadlines.append(bounds.deadline_s)
        if bounds.timeout_s is not None:
            deadlines.append(time.monotonic() + bounds.timeout_s)
    known = [one for one in deadlines if one is not None]
    flags = list(dict.fromkeys(one.cancellation for one in by_rank if one.cancellation is not None))
    return CallContext(
        deadline_s=min(known) if known else None,
        cancellation=flags[0] if len(flags) == 1 else Cancellation(*flags) if flags else None,
        headers=proof.headers,
        credentials=proof.credentials,
        **chosen,
    )
