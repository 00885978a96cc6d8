"""Forks inside the blocks of the library; the child leaves them by sys.exit.

    python fork_driver.py BLOCK FOLDER

Ends with 0 when nothing changed for the parent: no file came or went, no lock was let go, and what the block
gives still works. This process itself imports no more than the block needs, as gRPC's threads and forks do
not go together.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cow import COWStore
from snaploader import FileCache, SnapshotLoader, SnapshotTask, VMConfiguration
from snaploader._environment import HostEnvironment
from snaploader.digest import Digest, DigestFunction
from snaploader.files import FileLock
from snaploader.workers import WorkerPool

CHUNK = 4096
BLOB = b"only here" * 1000
DIGEST = Digest.of(BLOB, DigestFunction.SHA256)
ANOTHER = Digest.of(b"another", DigestFunction.SHA256)
Check = Callable[[], None]
"""Fails when the parent cannot go on with what the block gave it."""


def state(folder: Path) -> dict[str, tuple[int, bool]]:
    """Of every file and folder: its links, and whether somebody holds its lock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        # Opening and closing a SQLite file would take this process the locks that SQLite holds on it.
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or ".sqlite" in path.name:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = False
        except BlockingIOError:
            is_locked = True
        finally:
            os.close(fd)
        found[str(path)] = (os.stat(path).st_nlink, is_locked)
    return found


def fork_and_exit(folder: Path) -> None:
    """Fork; the child raises SystemExit here, and the parent sees to it that it changed nothing."""
    before = state(folder)
    pid = os.fork()
    if not pid:
        signal.alarm(120)  # a child that hangs is killed
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the child ended with {code}"
    after = state(folder)
    assert before.keys() == after.keys(), f"changed: {sorted(before.keys() ^ after.keys())}"
    assert before == after, {
        name: (before[name], after[name]) for name in before if before[name] != after[name]
    }


@contextmanager
def store(folder: Path) -> Iterator[Check]:
    with COWStore(folder / "store", size=4 * CHUNK, chunk_size=CHUNK) as opened:
        opened.write_at(0, b"written")

        def check() -> None:
            assert opened.read_at(0, 7) == b"written"

        yield check


@contextmanager
def checkpoint(folder: Path) -> Iterator[Check]:
    with COWStore(folder / "store", size=4 * CHUNK, chunk_size=CHUNK) as opened:
        opened.write_at(0, b"frozen!")
        with opened.checkpoint() as frozen:
            opened.write_at(0, b"written")

            def check() -> None:
                buffer = bytearray(CHUNK)
                frozen.readinto(0, buffer)
                assert buffer[:7] == b"frozen!"
                frozen.commit()
                assert opened.read_at(0, 7) == b"written"

            yield check


@contextmanager
def cache(folder: Path) -> Iterator[Check]:
    with FileCache(folder / "cache") as opened:
        opened.write(DIGEST, BLOB)

        def check() -> None:
            assert opened.read(DIGEST) == BLOB
            opened.write(ANOTHER, b"another")

        yield check


@contextmanager
def cache_while_a_thread_has_its_locks(folder: Path) -> Iterator[Check]:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        ledger: Any = opened._context.ledger
        with opened._evictor._lock.held(), ledger.section():
            held.set()
            release.wait()

    with FileCache(folder / "cache") as opened:
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def check() -> None:
            release.set()
            thread.join()
            opened.write(DIGEST, BLOB)

        try:
            yield check
        finally:
            release.set()


@contextmanager
def cache_while_it_evicts_in_the_background(folder: Path) -> Iterator[Check]:
    reached, release = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == "scan.begun" and threading.current_thread() is not threading.main_thread():
            reached.set()
            release.wait()

    host = HostEnvironment(after_step=step)
    bounds = {"max_bytes": 100_000, "evict_ahead_bytes": 100_000}
    with FileCache(folder / "cache", **bounds, _environment=host) as opened:
        for number in range(20):
            opened.write(Digest.of(b"%d" % number, DigestFunction.SHA256), b"%d" % number)
        reached.wait()

        def check() -> None:
            release.set()
            opened.write(DIGEST, BLOB)

        try:
            yield check
        finally:
            release.set()


