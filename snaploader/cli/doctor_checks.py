"""What `doctor` checks of the file cache and of a remote cache, and how checks are run.

What writes to the cache folder goes to a cache of its own in a temporary folder inside it, so on the same
file system, and leaves what is cached alone. A remote cache gets random blobs and one action result.
"""

from __future__ import annotations

import errno
import os
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import cow
from snaploader._proto import any_pb2, remote_execution_pb2
from snaploader.cli.exits import explain
from snaploader.cli.resources import Settings
from snaploader.cli.values import format_size, format_time
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    translate_os_errors,
)
from snaploader.filecache import FileCache
from snaploader.files import PRIVATE

if TYPE_CHECKING:
    from snaploader.remote import RemoteCache

SAMPLE_BYTES = 1 << 20
MAX_CLOCK_SKEW_S = 5.0
MIN_FREE_INODES = 10_000

SMALL_BYTES = 64 << 10
"""Goes in a batch."""
BIG_BYTES = 3 << 20
"""Goes as a stream, in several messages."""
PINGS = 5
SLOW_S = 0.05
"""A reader that waits for a missing chunk waits at least so long, which is felt."""

_CREDENTIALS = "check the address, TLS options and credentials (--remote-cache, --tls-…, --remote-header)"


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well as it could."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """A check before it failed, on which this one builds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    detail: str
    status: Status = Status.OK
    remedy: str = ""
    """What to do, where something is wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to find out."""

    name: str
    run: Callable[[], Finding]
    """What it raises is a failure."""
    remedy: str
    """What to do about such a failure, unless its cause says better."""
    needed: bool = False
    """Whether the checks after it make no sense when it fails."""


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was run, or skipped."""

    area: str
    name: str
    status: Status
    detail: str
    remedy: str
    seconds: float


Remedies = Callable[[BaseException], str]
"""What to do about an error, by its cause; empty when the cause does not tell."""


def run_checks(area: str, checks: Iterable[Check], remedies: Remedies = lambda _error: "") -> list[Result]:
    """Run checks in order. An error is a finding, not the end."""
    results: list[Result] = []
    blocked = ""
    for check in checks:
        if blocked:
            results.append(Result(area, check.name, Status.SKIPPED, f"needs {blocked!r}", "", 0.0))
            continue
        begin = time.monotonic()
        try:
            finding = check.run()
        except Exception as error:  # noqa: BLE001  whatever goes wrong is what a doctor is there to tell
            finding = Finding(explain(error).message, Status.FAILED, remedies(error) or check.remedy)
        seconds = time.monotonic() - begin
        results.append(Result(area, check.name, finding.status, finding.detail, finding.remedy, seconds))
        if finding.status is Status.FAILED and check.needed:
            blocked = check.name
    return results


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
        data, digest = _sample(DigestFunction.SHA256, SAMPLE_BYTES)
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
        data, digest = _sample(DigestFunction.SHA256, SAMPLE_BYTES)
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
    with settings.open_file_cache() as cache:
        found = cache.statistics()
    if found.damaged_pins:
        raise DataLoss(
            f"{len(found.damaged_pins)} of {found.pins} are damaged, such as {found.damaged_pins[0]!r}"
        )
    return Finding(f"{found.pins}, of {format_size(found.pinned_bytes)}")


def _space(settings: Settings) -> Finding:
    with settings.open_file_cache() as cache:
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


def remote_checks(remote: RemoteCache) -> list[Check]:
    """The checks of a remote cache, in order."""
    return [
        Check("connection, capabilities", lambda: _capabilities(remote), _CREDENTIALS, needed=True),
        Check("latency", lambda: _latency(remote), "use a server that is nearer, or a faster network"),
        Check(
            "small blobs",
            lambda: _remote_round_trip(remote, SMALL_BYTES),
            "let this client write to the server's CAS",
        ),
        Check(
            "big blobs",
            lambda: _remote_round_trip(remote, BIG_BYTES),
            "see that ByteStream passes the server's proxies",
        ),
        Check(
            "action cache",
            lambda: _action_cache(remote),
            "let this client update the action cache, for saving",
        ),
    ]


def remote_remedy(error: BaseException) -> str:
    """What to do about an error of the remote cache, where its cause tells."""
    if isinstance(error, ResourceExhausted):
        return "make room on the server, or raise its limits"
    if isinstance(error, Unauthenticated):
        return (
            "renew the credentials (--remote-header, --bearer-token-file, --credential-helper, --netrc, "
            "--tls-client-certificate)"
        )
    return ""


def _capabilities(remote: RemoteCache) -> Finding:
    offered = remote.capabilities()
    functions = ", ".join(function.name for function in sorted(offered.digest_functions))
    limit = format_size(offered.max_batch_bytes) if offered.max_batch_bytes else "not stated"
    compression = "zstd" if offered.zstd_streams else "none"
    detail = f"API {offered.api_version or '?'}, {functions}, compression {compression}, batch limit {limit}"
    if offered.digest_function is not DigestFunction.BLAKE3:
        detail += f"; using {offered.digest_function.name}"
    if not offered.update_enabled:
        return Finding(
            detail + "; read-only",
            Status.WARNING,
            "snapshots can be loaded from there, not saved: allow action cache updates for this client",
        )
    return Finding(detail)


def _latency(remote: RemoteCache) -> Finding:
    times = []
    for _ in range(PINGS):
        begin = time.monotonic()
        remote.find_missing([_sample(remote.digest_function, 16)[1]])
        times.append(time.monotonic() - begin)
    middle = statistics.median(times)
    detail = f"{format_time(middle)} for a small call (median of {PINGS})"
    if middle > SLOW_S:
        return Finding(
            detail,
            Status.WARNING,
            "chunks that are missing locally will be felt; use a server that is nearer",
        )
    return Finding(detail)


def _remote_round_trip(remote: RemoteCache, size: int) -> Finding:
    data, digest = _sample(remote.digest_function, size)
    if not remote.find_missing([digest]):
        raise FailedPrecondition("the server claims to have a blob that was never uploaded")
    begin = time.monotonic()
    remote.write(digest, data)
    written = time.monotonic()
    if remote.find_missing([digest]):
        raise DataLoss(
            "the server accepted a blob and does not have it: it may drop the writes of this client"
        )
    asked = time.monotonic()
    if remote.read(digest) != data:
        raise DataLoss("the server returned other bytes than were written")
    read = time.monotonic() - asked
    return Finding(f"{format_size(size)} up in {format_time(written - begin)}, down in {format_time(read)}")


def _action_cache(remote: RemoteCache) -> Finding:
    key = Digest(os.urandom(32).hex(), 1, remote.digest_function)
    result = remote_execution_pb2.ActionResult()
    note = any_pb2.Any(type_url="type.googleapis.com/google.protobuf.StringValue", value=b"\n\x06doctor")
    result.execution_metadata.auxiliary_metadata.append(note)
    remote.update_action_result(key, result)
    stands = remote.get_action_result(key)
    if note not in stands.execution_metadata.auxiliary_metadata:
        raise FailedPrecondition(
            "the action cache does not keep auxiliary metadata, in which snapshots say what they are"
        )
    return Finding("updates are kept, metadata too")


def _sample(function: DigestFunction, size: int) -> tuple[bytes, Digest]:
    data = os.urandom(size)
    return data, Digest.of(data, function)
