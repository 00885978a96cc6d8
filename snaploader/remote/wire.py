"""Digests and digest functions as they stand in messages."""

from __future__ import annotations

from typing import cast

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest, DigestFunction


def to_message(digest: Digest) -> reapi.Digest:
    """A digest as a message."""
    return reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes)


def function_field(function: DigestFunction) -> reapi.DigestFunction.Value:
    """The field digest_function: unset for SHA-256, which older servers infer from the hash's length."""
    number = 0 if function is DigestFunction.SHA256 else function.value
    return cast("reapi.DigestFunction.Value", number)
