"""gRPC statuses become typed errors here, and nowhere else.

The status itself stays reachable through the error's `__cause__`, for `code_of` and its siblings.
"""

from __future__ import annotations

import re
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from snaploader import errors
from snaploader._proto import duration_pb2, status_pb2
from snaploader.errors import SnaploaderError

Code = grpc.StatusCode

_ERRORS: dict[grpc.StatusCode, tuple[type[SnaploaderError], bool]] = {
    Code.UNAVAILABLE: (errors.Unavailable, True),
    Code.ABORTED: (errors.Unavailable, True),
    Code.DEADLINE_EXCEEDED: (errors.DeadlineExceeded, True),
    Code.RESOURCE_EXHAUSTED: (errors.ResourceExhausted, True),  # unless a message was too large
    Code.INTERNAL: (errors.Internal, True),
    Code.UNKNOWN: (errors.Internal, True),
    Code.CANCELLED: (errors.Cancelled, True),  # the server's cancelling, not ours
    Code.UNAUTHENTICATED: (errors.Unauthenticated, False),  # but once, when credentials could be renewed
    Code.DATA_LOSS: (errors.DataLoss, False),
    Code.NOT_FOUND: (errors.NotFound, False),
    Code.INVALID_ARGUMENT: (errors.InvalidArgument, False),
    Code.OUT_OF_RANGE: (errors.InvalidArgument, False),
    Code.FAILED_PRECONDITION: (errors.FailedPrecondition, False),
    Code.ALREADY_EXISTS: (errors.FailedPrecondition, False),
    Code.PERMISSION_DENIED: (errors.PermissionDenied, False),
    Code.UNIMPLEMENTED: (errors.Unimplemented, False),
}
"""The kind of each code, and whether it is transient."""

_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_MAX_DETAILS = 1000
_DETAILS_KEY = "grpc-status-details-bin"
_RETRY_INFO = "/google.rpc.RetryInfo"
_TOO_LARGE = re.compile("larger than max|too large|exceeds maximum", re.IGNORECASE)


class MessageStatus(grpc.RpcError):
    """A google.rpc.Status found inside a response, which answers as a failed call does."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return _BY_NUMBER.get(self._status.code, Code.UNKNOWN)

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> Any:
        return ((_DETAILS_KEY, self._status.SerializeToString()),)


def from_message(status: status_pb2.Status, what: str) -> SnaploaderError:
    """Translate a status, not OK, inside a response; `what` as in `from_rpc_error`."""
    return from_rpc_error(MessageStatus(status), what)


def from_rpc_error(error: grpc.RpcError, what: str) -> SnaploaderError:
    """Translate the error of a call; `what` says what was being done, as in "reading 1f…/4096"."""
    call = _call(error)
    code, details = (Code.UNKNOWN, str(error)) if call is None else (call.code(), call.details() or "")
    kind, transient = _ERRORS.get(code, (errors.Internal, False))
    if code is Code.RESOURCE_EXHAUSTED and _TOO_LARGE.search(details):
        transient = False
    shown = details if len(details) <= _MAX_DETAILS else details[:_MAX_DETAILS] + "…"
    typed = kind(f"{what} failed: {shown or 'no reason given'} ({code.name})", transient=transient)
    typed.__cause__ = error
    return typed


def code_of(error: BaseException) -> grpc.StatusCode | None:
    """Return the gRPC code behind a typed error; None when there is none."""
    call = _call(error.__cause__)
    return call.code() if call is not None else None


def is_of_whole_call(error: BaseException) -> bool:
    """Tell whether a call as such failed, rather than one blob in it."""
    return _call(error.__cause__) is not None and not isinstance(error.__cause__, MessageStatus)


def is_too_large(error: BaseException) -> bool:
    """Tell whether a request or its response may have been refused for its size.

    buildbox-casd and BuildGrid answer INVALID_ARGUMENT to a batch above their limit without
    naming it, so that code alone counts.
    """
    code = code_of(error)
    if code is Code.RESOURCE_EXHAUSTED:
        return isinstance(error, SnaploaderError) and not error.transient
    return code in (Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE)


def retry_after_s(error: BaseException) -> float | None:
    """Return how long the server asks to wait before a retry (RetryInfo); None when it does not."""
    call = _call(error.__cause__)
    try:
        for key, value in (call.trailing_metadata() or ()) if call is not None else ():
            if key == _DETAILS_KEY and isinstance(value, bytes):
                return _delay(status_pb2.Status.FromString(value))
    except DecodeError:
        return None  # undecodable advice is no advice
    return None


def _call(error: BaseException | None) -> grpc.Call | None:
    """gRPC raises objects that are errors and calls at once, of a class without a name."""
    return cast("grpc.Call", error) if isinstance(error, grpc.RpcError) and hasattr(error, "code") else None


def _delay(status: status_pb2.Status) -> float | None:
    for detail in status.details:
        # RetryInfo has one field, number 1: a Duration of at most 16 bytes, behind a tag and a length byte.
        if detail.type_url.endswith(_RETRY_INFO) and detail.value[:1] == b"\x0a":
            duration = duration_pb2.Duration.FromString(detail.value[2:])
            return max(0.0, float(duration.seconds) + duration.nanos / 1e9)
    return None
