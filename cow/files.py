"""The private files of a store, one per chunk that was written, in a folder that the store owns."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable

from cow.errors import StoreInUse

_NAME = re.compile(r"[0-9]+\.[0-9]+")


def file_name(index: int, epoch: int) -> str:
    """Name of the file that chunk `index` got in checkpoint epoch `epoch`."""
    return f"{index}.{epoch}"


class PrivateFiles:
    """A folder of private chunk files. Thread-safe; the store sees to it that no two calls fight over a file.

    A chunk that is written after a checkpoint gets a new file, named by the epoch, so a file that was
    handed out never changes. Files become part of the store only when it says so, so they need no
    temporary name: a crash leaves a scratch folder to delete, whatever the names in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Take possession of `folder`, made if absent. StoreInUse when it is, or was, another store's."""
        self._fd = -1
        self._pid = os.getpid()
        self.folder = os.path.abspath(os.fspath(folder))
        try:
            os.makedirs(self.folder, mode=0o700)
            self._made = True
        except FileExistsError:
            self._made = False
        self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._claim()
        except BaseException:
            self._close_folder()
            raise

    def _claim(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(
                f"the folder {self.folder!r} belongs to an open store: give each its own"
            ) from None
        with os.scandir(self._fd) as entries:
            left = next((entry.name for entry in entries if _NAME.fullmatch(entry.name)), None)
        if left is not None:
            raise StoreInUse(
                f"the folder {self.folder!r} holds files of an earlier store ({left!r}): remove it first"
            )

    def path(self, name: str) -> str:
        """Absolute path of a file."""
        return f"{self.folder}/{name}"

    def create(self, name: str, length: int) -> int:
        """Make a file of `length` zeros that takes no blocks; returns its descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            os.ftruncate(fd, length)
        except BaseException:
            self.abandon(name, fd)
            raise
        return fd

    def abandon(self, name: str, fd: int) -> None:
        """Close and remove a file that was created but will not be used."""
        os.close(fd)
        self.remove([name])

    def open(self, name: str, *, writable: bool = False) -> int:
        """Open an existing file; returns its descriptor."""
        return os.open(name, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC, dir_fd=self._fd)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child: the files are its parent's, who goes on to use them."""
        return os.getpid() != self._pid

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those already gone are fine. In a forked child it does nothing."""
        if self.inherited:
            return
        for name in names:
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                pass

    def sync_folder(self) -> None:
        """Make the names durable."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Give the folder up; it is removed if this object made it and it is empty."""
        if self._made and not self.inherited:
            try:
                os.rmdir(self.folder)
            except OSError:
                pass
        try:
            # A child forked meanwhile shares the lock: it must neither keep it nor take it from its parent.
            if not self.inherited:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._close_folder()

    def __del__(self) -> None:
        self._close_folder()

    def _close_folder(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
