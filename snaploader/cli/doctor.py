"""`snaploader doctor`: are the caches fit for use, and does all that is kept of workspaces agree?

What writes to the cache folder goes to a cache of its own in a temporary folder inside it, so on the same
file system, and leaves what is cached alone. A remote cache gets random blobs and one action result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import stat
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cow
from snaploader._proto import any_pb2, remote_execution_pb2
from snaploader.cli.options import option, workspace_command
from snaploader.cli.output import CheckFailed, explain
from snaploader.cli.resources import Settings, Workspaces, read_secret
from snaploader.cli.values import format_size, format_time
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    translate_os_errors,
)
from snaploader.filecache import FileCache
from snaploader.files import PRIVATE

if TYPE_CHECKING:
    from snaploader.remote import RemoteCache
    from snaploader.testing import conformance
    from snaploader.workspace import check

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


@workspace_command("doctor")
@option(
    "--conformance",
    is_flag=True,
    help="Also run the conformance suite against the server (leaves about 60 MiB of random blobs there).",
)
def doctor(workspaces: Workspaces, conformance: bool) -> None:
    """Exercise the cache folder and the remote cache; say what is wrong and what to do.

    Where there is a catalog of workspaces, it is compared with what is on this host. Ends with exit code 13
    when something is wrong. Warnings are not.
    """
    caches, output = workspaces.caches, workspaces.output
    results = run_checks("cache", LOCAL, caches.settings, local_remedy)
    if caches.remote_cache is None:
        output.talk("no --remote-cache is configured, so none is checked")
    else:
        results += run_checks("remote", REMOTE, caches.remote_cache, remote_remedy)
        if conformance:
            results += run_conformance(caches.settings)
    if workspaces.settings.has_catalog:
        results += run_checks("workspaces", WORKSPACES, workspaces)
    else:
        results += _without_catalog(workspaces.settings.state_folder)
    failed = [result for result in results if result.status is Status.FAILED]
    output.data({"checks": [dataclasses.asdict(result) for result in results], "passed": not failed})
    output.table(
        {
            "": "status",
            "check": lambda result: f"{result.area}: {result.name}",
            "time>": lambda result: format_time(result.seconds),
            "found": "detail",
        },
        results,
    )
    for result in results:
        if result.remedy:
            output.text()
            output.text(f"{result.area}: {result.name} ({result.status})")
            output.text(f"  {result.detail}")
            output.text(f"  → {result.remedy}")
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(results)} checks failed")


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """It works, but not as well as it could."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """A check before it failed, on which this one builds."""


@dataclass(frozen=True, slots=True)
class Result:
    area: str
    name: str
    status: Status
    detail: str
    remedy: str = ""
    """What to do, where something is wrong."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. With a remedy it is a warning, unless it is a failure."""

    detail: str
    remedy: str = ""
    is_failure: bool = False
    parts: Sequence[Result] = ()
    """Each thing that is wrong, where there are several."""


