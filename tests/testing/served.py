"""What the tests of the embedded server share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from snaploader.testing import EmbeddedServer
from snaploader.testing.conformance import Endpoint


@dataclass(frozen=True)
class Served:
    """A running server and an endpoint on it."""

    server: EmbeddedServer
    endpoint: Endpoint


Serve: TypeAlias = Callable[..., Served]


def eventually(is_true: Callable[[], bool]) -> None:
    """Wait until a condition that gives no signal is true, for a minute at most."""
    deadline = time.monotonic() + 60
    pause = threading.Event()
    while not is_true():
        assert time.monotonic() < deadline
        pause.wait(0.005)


def code_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> grpc.StatusCode:
    """The status that a call ends with."""
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
