"""A remote cache in a folder, so that it outlives the processes that a test kills."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from snaploader.digest import Digest, DigestFunction
from snaploader.testing import FakeCAS


class _FileDict(MutableMapping[Digest, bytes]):
    """Bytes by digest, each in a file that is replaced in one step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: Digest) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __setitem__(self, key: Digest, value: bytes) -> None:
        staging = self._folder / f".{uuid.uuid4().hex}"
        staging.write_bytes(value)
        staging.rename(self._path(key))

    def __delitem__(self, key: Digest) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[Digest]:
        for name in sorted(os.listdir(self._folder)):
            if not name.startswith("."):
                hash_, size = name.split("-")
                yield Digest(hash_, int(size), DigestFunction.SHA256)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: Digest) -> Path:
        return self._folder / f"{key.hash}-{key.size_bytes}"


class FolderCAS(FakeCAS):
    """The same for all processes that open it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.blobs = _FileDict(folder / "blobs")  # type: ignore[assignment]
        self.action_results = _FileDict(folder / "results")  # type: ignore[assignment]
