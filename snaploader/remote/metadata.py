"""The metadata sent with every call: custom headers, and REAPI's RequestMetadata."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from snaploader._proto import remote_execution_pb2
from snaploader._version import __version__
from snaploader.errors import InvalidArgument

Headers: TypeAlias = tuple[tuple[str, str | bytes], ...]


class Secret(str):
    """A text that its `repr` does not show, as in a traceback with the values of variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


REQUEST_METADATA_HEADER = "build.bazel.remote.execution.v2.requestmetadata-bin"
"""Named by the REAPI, in the comment of RequestMetadata."""

_NAME = re.compile(r"[0-9a-z_.-]{1,256}")
_SECRET = re.compile(r"auth|cookie|key|passw|secret|token")
_VALUE = re.compile(r"[\x20-\x7e]{0,8192}")


@dataclass(frozen=True, slots=True)
class RequestMetadata:
    """Who asks: for a server's logs, and to follow one task over several services (REAPI RequestMetadata)."""

    action_id: str = ""
    """The action a request belongs to."""
    tool_invocation_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """One run of the tool; a new UUID by default."""
    correlated_invocations_id: str = ""
    """Several runs that belong together, such as a build's."""
    action_mnemonic: str = ""
    target_id: str = ""
    configuration_id: str = ""

    def header(self) -> tuple[str, bytes]:
        """As metadata of a call."""
        message = remote_execution_pb2.RequestMetadata(
            tool_details=remote_execution_pb2.ToolDetails(tool_name="snaploader", tool_version=__version__),
            action_id=self.action_id,
            tool_invocation_id=self.tool_invocation_id,
            correlated_invocations_id=self.correlated_invocations_id,
            action_mnemonic=self.action_mnemonic,
            target_id=self.target_id,
            configuration_id=self.configuration_id,
        )
        return REQUEST_METADATA_HEADER, message.SerializeToString()


def checked_headers(headers: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]) -> Headers:
    """Headers as gRPC takes them: names in lower case. InvalidArgument for what it would refuse.

    Values appear neither in messages nor in the `repr` of what this returns: they may be secrets.
    """
    items = headers.items() if isinstance(headers, Mapping) else headers
    return tuple(_checked(name, value) for name, value in items)


def _checked(name: str, value: str | bytes) -> tuple[str, str | bytes]:
    name = name.strip().lower()
    if not _NAME.fullmatch(name) or name.startswith("grpc-"):
        raise InvalidArgument(
            f"header name {name[:80]!r} is not allowed: use letters, digits, '-', '_' and '.'"
        )
    if name.endswith("-bin"):
        if not isinstance(value, bytes):
            raise InvalidArgument(f"header {name!r} ends in -bin, so its value must be bytes")
    elif not isinstance(value, str) or not _VALUE.fullmatch(value):
        raise InvalidArgument(f"the value of header {name!r} must be printable ASCII text of at most 8 KiB")
    else:
        value = Secret(value)
    return name, value


def is_secret(name: str) -> bool:
    """Whether a header of this name likely holds what should not be sent in the clear."""
    return _SECRET.search(name) is not None
