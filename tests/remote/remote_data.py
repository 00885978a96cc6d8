"""What the tests share: blobs that are always the same, and the types of the fixtures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from snaploader.blobstore import Upload
from snaploader.digest import Digest, DigestFunction
from snaploader.remote import RemoteCache, RetryPolicy
from snaploader.testing import EmbeddedServer

MakeRemote: TypeAlias = Callable[..., RemoteCache]
MakeServer: TypeAlias = Callable[..., EmbeddedServer]

QUICK = RetryPolicy(initial_delay_s=0.001, max_delay_s=0.005, budget_s=30)
"""Retries that hardly wait."""

SHA256 = DigestFunction.SHA256
BLAKE3 = DigestFunction.BLAKE3

KIB = 1024
MIB = 1024 * KIB


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return random.Random(f"{size}/{seed}").randbytes(size)


def text(size: int, seed: int = 0) -> bytes:
    """Bytes that compress to about half."""
    return noise(size // 2 + 1, seed).hex().encode()[:size]


def named(*blobs: bytes, function: DigestFunction = BLAKE3) -> dict[Digest, bytes]:
    """Blobs by digest."""
    return {Digest.of(blob, function): blob for blob in blobs}


def uploads(blobs: dict[Digest, bytes]) -> list[Upload]:
    """Blobs as uploads."""
    return [Upload(digest, data) for digest, data in blobs.items()]
