"""Is the cache folder fit for use?

What writes goes to a cache of its own in a temporary folder inside the cache folder, so on the same file
system, and leaves what is cached alone.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cow
from snaploader.cli.doctor.check import Check, Finding, Status
from snaploader.cli.session import Settings
from snaploader.cli.values import format_size
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    translate_os_errors,
)
from snaploader.filecache import FileCache
from snaploader.folders import PRIVATE

SAMPLE_BYTES = 1 << 20
MAX_CLOCK_SKEW_S = 5.0
MIN_FREE_INODES = 10_000


def local_checks(settings: Settings) -> list[Check]:
    """The checks of the cache folder, in order."""
    folder = settings.cache_folder
    return [
        Check(
            "folder",
            lambda: _folder(folder),
            f"create {str(folder)!r}, or choose another --cache-dir",
            needed=True,
        ),
        Check("permissions", lambda: _permissions(folder), "make the folder yours: chown it to this user"),
        Check(
            "write, read, verify",
            lambda: _round_trip(folder),
            "use another file system for the cache: this one does not keep what is written",
        ),
        Check(
            "leases", lambda: _leases(folder), "use a local file system: this one lacks working file locks"
        ),
        Check(
            "hard links",
            lambda: _links(folder),
            "use a file system with hard links: without, files are copied",
        ),
        Check(
            "sparse files",
            lambda: _sparse(folder),
            "use a file system with sparse files, such as ext4 or xfs",
        ),
        Check("clock", lambda: _clock(folder), "set the clock of this host, or of the file server"),
        Check(
            "pins",
            lambda: _pins(settings),
            "pin again what they kept, or unpin them: until then nothing of their group is evicted",
        ),
        Check("space", lambda: _space(settings), "free disk space, or lower --max-cache-size"),
    ]


def local_remedy(error: BaseException) -> str:
    """What to do about an error of the cache folder, where its cause tells."""
    number = _errno(error)
    if number in {errno.EMFILE, errno.ENFILE}:
        return "let more files be open: ulimit -n"
    if number == errno.EROFS:
        return "mount the file system writable, or choose another --cache-dir"
    if number in {errno.EACCES, errno.EPERM} or isinstance(error, PermissionDenied):
        return "make the folder writable for this user, or choose another --cache-dir"
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return "free disk space (or inodes, or quota) there, or choose another --cache-dir"
    if isinstance(error, ResourceExhausted):
        return "free disk space, or choose another --cache-dir"
    return ""


def _errno(error: BaseException | None) -> int | None:
    """What the system said: the number of the error, or of the one that caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__
    return None


def _folder(folder: Path) -> Finding:
    with translate_os_errors(f"cannot create the cache folder {str(folder)!r}"):
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    with (
        translate_os_errors(f"cannot write to the cache folder {str(folder)!r}"),
        tempfile.TemporaryFile(dir=folder),
    ):
        return Finding(str(folder))


def _permissions(folder: Path) -> Finding:
    status = folder.stat()
    mode = f"mode {stat.S_IMODE(status.st_mode):o}, owner {status.st_uid}"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return Finding(mode, Status.WARNING, f"everyone may write there: chmod o-w {str(folder)!r}")
    if status.st_uid != os.geteuid():
        return Finding(
            f"{mode}, while this user is {os.geteuid()}",
            Status.WARNING,
            "share the folder by a group, or use your own",
        )
    return Finding(mode)


def _round_trip(folder: Path) -> Finding:
    with _sample_cache(folder) as cache:
        begin = time.monotonic()
        data, digest = _sample()
        cache.write(digest, data)
        if cache.find_missing([digest]) or cache.read(digest) != data:
            raise DataLoss("what was written is not what is read")
        seconds = time.monotonic() - begin
        refused = Digest(DigestFunction.SHA256.hash(b"other"), len(data), DigestFunction.SHA256)
        try:
            cache.write(refused, data)
        except DataLoss:
            pass
        else:
            raise DataLoss("a blob with wrong bytes was accepted")
        report = cache.verify()
        if report.bad_blobs or report.blobs != 1:
            raise DataLoss(
                f"verification found {report.blobs} blobs and {len(report.bad_blobs)} bad ones, not 1 and 0"
            )
    return Finding(f"{format_size(len(data))} in {seconds * 1000:.1f} ms")


