"""A store as a Python file."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Protocol

from cow.errors import OutOfBounds

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Store(Protocol):
    @property
    def size(self) -> int: ...
    def readinto_at(self, offset: int, buffer: Buffer) -> int: ...
    def write_at(self, offset: int, data: Buffer) -> int: ...
    def resize(self, size: int) -> None: ...


class StoreFile(io.RawIOBase):
    """An unbuffered binary file over a store: seekable, readable, writable.

    Reads end at the end of the store; a write that would pass it is OutOfBounds (`truncate` grows the
    store first). Closing it leaves the store open. Not thread-safe: it has a position.
    """

    def __init__(self, store: _Store) -> None:
        super().__init__()
        self._store = store
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._store.size}[whence]
        if start + offset < 0:
            raise OutOfBounds(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        self._check()
        target = memoryview(buffer).cast("B")
        length = max(0, min(len(target), self._store.size - self._position))
        if length:
            self._store.readinto_at(self._position, target[:length])
        self._position += length
        return length

    def write(self, data: Buffer, /) -> int:
        self._check()
        done = self._store.write_at(self._position, data)
        self._position += done
        return done

    def truncate(self, size: int | None = None, /) -> int:
        self._check()
        size = self._position if size is None else size
        self._store.resize(size)
        return size

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed file")