Finder = Callable[[Any], Finding]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to find out about a cache or a catalog."""

    name: str
    run: Finder
    """What it raises is a failure."""
    remedy: str
    """What to do about such a failure, unless its cause says better."""
    needed: bool = False
    """Whether the checks after it make no sense when it fails."""


LOCAL: list[Check] = []
"""The checks of the cache folder, in order, of the `Settings`."""
REMOTE: list[Check] = []
"""The checks of a `RemoteCache`."""
WORKSPACES: list[Check] = []
"""The checks of `Workspaces`."""


def _check(
    checks: list[Check], name: str, remedy: str, *, needed: bool = False
) -> Callable[[Finder], Finder]:

    def decorate(run: Finder) -> Finder:
        checks.append(Check(name, run, remedy, needed))
        return run

    return decorate


def run_checks(
    area: str,
    checks: Iterable[Check],
    subject: object,
    remedy: Callable[[BaseException], str] = lambda _error: "",
) -> list[Result]:
    """Run checks in order. An error is a finding, not the end; `remedy` may know what to do by its cause."""
    results: list[Result] = []
    blocked = ""
    for check in checks:
        if blocked:
            results.append(Result(area, check.name, Status.SKIPPED, f"needs {blocked!r}"))
            continue
        begin = time.monotonic()
        try:
            finding = check.run(subject)
        except Exception as error:  # noqa: BLE001  whatever goes wrong is what a doctor is there to tell
            finding = Finding(explain(error).message, remedy(error) or check.remedy, is_failure=True)
        seconds = time.monotonic() - begin
        status = Status.FAILED if finding.is_failure else Status.WARNING if finding.remedy else Status.OK
        results.append(Result(area, check.name, status, finding.detail, finding.remedy, seconds))
        results += finding.parts
        if finding.is_failure and check.needed:
            blocked = check.name
    return results


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


@_check(LOCAL, "folder", "create it, or choose another --cache-dir", needed=True)
def _folder(settings: Settings) -> Finding:
    folder = settings.cache_folder
    with translate_os_errors(f"cannot create the cache folder {str(folder)!r}"):
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    with (
        translate_os_errors(f"cannot write to the cache folder {str(folder)!r}"),
        tempfile.TemporaryFile(dir=folder),
    ):
        return Finding(str(folder))


@_check(LOCAL, "permissions", "make the folder yours: chown it to this user")
def _permissions(settings: Settings) -> Finding:
    folder = settings.cache_folder
    status = folder.stat()
    mode = f"mode {stat.S_IMODE(status.st_mode):o}, owner {status.st_uid}"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return Finding(mode, f"everyone may write there: chmod o-w {str(folder)!r}")
    if status.st_uid != os.geteuid():
        return Finding(
            f"{mode}, while this user is {os.geteuid()}", "share the folder by a group, or use your own"
        )
    return Finding(mode)


@_check(
    LOCAL,
    "write, read, verify",
    "use another file system for the cache: this one does not keep what is written",
)
def _round_trip(settings: Settings) -> Finding:
    with _sample_cache(settings) as (cache, data, digest):
        begin = time.monotonic()
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


@_check(LOCAL, "leases", "use a local file system: this one lacks working file locks")
def _leases(settings: Settings) -> Finding:
    with _sample_cache(settings) as (cache, data, digest):
        cache.write(digest, data)
        with cache.lease([digest]):
            cache.prune(0)
            if cache.find_missing([digest]):
                raise FailedPrecondition("a blob was evicted while it was leased")
        cache.prune(0)
        if not cache.find_missing([digest]):
            raise FailedPrecondition("a blob whose lease has ended is not evicted")
    return Finding("hold, and end")


@_check(LOCAL, "hard links", "use a file system with hard links: without, files are copied")
def _links(settings: Settings) -> Finding:
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=settings.cache_folder) as scratch:
        original = Path(scratch, "a")
        original.write_bytes(b"x")
        try:
            os.link(original, Path(scratch, "b"))
        except OSError as error:
            return Finding(
                f"not possible ({error.strerror})", "files are copied instead, at the cost of time"
            )
    return Finding("work")


@_check(LOCAL, "sparse files", "use a file system with sparse files, such as ext4 or xfs")
def _sparse(settings: Settings) -> Finding:
    with tempfile.TemporaryFile(dir=settings.cache_folder) as file:
        file.truncate(SAMPLE_BYTES)
        os.pwrite(file.fileno(), b"x" * 4096, SAMPLE_BYTES // 2)
        extents = list(cow.data_extents(file.fileno(), SAMPLE_BYTES))
        used = os.fstat(file.fileno()).st_blocks * 512
    found = sum(end - start for start, end in extents)
    if used >= SAMPLE_BYTES or found >= SAMPLE_BYTES:
        return Finding(
            "holes take space, or cannot be told apart from data",
            "use ext4, xfs or btrfs for the cache and for images: they are read in full here",
        )
    return Finding("holes take no space and are found")


@_check(LOCAL, "clock", "set the clock of this host, or of the file server")
def _clock(settings: Settings) -> Finding:
    with tempfile.NamedTemporaryFile(dir=settings.cache_folder, prefix=".doctor-") as file:
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
            "the order of eviction will be wrong: use a local file system",
        )
    return Finding("the file system's agrees, access times are kept")


@_check(
    LOCAL, "pins", "pin again what they kept, or unpin them: until then nothing of their group is evicted"
)
def _pins(settings: Settings) -> Finding:
    with settings.open_file_cache() as cache:
        found = cache.statistics()
    if found.damaged_pins:
        raise DataLoss(
            f"{len(found.damaged_pins)} of {found.pins} are damaged, such as {found.damaged_pins[0]!r}"
        )
    return Finding(f"{found.pins}, of {format_size(found.pinned_bytes)}")


@_check(LOCAL, "space", "free disk space, or lower --max-cache-size")
def _space(settings: Settings) -> Finding:
    with settings.open_file_cache() as cache:
        used = sum(entry.disk_bytes for entry in cache.entries())
    disk = os.statvfs(settings.cache_folder)
    free = disk.f_bavail * disk.f_frsize
    allowed = format_size(settings.max_cache_size)
    detail = f"{format_size(used)} of this group, {allowed} allowed, {format_size(free)} free"
    if free < SAMPLE_BYTES * 16:
        return Finding(detail, "free disk space: the disk is full", is_failure=True)
    if used + free < settings.max_cache_size:
        return Finding(detail, "the disk will be full before the cache is: lower --max-cache-size")
    if disk.f_files and disk.f_favail < MIN_FREE_INODES:
        return Finding(f"{detail}, {disk.f_favail} inodes free", "the disk runs out of inodes")
    return Finding(detail)


@contextlib.contextmanager
def _sample_cache(settings: Settings) -> Iterator[tuple[FileCache, bytes, Digest]]:
    """A cache in the same file system, and a blob that is not in it."""
    with (
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=settings.cache_folder) as scratch,
        FileCache(scratch, max_bytes=64 * SAMPLE_BYTES) as cache,
    ):
        yield cache, *_sample(DigestFunction.SHA256, SAMPLE_BYTES)


_CREDENTIALS = "check the address, TLS options and credentials (--remote-cache, --tls-…, --remote-header)"


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


@_check(REMOTE, "connection, capabilities", _CREDENTIALS, needed=True)
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
            "snapshots can be loaded from there, not saved: allow action cache updates for this client",
        )
    return Finding(detail)


@_check(REMOTE, "latency", "use a server that is nearer, or a faster network")
def _latency(remote: RemoteCache) -> Finding:
    times = []
    for _ in range(PINGS):
        begin = time.monotonic()
        remote.find_missing([_sample(remote.digest_function, 16)[1]])
        times.append(time.monotonic() - begin)
    middle = statistics.median(times)
    detail = f"{format_time(middle)} for a small call (median of {PINGS})"
    if middle > SLOW_S:
        return Finding(detail, "chunks that are missing locally will be felt; use a server that is nearer")
    return Finding(detail)


def _remote_round_trip(size: int, remote: RemoteCache) -> Finding:
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


REMOTE += [
    Check(name, functools.partial(_remote_round_trip, size), remedy)
    for name, size, remedy in (
        ("small blobs", SMALL_BYTES, "let this client write to the server's CAS"),
        ("big blobs", BIG_BYTES, "see that ByteStream passes the server's proxies"),
    )
]


@_check(REMOTE, "action cache", "let this client update the action cache, for saving")
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


_RECOVER = "`snaploader workspace recover` repairs it, on this host"
_UNKNOWN = (
    "recovery leaves alone what the catalog does not know: see whether --catalog is the right one. If so, "
    "`snaploader workspace adopt` takes in a workspace; remove what is not wanted from --state-dir; "
    "`snaploader cache unpin` lets go of a pin"
)
_REMEDIES = {
    "unmanaged": _UNKNOWN,
    "incomplete": (
        "`snaploader cache verify` tells what is damaged; a snapshot in the remote cache is fetched from "
        "there; roll back to another version, or delete the workspace"
    ),
    "process": (
        "`snaploader workspace recover` starts again, on this host, what the catalog says is running, also a "
        "command that has ended by itself, and stops the rest; to leave one ended, "
        "`snaploader workspace stop` it"
    ),
    "unpinned": "`snaploader workspace recover`; take a new version, and delete the workspace if that fails",
}


@_check(
    WORKSPACES,
    "catalog",
    "see whether --catalog and --state-dir are right, and the database can be reached",
    needed=True,
)
def _catalog(workspaces: Workspaces) -> Finding:
    catalog = workspaces.catalog
    with catalog.reading() as reader:
        states = Counter(str(each.state) for each in reader.workspaces(host=workspaces.manager.host))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Finding(f"{catalog.url}: {counts or 'no workspaces'}")


@_check(WORKSPACES, "agreement", "see whether the folders of --state-dir and --cache-dir can be read")
def _agreement(workspaces: Workspaces) -> Finding:
    from snaploader.workspace.check import check

    wrong = [_wrong(finding) for finding in check(workspaces.manager)]
    if not wrong:
        return Finding("catalog, snapshots, slots and what runs agree")
    things = "1 thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
    return Finding(f"{things} wrong, listed below", is_failure=True, parts=wrong)


def _without_catalog(state_folder: Path) -> list[Result]:
    """What is here of workspaces although there is no catalog, which may have been lost."""
    ids: set[str] = set()
    for folder in (state_folder / "runtime" / "workspaces", state_folder / "paused"):
        with contextlib.suppress(OSError):
            ids.update(name for name in os.listdir(folder) if "." not in name)  # the rest are leftovers
    if not ids:
        return []
    detail = f"there is none, but {str(state_folder)!r} holds workspaces: {', '.join(sorted(ids))}"
    return [Result("workspaces", "catalog", Status.FAILED, detail, _LOST)]


_LOST = (
    "name the catalog with --catalog. If it is lost, `snaploader workspace recover` takes back those that "
    "are paused, and `snaploader workspace adopt` the others"
)


def _wrong(finding: check.Finding) -> Result:
    name = f"{finding.kind} of {finding.workspace_id}" if finding.workspace_id else str(finding.kind)
    remedy = _REMEDIES.get(finding.kind, _RECOVER) if finding.is_known else _UNKNOWN
    return Result("workspaces", name, Status.FAILED, finding.detail, remedy)


_DEVIATES = "the server deviates from the Remote Execution API; see whether a newer version does"


def run_conformance(settings: Settings) -> list[Result]:
    """The result of every check. InvalidArgument when an option is set that the suite does not know."""
    from snaploader.testing import conformance

    results = []
    with _endpoint(settings) as endpoint:
        for each in conformance.run(endpoint):
            is_passed = each.outcome is conformance.Outcome.PASSED
            status = Status.OK if is_passed else Status(each.outcome)  # the others have names in common
            remedy = _DEVIATES if status is Status.FAILED else ""
            name = each.name.replace("_", " ")
            results.append(Result("conformance", name, status, each.detail, remedy, each.elapsed_s))
    return results


def _endpoint(settings: Settings) -> conformance.Endpoint:
    if settings.tls_server_name:
        raise InvalidArgument(
            "--conformance works without --tls-server-name: name the server in --remote-cache as its "
            "certificate does"
        )
    from snaploader.remote.auth import make_credentials
    from snaploader.remote.config import parse_endpoint
    from snaploader.testing import conformance

    server = parse_endpoint(settings.remote_cache)
    credentials = make_credentials(
        server,
        bearer_token=read_secret(settings.bearer_token_file),
        credential_helper=settings.credential_helper,
        netrc_file=settings.netrc,
        helper_timeout_s=settings.remote_timeout,
    )
    headers: list[tuple[str, str | bytes]] = [(name.lower(), value) for name, value in settings.remote_header]
    if credentials is not None:
        headers += credentials.headers()  # once: the suite is over before they expire
    return conformance.Endpoint(
        settings.remote_cache,
        instance_name=settings.remote_instance_name,
        headers=headers,
        root_certificates=_pem(settings.tls_certificate),
        client_certificate=_pem(settings.tls_client_certificate),
        client_key=_pem(settings.tls_client_key),
        timeout_s=settings.remote_timeout,
    )


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with translate_os_errors(f"cannot read {str(path)!r}"):
        return path.read_bytes()
