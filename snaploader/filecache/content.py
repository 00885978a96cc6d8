"""Moving bytes between files, and hashing them on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress

from snaploader.digest import Buffer, DigestFunction, Hasher

BUFFER_BYTES = 1 << 20
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_NO_COPY_RANGE = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)
_local = threading.local()


def buffer() -> memoryview:
    """This thread's buffer of BUFFER_BYTES: a fresh one each time would cost its page faults each time."""
    view: memoryview | None = getattr(_local, "view", None)
    if view is None:
        view = _local.view = memoryview(bytearray(BUFFER_BYTES))
    return view


def hash_file(fd: int, function: DigestFunction) -> tuple[str, int]:
    """The hash of a whole file and the number of bytes hashed. Leaves the file's position alone."""
    view = buffer()
    count = os.preadv(fd, [view], 0)
    if count < len(view):
        # Most blobs end here: one read and one hash.
        rest = os.preadv(fd, [view[count:]], count) if count else 0
        if not rest:
            return function.hash(view[:count]), count
        count += rest
    hasher = function.hasher()
    size = 0
    while count:
        hasher.update(view[:count])
        size += count
        count = os.preadv(fd, [view], size)
    return hasher.hexdigest(), size


def read_file(fd: int, size: int) -> bytes:
    """The bytes of a file, at most one more than `size`."""
    parts = []
    done = 0
    while done <= size:
        part = os.pread(fd, size + 1 - done, done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(fd: int, data: Buffer) -> None:
    """Write all of `data` at the file's position."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def copy_hashing(source: int, target: int, hasher: Hasher, limit: int | None = None) -> int:
    """Append the whole of `source` to `target` and to the hash; the number of bytes copied.

    What is hashed is what was written, also when `source` changes meanwhile. Stops after `limit` + 1 bytes.
    """
    view = buffer()
    size = 0
    while limit is None or size <= limit:
        count = os.preadv(source, [view], size)
        if not count:
            break
        hasher.update(view[:count])
        write_all(target, view[:count])
        size += count
    return size


def copy_content(source: int, target: int, size: int) -> None:
    """Make the empty file `target` hold the bytes of `source`, sharing its blocks where the disk can."""
    with suppress(OSError):
        fcntl.ioctl(target, _FICLONE, source)
        return
    copy_range(source, target, 0, size)


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy the bytes from `start` up to `end` to the same place. OSError when `source` ends before."""
    done = start
    with suppress_errnos(_NO_COPY_RANGE):
        while done < end:
            count = os.copy_file_range(source, target, end - done, done, done)
            if not count:
                break
            done += count
    view = buffer()
    while done < end:
        count = os.preadv(source, [view[: end - done]], done)
        if not count:
            raise OSError(errno.EIO, f"the file ended at byte {done} of {end} while it was copied")
        os.lseek(target, done, os.SEEK_SET)
        write_all(target, view[:count])
        done += count


class suppress_errnos:  # noqa: N801  (reads like contextlib.suppress)
    """Ignore an OSError with one of these codes, and end the block there."""

    def __init__(self, codes: frozenset[int]) -> None:
        self._codes = codes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError) and error.errno in self._codes
