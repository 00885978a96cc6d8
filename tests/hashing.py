"""How many bytes are hashed, and by which package."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

import pytest

from snaploader import digest
from snaploader.digest import Buffer, DigestFunction, Hasher


class _CountingHasher:
    def __init__(self, hasher: Hasher, hashed: Counter[str], package: str) -> None:
        self._hasher = hasher
        self._hashed = hashed
        self._package = package
        self.digest = hasher.digest
        self.hexdigest = hasher.hexdigest

    def update(self, data: Buffer) -> object:
        self._hashed[self._package] += memoryview(data).nbytes
        return self._hasher.update(data)


def count_hashed_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from now on, the bytes that are hashed for digests, by package ("remote", "loader", …)."""
    hashed: Counter[str] = Counter()
    hash_, hasher = DigestFunction.hash, DigestFunction.hasher

    def counting_hash(function: DigestFunction, data: Buffer) -> str:
        hashed[_package(sys._getframe(1))] += memoryview(data).nbytes
        return hash_(function, data)

    def counting_hasher(function: DigestFunction) -> Hasher:
        return _CountingHasher(hasher(function), hashed, _package(sys._getframe(1)))

    monkeypatch.setattr(DigestFunction, "hash", counting_hash)
    monkeypatch.setattr(DigestFunction, "hasher", counting_hasher)
    return hashed


def _package(frame: FrameType | None) -> str:
    while frame is not None and frame.f_code.co_filename == digest.__file__:
        frame = frame.f_back
    name = frame.f_globals["__name__"] if frame is not None else ""
    parts = name.split(".")
    return parts[1] if parts[0] == "snaploader" else "tests"
