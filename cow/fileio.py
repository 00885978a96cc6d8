"""Bytes in memory and files: zeros and holes, whole reads and writes, copies, replacing a file at once."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from cow.errors import StoreInUse, TruncatedFile

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE_SIZE = mmap.PAGESIZE
"""Granularity of dirty pages and of mappings."""

_NO_SEEK_DATA = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
_PROBE = 4096
_BLOCK = 1 << 20
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h
_NAME = re.compile(r"[0-9]+\.[0-9]+")


def is_zero(buffer: Buffer) -> bool:
    """Whether every byte of `buffer` is zero; true for an empty one.

    The buffer must be C-contiguous; its alignment and item type do not matter. Runs at memory speed, stops at
    the first block that is not zero, and releases the GIL for all but tiny buffers.
    """
    view = memoryview(buffer)
    if not view.nbytes:
        return True
    data = np.frombuffer(view, np.uint8)
    # Data that is not zero mostly shows it early: look at a page before streaming through the rest.
    if data[:_PROBE].any():
        return False
    words_end = len(data) & ~7
    words = data[:words_end].view(np.uint64)
    for position in range(0, len(words), _BLOCK // 8):
        if np.bitwise_or.reduce(words[position : position + _BLOCK // 8]):
            return False
    return not data[words_end:].any()


def data_extents(fd: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The ranges (start, end) of the file between `start` and `size` that may hold data, in order.

    A file system that does not know its holes gives one range with everything. Changes the offset of `fd`.
    """
    position = start
    while position < size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
            if begin >= size:
                return
            end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in _NO_SEEK_DATA:
                raise
            begin, end = position, size
        yield begin, end
        position = end


