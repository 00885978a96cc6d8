"""What the tests of the embedded server share."""

from __future__ import annotations

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


def code_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> grpc.StatusCode:
    """The status that a call ends with."""
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
