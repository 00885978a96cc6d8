"""Everything this library raises on purpose.

    SnaploaderError
    ├── InvalidArgument      an argument, file or message is malformed (also a ValueError)
    ├── NotFound             no such snapshot, blob, ref or file (also a LookupError)
    ├── FailedPrecondition   the system is not in the state the call needs
    ├── ResourceExhausted    a disk, quota, size or count limit was met
    ├── PermissionDenied     the credentials are known and do not suffice
    ├── Unauthenticated      no credentials, or not accepted
    ├── Unavailable          a server cannot be reached or asks to come back later
    ├── DeadlineExceeded     the time given for the call ran out (also a TimeoutError)
    ├── Cancelled            the work was called off: by its caller, or a cache or loader was closed
    ├── DataLoss             bytes do not match their digest in any place that holds them
    ├── Unimplemented        the server does not offer what the call needs
    └── Internal             a broken invariant, here or in a server

The names are gRPC's, as the Remote Execution API uses them. Each error knows whether trying again
may help (`transient`) and which exit code the command line ends with (`exit_code`; documented in
docs/errors.md, never to be renumbered). Errors of gRPC are translated in `snaploader.remote.calls`,
errors of the operating system by `translate_os_errors` below; the original is the `__cause__`.

Not in this tree: `cow.COWError` and its children, because `cow` stands alone; and TypeError for
arguments of a wrong type.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class SnaploaderError(Exception):
    """Base of all errors of this library.

    Args:
        message: What failed, which key, digest or path, and what to do next.
        transient: Whether the same call may succeed later; the class's default when None.
    """

    transient: bool = False
    exit_code: ClassVar[int] = 1
    is_callers_own: bool = False
    """Whether it is of no concern to others who wait for the same work: its call was called off, or its time
    was up. One of them takes the work over then."""
    uploaded: tuple[Any, ...] = ()
    """Digests (`snaploader.digest.Digest`) that were on their way to the remote cache when deriving a
    snapshot there failed. Those that arrived belong to none; the next attempt need not send them again."""

    def __init__(self, message: str, *, transient: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        if transient is not None:
            self.transient = transient


class InvalidArgument(SnaploaderError, ValueError):
    """An argument, file or message is malformed. Trying again does not help."""

    exit_code = 2


class NotFound(SnaploaderError, LookupError):
    """No such snapshot, blob, ref or file."""

    exit_code = 3


class FailedPrecondition(SnaploaderError):
    """The system is not in the state the call needs, such as an output folder that is not empty."""

    exit_code = 4


class ResourceExhausted(SnaploaderError):
    """A limit was met: disk, quota, message size, open files.

    Transient when a server says so of its own load; a full disk or an oversized message is not.
    """

    exit_code = 5


class Unavailable(SnaploaderError):
    """A server cannot be reached, or asks to come back later."""

    transient = True
    exit_code = 6


class DeadlineExceeded(SnaploaderError, TimeoutError):
    """The time given for the call ran out."""

    transient = True
    exit_code = 7


class PermissionDenied(SnaploaderError):
    """The caller is known and may not do this."""

    exit_code = 8


class Unauthenticated(SnaploaderError):
    """Credentials are missing or not accepted."""

    exit_code = 9


class DataLoss(SnaploaderError):
    """Bytes do not match their digest, in every place that was asked."""

    exit_code = 10


class Unimplemented(SnaploaderError):
    """The server does not offer what the call needs."""

    exit_code = 11


class Cancelled(SnaploaderError):
    """The work was called off: by its caller, as a cache or loader was closed, or another part failed."""

    exit_code = 12


class Internal(SnaploaderError):
    """A broken invariant, here or in a server. Please report it with the message."""

    exit_code = 1


_ERRNOS: dict[type[SnaploaderError], tuple[int, ...]] = {
    NotFound: (errno.ENOENT,),
    ResourceExhausted: (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    PermissionDenied: (errno.EACCES, errno.EPERM, errno.EROFS),
    DataLoss: (errno.EIO,),
    InvalidArgument: (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    FailedPrecondition: (errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV),
}
_BY_ERRNO = {number: kind for kind, numbers in _ERRNOS.items() for number in numbers}


def from_os_error(error: OSError, what: str, *, absent: type[SnaploaderError] = NotFound) -> SnaploaderError:
    """The typed error for an OSError while doing `what`, of the kind `absent` where a file is not there."""
    kind = absent if error.errno == errno.ENOENT else _BY_ERRNO.get(error.errno or 0, Internal)
    reason = os.strerror(error.errno) if error.errno else str(error)
    where = f" ({error.filename!r})" if error.filename else ""
    return kind(f"{what}: {reason}{where}")


@contextmanager
def translate_thread_errors(closed: str) -> Iterator[None]:
    """Raise what keeps work from getting a thread as a typed error, chained.

    Cancelled, with `closed` as its message, where the pool was shut down. Python says RuntimeError for both.
    """
    try:
        yield
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise Cancelled(closed) from error
        raise ResourceExhausted(
            "no more threads can be started: raise the limit of processes and threads, of the user "
            "(ulimit -u) or of the control group (pids.max)"
        ) from error


@contextmanager
def translate_os_errors(what: str, *, absent: type[SnaploaderError] = NotFound) -> Iterator[None]:
    """Raise typed errors, chained, for every OSError that leaves the block; arguments as `from_os_error`.

    Errors of this library pass through, also those that are OSErrors (DeadlineExceeded is one).
    """
    try:
        yield
    except SnaploaderError:
        raise
    except OSError as error:
        raise from_os_error(error, what, absent=absent) from error