def _leases(folder: Path) -> Finding:
    with _sample_cache(folder) as cache:
        data, digest = _sample()
        cache.write(digest, data)
        with cache.lease([digest]):
            cache.prune(0)
            if cache.find_missing([digest]):
                raise FailedPrecondition("a blob was evicted while it was leased")
        cache.prune(0)
        if not cache.find_missing([digest]):
            raise FailedPrecondition("a blob whose lease has ended is not evicted")
    return Finding("hold, and end")


def _links(folder: Path) -> Finding:
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
        original = Path(scratch, "a")
        original.write_bytes(b"x")
        try:
            os.link(original, Path(scratch, "b"))
        except OSError as error:
            return Finding(
                f"not possible ({error.strerror})",
                Status.WARNING,
                "files are copied instead, at the cost of time",
            )
    return Finding("work")


def _sparse(folder: Path) -> Finding:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(SAMPLE_BYTES)
        os.pwrite(file.fileno(), b"x" * 4096, SAMPLE_BYTES // 2)
        extents = list(cow.data_extents(file.fileno(), SAMPLE_BYTES))
        used = os.fstat(file.fileno()).st_blocks * 512
    found = sum(end - start for start, end in extents)
    if used >= SAMPLE_BYTES or found >= SAMPLE_BYTES:
        return Finding(
            "holes take space, or cannot be told apart from data",
            Status.WARNING,
            "use ext4, xfs or btrfs for the cache and for images: they are read in full here",
        )
    return Finding("holes take no space and are found")


def _clock(folder: Path) -> Finding:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(b"x")
        file.flush()
        skew = os.stat(file.name).st_mtime - time.time()
        wanted = time.time() - 1000
        os.utime(file.name, (wanted, os.stat(file.name).st_mtime))
        kept = os.stat(file.name).st_atime
    if abs(skew) > MAX_CLOCK_SKEW_S:
        raise FailedPrecondition(f"the file system's clock is {skew:+.1f} s off from this host's")
    if abs(kept - wanted) > 2:
        return Finding(
            "the file system does not keep access times that are set",
            Status.WARNING,
            "the order of eviction will be wrong: use a local file system",
        )
    return Finding("the file system's agrees, access times are kept")


def _pins(settings: Settings) -> Finding:
    with FileCache(
        settings.cache_folder,
        max_bytes=settings.max_cache_size,
        cache_mode=settings.cache_mode,
        group_id=settings.group_id,
    ) as cache:
        found = cache.statistics()
    if found.damaged_pins:
        raise DataLoss(
            f"{len(found.damaged_pins)} of {found.pins} are damaged, such as {found.damaged_pins[0]!r}"
        )
    return Finding(f"{found.pins}, of {format_size(found.pinned_bytes)}")


def _space(settings: Settings) -> Finding:
    with FileCache(
        settings.cache_folder,
        max_bytes=settings.max_cache_size,
        cache_mode=settings.cache_mode,
        group_id=settings.group_id,
    ) as cache:
        used = sum(entry.disk_bytes for entry in cache.entries())
    disk = os.statvfs(settings.cache_folder)
    free = disk.f_bavail * disk.f_frsize
    allowed = format_size(settings.max_cache_size)
    detail = f"{format_size(used)} of this group, {allowed} allowed, {format_size(free)} free"
    if free < SAMPLE_BYTES * 16:
        return Finding(detail, Status.FAILED, "free disk space: the disk is full")
    if used + free < settings.max_cache_size:
        return Finding(
            detail, Status.WARNING, "the disk will be full before the cache is: lower --max-cache-size"
        )
    if disk.f_files and disk.f_favail < MIN_FREE_INODES:
        return Finding(
            f"{detail}, {disk.f_favail} inodes free", Status.WARNING, "the disk runs out of inodes"
        )
    return Finding(detail)


@contextmanager
def _sample_cache(folder: Path) -> Iterator[FileCache]:
    with (
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch,
        FileCache(scratch, max_bytes=64 * SAMPLE_BYTES) as cache,
    ):
        yield cache


def _sample() -> tuple[bytes, Digest]:
    data = os.urandom(SAMPLE_BYTES)
    return data, Digest.of(data, DigestFunction.SHA256)
