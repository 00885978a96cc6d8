"""The methods of the services this library speaks, read from their descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory

from snaploader._proto._pool import POOL

REAPI = "build.bazel.remote.execution.v2"
CAS = f"{REAPI}.ContentAddressableStorage"
ACTION_CACHE = f"{REAPI}.ActionCache"
CAPABILITIES = f"{REAPI}.Capabilities"
BYTE_STREAM = "google.bytestream.ByteStream"
SERVICES = (CAS, ACTION_CACHE, CAPABILITIES, BYTE_STREAM)


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    path: str
    """As gRPC spells it: /package.Service/Method."""
    request: type[Any]
    response: type[Any]
    client_streaming: bool
    server_streaming: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


def methods(service: str) -> dict[str, Method]:
    """The methods of a service, by name."""
    descriptor = POOL.FindServiceByName(service)
    return {
        method.name: Method(
            path=f"/{service}/{method.name}",
            request=message_factory.GetMessageClass(method.input_type),
            response=message_factory.GetMessageClass(method.output_type),
            client_streaming=method.client_streaming,
            server_streaming=method.server_streaming,
        )
        for method in descriptor.methods
    }