def chunk_extents(fd: int, size: int, chunk_size: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The chunks of a file that may hold data, in order, each with its ranges as of `data_extents`.

    One pass: finding the end of an extent costs time by its length, so never ask for each chunk anew.
    """
    index = -1
    ranges: list[tuple[int, int]] = []
    for begin, end in data_extents(fd, size):
        start = begin
        while start < end:
            if start // chunk_size != index:
                if ranges:
                    yield index, ranges
                index, ranges = start // chunk_size, []
            stop = min(end, (index + 1) * chunk_size)
            ranges.append((start, stop))
            start = stop
    if ranges:
        yield index, ranges


def write_all(fd: int, buffer: Buffer, offset: int) -> None:
    """Write all of `buffer` at `offset`, or raise an OSError after some of it (a full disk)."""
    view = memoryview(buffer).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def write_nonzero(fd: int, buffer: Buffer, offset: int) -> None:
    """Write `buffer` at `offset`, all but its pages of zeros, which become or stay holes.

    The target must read as zeros there already. Errors as `write_all`.
    """
    view = memoryview(buffer).cast("B")
    data = np.frombuffer(view, np.uint8)
    whole = len(data) // PAGE_SIZE * PAGE_SIZE
    words = data[:whole].view(np.uint64).reshape(-1, PAGE_SIZE // 8)
    used = np.bitwise_or.reduce(words, axis=1) != 0
    if whole < len(data):
        used = np.append(used, data[whole:].any())
    # Where a run of used pages begins and where it ends.
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) * PAGE_SIZE
    for start, end in edges.reshape(-1, 2).tolist():
        write_all(fd, view[start:end], offset + start)


def read_all(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill `buffer` from `offset`; TruncatedFile, naming `what`, when the file ends before."""
    while len(buffer):
        done = os.preadv(fd, [buffer], offset)
        if not done:
            raise TruncatedFile(f"{what} ends {len(buffer)} bytes too early: restore it and open it again")
        buffer = buffer[done:]
        offset += done


def clone_range(source: int, source_offset: int, length: int, target: int, target_offset: int) -> bool:
    """Share the extents of a range between two files (reflink); False where the file system cannot."""
    argument = struct.pack("qQQQ", source, source_offset, length, target_offset)
    try:
        fcntl.ioctl(target, _FICLONERANGE, argument)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY or error.errno in (errno.ENOTTY, errno.EBADF, errno.ETXTBSY):
            return False
        raise
    return True


def copy_range(
    source: int, source_offset: int, length: int, target: int, target_offset: int, what: str
) -> None:
    """Copy a range, in the kernel where it can; TruncatedFile, naming `what`, when the source ends before."""
    try:
        while length:
            done = os.copy_file_range(source, target, length, source_offset, target_offset)
            if not done:
                raise TruncatedFile(f"{what} ends {length} bytes too early: restore it and open it again")
            source_offset += done
            target_offset += done
            length -= done
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    buffer = memoryview(bytearray(min(length, _BLOCK)))
    while length:
        part = buffer[:length]
        read_all(source, part, source_offset, what)
        write_all(target, part, target_offset)
        source_offset += len(part)
        target_offset += len(part)
        length -= len(part)


def copy_sparse(
    source: int, source_offset: int, length: int, target: int, target_offset: int, what: str
) -> None:
    """Do as `copy_range` does, but for holes; the target must read as zeros there already."""
    end = source_offset + length
    if os.fstat(source).st_size < end:
        raise TruncatedFile(f"{what} is shorter than {end} bytes: restore it and open it again")
    for start, stop in data_extents(source, end, source_offset):
        copy_range(source, start, stop - start, target, target_offset + start - source_offset, what)


@contextmanager
def replaced_file(path: str, *, durable: bool) -> Iterator[int]:
    """A descriptor of an empty file that replaces `path` when the block ends; removed when it raises.

    A child forked within the block leaves it to its parent. `durable` waits until file and name are on disk.
    """
    pid = os.getpid()
    temporary = f"{path}.{pid}-{secrets.token_hex(4)}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        if os.getpid() == pid:
            os.unlink(temporary)
        raise
    if durable:
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def file_name(index: int, epoch: int) -> str:
    """Name of the file that chunk `index` got in checkpoint epoch `epoch`."""
    return f"{index}.{epoch}"


class _Descriptor:
    """Something with an open descriptor, which is closed with the object at the latest."""

    fd = -1

    def close_descriptor(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close_descriptor()


class PrivateFiles(_Descriptor):
    """A folder of private chunk files. Thread-safe; the store sees to it that no two calls fight over a file.

    A chunk that is written after a checkpoint gets a new file, named by the epoch, so a file that was
    handed out never changes. They need no temporary names: a crash leaves a scratch folder to delete.

    `folder` is made if absent. StoreInUse when it is, or was, another store's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._pid = os.getpid()
        self.folder = os.path.abspath(os.fspath(folder))
        self._made = False
        with suppress(FileExistsError):
            os.makedirs(self.folder, mode=0o700)
            self._made = True
        self.fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._claim()
        except BaseException:
            self.close_descriptor()
            raise

    def _claim(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(f"the folder {self.folder!r} is an open store's: give each its own") from None
        with os.scandir(self.fd) as entries:
            left = next((entry.name for entry in entries if _NAME.fullmatch(entry.name)), None)
        if left is not None:
            raise StoreInUse(
                f"the folder {self.folder!r} holds files of an earlier store ({left!r}): remove it first"
            )

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def create(self, name: str, length: int) -> int:
        """The descriptor of a new file of `length` zeros that takes no blocks."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
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
        return os.open(name, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC, dir_fd=self.fd)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child: the files are its parent's, who goes on to use them."""
        return os.getpid() != self._pid

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those already gone are fine. In a forked child it does nothing."""
        if self.inherited:
            return
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)

    def close(self) -> None:
        """Give the folder up; it is removed if this object made it and it is empty."""
        try:
            # A child forked meanwhile shares the lock: it must neither keep it nor take it from its parent.
            if not self.inherited:
                if self._made:
                    with suppress(OSError):
                        os.rmdir(self.folder)
                fcntl.flock(self.fd, fcntl.LOCK_UN)
        finally:
            self.close_descriptor()


class BaseFile(_Descriptor):
    """The original file of a store that did not copy it: one descriptor, closed with the store."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # A pipe would block when opened, so ask before.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{self.path!r} is not a regular file")
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def __str__(self) -> str:
        return f"the file {self.path!r}"
