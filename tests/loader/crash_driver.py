"""Runs one operation again and again, killing it at its first step on disk, its second, and so on.

    python crash_driver.py OPERATION FOLDER URL [STRIDE]

Each time a forked child does the operation on a copy of a prepared cache and kills itself (SIGKILL)
before the nth step; another one then opens what is left and checks it. Ends when a child comes to its
end unkilled. Prints the number of kills.

A step is whatever Python's audit hooks tell of files in the folder (to open, link, rename, remove,
truncate or time-stamp one, to make or remove a folder), and each step that the file cache names. This
process itself stays free of threads and of gRPC, so that forking is safe.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from loader_hosts import CHUNK, Host, image

from snaploader import FileCache, NotFound, RemoteCache, SnapshotLoader
from snaploader._environment import HostEnvironment

FILE_EVENTS = frozenset({"open", "shutil.rmtree"}) | {
    f"os.{name}" for name in ("link", "rename", "remove", "truncate", "utime", "chmod", "mkdir", "rmdir")
}
OLD, NEW = image(1, 5, (2,)), image(1, 5, (2,))[: 3 * CHUNK] + image(2, 5)[3 * CHUNK :]
ROOM = 17 * CHUNK
"""Room for one snapshot and not for two: saving evicts."""
MAX_BYTES = {"evict": ROOM}


class Killer:
    """Ends the process at the nth step."""

    def __init__(self, at: int, folder: Path) -> None:
        self._left = at
        self._folder = str(folder)
        sys.addaudithook(self._audit)

    def step(self, _: str) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        # Descriptors of truncate and utime are of files in the folder too.
        if event in FILE_EVENTS and (
            isinstance(arguments[0], int) or os.fsdecode(arguments[0]).startswith(self._folder)  # type: ignore[arg-type]
        ):
            self.step(event)


@contextlib.contextmanager
def host(
    folder: Path, url: str, checkpoint: Callable[[str], None] = lambda step: None, max_bytes: int = 1 << 30
) -> Iterator[Host]:
    with contextlib.ExitStack() as stack:
        cache = FileCache(
            folder / "cache", max_bytes=max_bytes, _environment=HostEnvironment(after_step=checkpoint)
        )
        stack.enter_context(cache)
        remote = stack.enter_context(RemoteCache(url)) if url else None
        # One worker: the nth step is then the same one in every run.
        loader = stack.enter_context(SnapshotLoader(cache, remote, workers=1))
        yield Host(loader, cache, remote, folder)


def prepare(operation: str, folder: Path, url: str) -> None:
    folder.mkdir()
    (folder / "plain").write_bytes(b"plain" * 2000)
    with host(folder, url) as one:
        if operation == "remote-load":
            return
        options = {"snapshot_id": "first", "remote": False} if operation.endswith("derive") or not url else {}
        one.save(OLD, files={"plain": folder / "plain"}, **options)


def operate(operation: str, folder: Path, url: str, killer: Killer) -> None:
    with host(folder, url, killer.step, MAX_BYTES.get(operation, 1 << 30)) as one:
        if operation in ("save", "evict", "remote-save"):
            one.save(NEW, files={"plain": folder / "plain"})
            with one.unpack(one.find()) as unpacked:
                disk = unpacked.chunked_files["disk"]
                disk.write_at(0, b"again")
                one.save(chunked_files={"disk": disk}, branch="topic")
        elif operation.endswith("derive"):
            # The server outlives this run, and an id is never used again.
            derived = str(uuid.uuid4())
            (folder / "derived").write_text(derived)
            first = one.loader.get_snapshot_by_id("first")
            one.loader.derive_snapshot(first, snapshot_id=derived, pin="kept")
            one.loader.derive_snapshot(first, names=["plain"], pin="kept")
            one.loader.delete_snapshot(derived)
            one.cache.unpin("kept")
        else:
            with one.unpack(one.find(), writable_files=True) as unpacked:
                disk = unpacked.chunked_files["disk"]
                disk.read_at(0, disk.size)
                disk.write_at(5, b"private")
            one.loader.restore_snapshot(one.find(), folder / "restored")


def verify(operation: str, folder: Path, url: str) -> None:
    """Every read is right or a clean miss, nothing in the cache is bad, and work goes on."""
    with host(folder, url, max_bytes=MAX_BYTES.get(operation, 1 << 30)) as one:
        report = one.cache.verify()
        assert not report.bad_blobs, report
        assert not report.bad_refs, report
        allowed = {"main": [OLD, NEW], "topic": [OLD, NEW, b"again" + NEW[5:]]}
        for branch, contents in allowed.items():
            with contextlib.suppress(NotFound):
                assert one.load(branch) in contents
        # A loss is one of room, or of what was never whole; a save that was cut short loses nothing.
        if operation in ("save", "unpack", "remote-save") or operation.endswith("derive"):
            assert one.load("main") in (OLD, NEW)
        restored = folder / "restored" / "disk"
        if restored.exists():
            assert restored.read_bytes() in (OLD, NEW)
        if operation.endswith("derive"):
            verify_derived(one, folder, url)
        one.save(NEW, branch="after")
        assert one.load("after") == NEW
    leftovers = list((folder / "cache" / "v1" / "tmp").iterdir())
    assert not leftovers, leftovers


def verify_derived(one: Host, folder: Path, url: str) -> None:
    """What was derived is whole or not to be seen, on any host, and can be deleted for good."""
    path = folder / "derived"
    derived = path.read_text() if path.exists() else ""
    if not derived:
        return
    report = one.cache.verify()
    assert not report.bad_pins, report
    with host(folder / "other-host", url) if url else contextlib.nullcontext(one) as other:
        for reader, policy in ((one, "local-only"), (one, "newest"), (other, "local-first")):
            with contextlib.suppress(NotFound):
                assert reader.read(reader.loader.get_snapshot_by_id(derived, read_policy=policy)) == OLD
        one.loader.delete_snapshot(derived)
        for reader, policy in ((one, "local-first"), (one, "newest"), (other, "newest")):
            try:
                reader.loader.get_snapshot_by_id(derived, read_policy=policy)
            except NotFound:
                continue
            raise AssertionError(f"{derived} was deleted and is found, {policy}")
    one.cache.unpin("kept")
    assert one.cache.pins() == []


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    operation, base, url = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    stride = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    prepared, work = base / "prepared", base / "work"
    assert in_child(lambda: prepare(operation, prepared, url)) == 0, "preparing failed"
    kills = 0
    for number in range(1, 100_000, stride):
        shutil.copytree(prepared, work, symlinks=True)
        status = in_child(lambda n=number: operate(operation, work, url, Killer(n, work)))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, f"the operation failed at step {number}: {status}"
        assert in_child(lambda: verify(operation, work, url)) == 0, f"damage after step {number}"
        shutil.rmtree(work)
        if not killed:
            break
        kills += 1
    print(kills)


if __name__ == "__main__":
    main()
