"""What the parts of one store share: its tables, its private files, its locks, and the smallest helpers.

Locks are taken in this order, and never the other way round:

    resize or sync lock → checkpoint's gate → store's gate → chunk lock → those in budget, flights, counters

A chunk source is asked with nothing held but the place in the gate as a reader.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cow.chunks import BASE, FROZEN, HOLE, LAZY, PRIVATE, ChunkStates, Counters, StoreStatistics, chunk_length
from cow.errors import StoreClosed, StoreInUse
from cow.mapping import FileMapping, MappingBudget, OpenFile
from cow.source import ChunkSource, OpenedChunk
from cow.sync import ChunkLocks, Gate

if TYPE_CHECKING:
    from cow.checkpoint import Checkpoint

_log = logging.getLogger(__name__)
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


class BaseFile:
    """The original file of a store that did not copy it: one descriptor, closed with the store."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.fd = -1
        self.path = os.fspath(path)
        # A pipe would block when opened, so ask before.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{self.path!r} is not a regular file")
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class StoreState:
    """The shared state of a store. `size`, `states` and `source` change only as their comments say."""

    def __init__(
        self,
        files: PrivateFiles,
        *,
        size: int,
        chunk_size: int,
        budget: MappingBudget,
        source: ChunkSource | None = None,
        base: BaseFile | None = None,
    ) -> None:
        self.files = files
        self.size = size
        """Grows, in the gate's exclusive section."""
        self.chunk_size = chunk_size
        self.mappings = budget._maps.part(FileMapping)
        """Mapped chunks. What is found here is the chunk's content now, or was when the reader began."""
        self.descriptors = budget._files.part(OpenFile)
        """Private files that are open for writing. A checkpoint lets go of them all."""
        self.source = source
        """Replaced, in the gate's exclusive section, by one that serves the same bytes."""
        self.base = base
        self.chunks = ChunkStates(size, chunk_size)
        self.epoch = 0
        """Number of checkpoints begun; names the files made since."""
        self.checkpoint: Checkpoint | None = None
        """The open one. Set and cleared in the gate's exclusive section."""
        self.gate = Gate(lambda: StoreClosed(f"the store in {files.folder!r} is closed"))
        self.locks = ChunkLocks()
        self.counters = Counters()
        self.resize_lock = threading.Lock()
        self.sync_lock = threading.Lock()
        self.tables_lock = threading.Lock()
        """Held where several tables must be seen together, and to set `touched`, which readers do."""

    def length(self, index: int) -> int:
        """Length of a chunk."""
        return chunk_length(index, self.size, self.chunk_size)

    def has_file(self, kind: int) -> bool:
        """Whether a chunk in this state has a file of its own."""
        return kind in (PRIVATE, FROZEN)

    def name(self, index: int) -> str:
        """Name of a chunk's own file."""
        return file_name(index, int(self.chunks.epoch[index]))

    def describe(self, index: int) -> str:
        """A chunk, for messages."""
        return f"chunk {index} of the store in {self.files.folder!r}"

    def prefetch(self, indices: list[int]) -> None:
        """Tell the source what will be read soon."""
        source = self.source
        if source is None:
            return
        try:
            source.prefetch(indices)
        except Exception:  # noqa: BLE001  (hints are optional, whatever goes wrong with them)
            _log.exception("a chunk source failed to take a hint; reading goes on without")

    def open_lazy(self, index: int) -> OpenedChunk:
        """Open a chunk that is in the source, and count it; the caller closes the descriptor."""
        assert self.source is not None
        opened = self.source.open_chunk(index)
        with self.counters.lock:
            self.counters.source_opens += 1
        self.count_origin(index, opened.origin, opened.prefetched)
        return opened

    def drop_file(self, name: str, kind: int) -> None:
        """Remove the file of a chunk that was in state `kind` and has other content now; or let the open
        checkpoint do it, if it may need it."""
        if not self.has_file(kind):
            return
        if kind == FROZEN and self.checkpoint is not None:
            self.checkpoint.keep_until_end(name)
        else:
            self.files.remove([name])

    def dirty(self) -> npt.NDArray[np.bool_]:
        """A mask of the chunks modified since the last commit."""
        with self.tables_lock:
            dirty = self.chunks.written.copy()
            if self.checkpoint is not None:
                dirty[: len(self.checkpoint.written)] |= self.checkpoint.written
        return dirty

    def count_origin(self, index: int, origin: str, prefetched: bool = False) -> None:
        """Count where a chunk came from, the first time it is read."""
        if self.chunks.is_touched(index):
            return
        with self.tables_lock:
            if self.chunks.is_touched(index):
                return
            self.chunks.touched[index] = True
        with self.counters.lock:
            self.counters.count_origin(origin, self.length(index), prefetched)

    def count_first_reads(self, mask: npt.NDArray[np.bool_], origin: str) -> None:
        """Count those of many chunks that had not been read, all of one origin."""
        with self.tables_lock:
            fresh = mask & ~self.chunks.touched[: len(mask)]
            self.chunks.touched[: len(mask)] |= fresh
        if fresh.any():
            length = self._masked_bytes(fresh)
            with self.counters.lock:
                self.counters.count_origin(origin, length, False, int(fresh.sum()))

    def statistics(self, prefetch_issued: int, prefetch_used: int) -> StoreStatistics:
        """All counts, with those of the readahead, which it is given."""
        kinds = self.chunks.kind
        masks = {
            "hole": kinds == HOLE,
            "lazy": kinds == LAZY,
            "base": kinds == BASE,
            "private": np.isin(kinds, (PRIVATE, FROZEN)),
            "dirty": self.dirty(),
        }
        counts = {f"{name}_chunks": int(mask.sum()) for name, mask in masks.items()}
        lengths = {f"{name}_bytes": self._masked_bytes(mask) for name, mask in masks.items()}
        counters = self.counters
        with counters.lock:
            return StoreStatistics(
                size=self.size,
                chunk_size=self.chunk_size,
                chunk_count=len(kinds),
                **counts,
                **lengths,
                origins=counters.origins(),
                hole_reads=counters.hole_reads,
                copies_on_write=counters.copies_on_write,
                copied_bytes=counters.copied_bytes,
                source_opens=counters.source_opens,
                mapped_bytes=self.mappings.weight,
                prefetch_issued=prefetch_issued,
                prefetch_used=prefetch_used,
            )

    def _masked_bytes(self, mask: npt.NDArray[np.bool_]) -> int:
        """Total length of the chunks in a mask of the first ones, or all."""
        total = int(mask.sum()) * self.chunk_size
        if len(mask) and mask[-1]:
            total -= self.chunk_size - self.length(len(mask) - 1)
        return total

    def close(self) -> None:
        """Remove the private files, and let go of everything. The gate is closed."""
        self.mappings.clear()
        self.descriptors.clear()
        own = np.flatnonzero(np.isin(self.chunks.kind, (PRIVATE, FROZEN)))
        try:
            self.files.remove(self.name(index) for index in own.tolist())
            if self.checkpoint is not None:
                self.files.remove(self.checkpoint.superseded())
        finally:
            self.files.close()
            if self.base is not None:
                self.base.close()