@contextmanager
def lease(folder: Path) -> Iterator[Check]:
    with FileCache(folder / "cache", max_bytes=100_000) as opened:
        opened.write(DIGEST, BLOB)
        with opened.lease([DIGEST]):

            def check() -> None:
                opened.prune()
                assert opened.read(DIGEST) == BLOB

            yield check


@contextmanager
def blob_writer(folder: Path) -> Iterator[Check]:
    with FileCache(folder / "cache") as opened, opened.writer(DIGEST) as writer:
        writer.write(BLOB)

        def check() -> None:
            writer.commit()
            assert opened.read(DIGEST) == BLOB

        yield check


@contextmanager
def blob_writer_without_o_tmpfile(folder: Path) -> Iterator[Check]:
    flag, os.O_TMPFILE = os.O_TMPFILE, os.O_DIRECTORY | os.O_CREAT  # which open(2) refuses
    try:
        with blob_writer(folder) as check:
            yield check
    finally:
        os.O_TMPFILE = flag


@contextmanager
def file_lock(folder: Path) -> Iterator[Check]:
    lock = FileLock(os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600))
    with lock.held():
        yield lambda: None
    lock.close()


@contextmanager
def pool(_: Path) -> Iterator[Check]:
    with WorkerPool(2) as opened:
        opened.submit(lambda: None).result()
        yield lambda: opened.submit(lambda: None).result()


@contextmanager
def loader(folder: Path) -> Iterator[Check]:
    with FileCache(folder / "cache") as opened, SnapshotLoader(opened) as made:
        save(made, folder)
        yield lambda: save(made, folder, b"more")


def save(made: SnapshotLoader, folder: Path, content: bytes = BLOB, **options: Any) -> Any:
    (folder / "disk").write_bytes(content)
    (folder / "plain").write_bytes(b"plain" + content)
    (folder / "tree").mkdir(exist_ok=True)
    (folder / "tree" / "file").write_bytes(b"tree" + content)
    made.cache_snapshot(
        key_set(made).write_key,
        files={"plain": folder / "plain"},
        chunked_files={"disk": folder / "disk"},
        directories={"tree": folder / "tree"},
        chunk_size=CHUNK,
        vm_configuration=VMConfiguration(cpu_count=2, memory_bytes=1 << 30),
        **options,
    )
    return made.get_snapshot(key_set(made))


def key_set(made: SnapshotLoader) -> Any:
    return made.snapshot_key_set(
        SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": "main"}), "c"
    )


@contextmanager
def unpacked(folder: Path) -> Iterator[Check]:
    with FileCache(folder / "cache", max_bytes=200_000) as opened, SnapshotLoader(opened) as made:
        snapshot = save(made, folder)
        with made.unpack_snapshot(snapshot, folder / "out") as files:
            disk = files.chunked_files["disk"]
            disk.write_at(0, b"unsaved")

            def check() -> None:
                opened.prune()
                assert disk.read_at(0, len(BLOB)) == b"unsaved" + BLOB[7:]
                made.cache_snapshot(
                    key_set(made).write_key, chunked_files={"disk": disk}, vm_configuration=VMConfiguration()
                )
                with made.unpack_snapshot(made.get_snapshot(key_set(made)), folder / "again") as saved:
                    assert saved.chunked_files["disk"].read_at(0, 7) == b"unsaved"

            yield check


@contextmanager
def inside_progress(
    folder: Path, work: Callable[[SnapshotLoader, Callable[..., None]], object]
) -> Iterator[Check]:
    """The fork is made by the callback, the first time that it is called."""
    forked: list[bool] = []

    def progress(*_: object) -> None:
        if not forked:
            forked.append(True)
            # Other threads write meanwhile: only the outcome is compared.
            pid = os.fork()
            if not pid:
                signal.alarm(120)
                sys.exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    with FileCache(folder / "cache") as opened, SnapshotLoader(opened, workers=1) as made:
        save(made, folder)
        work(made, progress)
        assert forked
        yield lambda: None


@contextmanager
def restoring(folder: Path) -> Iterator[Check]:
    def work(made: SnapshotLoader, progress: Callable[..., None]) -> None:
        made.restore_snapshot(made.get_snapshot(key_set(made)), folder / "out", progress=progress)
        assert (folder / "out" / "disk").read_bytes() == BLOB
        assert (folder / "out" / "tree" / "file").read_bytes() == b"tree" + BLOB

    with inside_progress(folder, work) as check:
        yield check


@contextmanager
def saving(folder: Path) -> Iterator[Check]:
    def work(made: SnapshotLoader, progress: Callable[..., None]) -> None:
        save(made, folder, b"new" + BLOB, progress=progress)

    with inside_progress(folder, work) as check:
        yield check


@contextmanager
def remote(folder: Path) -> Iterator[Check]:
    from snaploader import RemoteCache
    from snaploader.testing import EmbeddedServer

    with EmbeddedServer(folder / "server") as server, RemoteCache(server.url) as opened:
        opened.write(DIGEST, BLOB)

        def check() -> None:
            opened.write_many([])
            assert opened.read(DIGEST) == BLOB

        yield check


@contextmanager
def catalog(folder: Path) -> Iterator[Check]:
    from snaploader.workspace import Catalog, Policy

    with Catalog.open(folder / "catalog.sqlite") as opened:
        with opened.transaction() as tx:
            tx.put_policy(Policy.from_mapping("mine", {}))
            yield lambda: None
        with opened.reading() as reader:
            assert reader.policy("mine").name == "mine"


@contextmanager
def workspaces(folder: Path) -> Iterator[tuple[Any, Any]]:
    from snaploader.workspace import Catalog, ProcessRuntime, Volume, WorkspaceManager

    with (
        FileCache(folder / "cache") as file_cache,
        SnapshotLoader(file_cache) as made,
        Catalog.open(folder / "catalog.sqlite") as opened,
        ProcessRuntime(folder / "runtime") as runtime,
        WorkspaceManager(opened, made, file_cache, runtime, folder) as manager,
    ):
        manager.create("ws", volumes=[Volume("data", "/data")])
        yield manager, runtime


@contextmanager
def manager(folder: Path) -> Iterator[Check]:
    with workspaces(folder) as (opened, _):
        yield lambda: opened.create_snapshot("ws")


@contextmanager
def held_workspace(folder: Path) -> Iterator[Check]:
    with workspaces(folder) as (opened, _), opened.hold("ws") as held:
        yield lambda: held.pause()


@contextmanager
def attached_store(folder: Path) -> Iterator[Check]:
    (folder / "disk").write_bytes(BLOB)
    with workspaces(folder) as (opened, runtime):
        opened.stop("ws")
        runtime.attach("ws", "disk", folder / "disk")
        opened.pause("ws")
        opened.resume("ws")
        disk = runtime.attachments("ws")["disk"]
        disk.write_at(0, b"unsaved")

        def check() -> None:
            assert disk.read_at(0, len(BLOB)) == b"unsaved" + BLOB[7:]
            opened.pause("ws")

        yield check


@contextmanager
def changed_folder(folder: Path) -> Iterator[Check]:
    with workspaces(folder) as (_, runtime), runtime._changing("ws", "test"):
        yield lambda: None


@contextmanager
def lifecycle(folder: Path) -> Iterator[Check]:
    from snaploader.workspace import LifecycleExecutor

    with workspaces(folder) as (opened, _), LifecycleExecutor(opened) as made:
        yield lambda: made.run_once() and None


BLOCKS: dict[str, Callable[[Path], Any]] = {
    block.__name__: block
    for block in (
        store,
        checkpoint,
        cache,
        cache_while_a_thread_has_its_locks,
        cache_while_it_evicts_in_the_background,
        lease,
        blob_writer,
        blob_writer_without_o_tmpfile,
        file_lock,
        pool,
        loader,
        unpacked,
        restoring,
        saving,
        remote,
        catalog,
        manager,
        held_workspace,
        attached_store,
        changed_folder,
        lifecycle,
    )
}


def main(name: str, folder: Path) -> None:
    with ExitStack() as stack:
        check = stack.enter_context(BLOCKS[name](folder))
        fork_and_exit(folder)
        check()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
