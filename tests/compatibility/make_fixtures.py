"""Writes data of every kind that outlives a release, and goes on with what another release has written.

    python make_fixtures.py write FOLDER       makes FOLDER: caches, servers' folders, a host with workspaces
    python make_fixtures.py continue FOLDER    reads all of that, checks every byte, and works on with it
    python make_fixtures.py pack FOLDER FILE   as an archive, which is how the tests keep what a release wrote

Both halves use public names and the command line only, so that they run against any release: PYTHONPATH says
which. Content, snapshot ids and workspace ids are the same in every run; times, inodes and random names of
versions, sessions and pins are not. `data.tar.xz` is replaced only when a format gets a new version: it
stands for the data that users have.

    FOLDER/blake3, FOLDER/sha256    cache, server: snapshots of every kind, in either digest function
    FOLDER/host                     cache, server, state: a paused workspace, a committed one, and versions
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snaploader import (
    Digest,
    DigestFunction,
    FailedPrecondition,
    FileCache,
    NotFound,
    RemoteCache,
    Snapshot,
    SnapshotKey,
    SnapshotLoader,
    SnapshotTask,
    VMConfiguration,
    VMMetadata,
)
from snaploader.testing import EmbeddedServer
from snaploader.workspace import (
    Catalog,
    Policy,
    ProcessRuntime,
    Scope,
    ScopePolicy,
    Volume,
    WorkspaceManager,
    WorkspaceState,
)

CHUNK = 4096
HOLES = (2, 3, 6)
CONFIGURATION = VMConfiguration(cpu_count=2, memory_bytes=1 << 30)
MTIME_NS = 1_600_000_000 * 10**9
TICK_NS = 10**9 // 512
"""Times of files are multiples of it, which a float holds exactly: tarfile has times as floats."""
FUNCTIONS = {"blake3": DigestFunction.BLAKE3, "sha256": DigestFunction.SHA256}
HOST = "host-a"


def noise(seed: str, size: int) -> bytes:
    """Bytes without zeros, the same for a seed everywhere."""
    blocks = (hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(size // 32 + 1))
    return b"".join(blocks)[:size].replace(b"\0", b"\1")


def image(seed: str) -> bytes:
    """Eight chunks, some of them holes, and a short last one."""
    data = bytearray(noise(seed, 8 * CHUNK + 100))
    for hole in HOLES:
        data[hole * CHUNK : (hole + 1) * CHUNK] = bytes(CHUNK)
    return bytes(data)


def changed(data: bytes) -> bytes:
    """The image after the write of `write_on`."""
    return data[:CHUNK] + b"changed" + data[CHUNK + 7 :]


OLD, PLAIN = image("disk"), noise("plain", 3000)


def fill(root: Path, word: str) -> None:
    """A directory with all that one can hold: modes, links, an empty file, an empty folder, a big file."""
    (root / "data/deep/empty").mkdir(parents=True)
    (root / "data/file").write_text(f"data {word}")
    (root / "data/nothing").touch()
    (root / "data/script").write_text(f"#!/bin/sh\n# {word}\n")
    (root / "data/script").chmod(0o755)
    (root / "data/link").symlink_to("script")
    (root / "dangling").symlink_to("../no where")
    (root / "grüße").write_text(f"name {word}")
    (root / "secret").write_text(f"secret {word}")
    (root / "secret").chmod(0o600)
    with open(root / "big", "wb") as file:
        file.write(noise("big", CHUNK))
        file.truncate(5 << 20)
    for number, path in enumerate(sorted(root.rglob("*"), key=lambda path: (-len(path.parts), path))):
        os.utime(path, ns=(MTIME_NS, MTIME_NS + number * TICK_NS), follow_symlinks=False)
    os.utime(root, ns=(MTIME_NS, MTIME_NS))


def seen(root: Path) -> dict[str, tuple[object, ...]]:
    """What is kept of a directory, by relative path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status, name = path.lstat(), str(path.relative_to(root))
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", status.st_mtime_ns, os.readlink(path))
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ("directory", status.st_mtime_ns, stat.S_IMODE(status.st_mode))
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = ("file", status.st_mtime_ns, stat.S_IMODE(status.st_mode), status.st_size, digest)
    return found


def expect(is_so: object, what: str) -> None:
    """Fail unless it is so; an assertion may be switched off."""
    if not is_so:
        raise AssertionError(what)


@contextmanager
def opened(
    folder: Path, function: DigestFunction, cache: str = "cache"
) -> Iterator[tuple[SnapshotLoader, FileCache]]:
    """A loader on a cache and a server that keep what they hold in `folder`."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(folder / "server"))
        file_cache = stack.enter_context(FileCache(folder / cache))
        remote = stack.enter_context(RemoteCache(server.url, digest_function=function))
        loader = stack.enter_context(SnapshotLoader(file_cache, remote, digest_function=function))
        yield loader, file_cache


def task(branch: str) -> SnapshotTask:
    """A task of a branch."""
    return SnapshotTask.from_mapping({"OSFamily": "linux"}, {"GIT_BRANCH": branch})


def write_snapshots(folder: Path, work: Path, function: DigestFunction) -> None:
    """A cache and a server with snapshots of every kind."""
    metadata = VMMetadata()
    metadata.last_executed_task.completed_timestamp.FromSeconds(1_700_000_000)
    with opened(folder, function) as (loader, cache):
        key = loader.snapshot_key_set(task("main"), "configuration").write_key
        (work / "disk").write_bytes(OLD)
        (work / "plain").write_bytes(PLAIN)
        loader.invalidate_snapshot(key)
        main, topic, gone = (
            loader.snapshot_key_set(task(branch), "configuration").write_key
            for branch in ("main", "topic", "gone")
        )
        common = {"vm_configuration": CONFIGURATION, "vm_metadata": metadata, "chunk_size": CHUNK}
        everything = {
            "files": {"plain": work / "plain"},
            "chunked_files": {"disk": work / "disk"},
            "directories": {"tree": work / "tree"},
        }
        loader.cache_snapshot(main, snapshot_id="everything", pin="kept", **everything, **common)
        loader.cache_snapshot(
            gone, snapshot_id="here-only", files={"plain": work / "plain"}, remote=False, **common
        )
        first = loader.get_snapshot_by_id("everything")
        write_on(loader, first, topic, "on-top", work)
        loader.derive_snapshot(first, snapshot_id="derived", names=["plain", "tree"], pin="derived")
        loader.derive_snapshot(first, snapshot_id="deleted")
        loader.delete_snapshot("deleted")
        cache.write(Digest.of(b"loose", function), b"loose")


def write_on(loader: SnapshotLoader, main: Snapshot, key: SnapshotKey, snapshot_id: str, work: Path) -> None:
    """Unpack a snapshot, write to its disk, and save that as another."""
    with loader.unpack_snapshot(main, work / f"unpacked-{snapshot_id}") as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(CHUNK, b"changed")
        loader.cache_snapshot(
            key, snapshot_id=snapshot_id, chunked_files={"disk": disk}, vm_configuration=CONFIGURATION
        )


def continue_snapshots(folder: Path, work: Path, function: DigestFunction) -> None:
    """Everything reads as it was written, from the cache and, on another host, from the server; then save."""
    with opened(folder, function) as (loader, cache):
        command_line("--cache-dir", cache.root, "cache", "verify")
        expect(set(cache.pins()) == {"kept", "derived"}, f"the pins are {cache.pins()}")
        expect(cache.read(Digest.of(b"loose", function)) == b"loose", "a blob is another")
        cache.prune(1 << 40)
        expect(not list(Path(cache.root).glob("v1/groups/*/trees/*/*")), "a tracked directory is not swept")
        plain_only = loader.get_snapshot_by_id("here-only", read_policy="local-only")
        loader.restore_snapshot(plain_only, work / "here-only")
        expect((work / "here-only/plain").read_bytes() == PLAIN, "a local snapshot is another")
        check_snapshots(loader, work / "local", "local-only", work)
    with opened(folder, function, "other-cache") as (other, _):
        check_snapshots(other, work / "remote", "newest", work)
    with opened(folder, function) as (loader, cache):
        found = loader.get_snapshot(loader.snapshot_key_set(task("topic"), "configuration"))
        expect(disk_of(found, loader, work / "topic") == changed(OLD), "the topic's snapshot is another")
        key = loader.snapshot_key_set(task("after"), "configuration").write_key
        write_on(loader, loader.get_snapshot_by_id("everything"), key, "after", work)
        for taken in ("everything", "deleted"):
            try:
                write_on(loader, loader.get_snapshot_by_id("everything"), key, taken, work)
            except FailedPrecondition:
                continue
            raise AssertionError(f"the id {taken!r} was used again")
        loader.invalidate_snapshot(key)
        try:
            loader.get_snapshot(loader.snapshot_key_set(task("main"), "configuration"))
        except NotFound:
            pass
        else:
            raise AssertionError("an invalidated snapshot was found")
        loader.delete_snapshot("derived")
        expect(cache.unpin("derived"), "its pin is gone")
        command_line("--cache-dir", cache.root, "cache", "verify")
    with opened(folder, function, "third-cache") as (third, _):
        expect(disk_of(third.get_snapshot_by_id("after"), third, work / "third") == changed(OLD), "after")


def disk_of(snapshot: Snapshot, loader: SnapshotLoader, folder: Path) -> bytes:
    """The whole disk of a snapshot, read lazily."""
    with loader.unpack_snapshot(snapshot, folder) as unpacked:
        disk = unpacked.chunked_files["disk"]
        return bytes(disk.read_at(0, disk.size))


def check_snapshots(loader: SnapshotLoader, out: Path, policy: str, work: Path) -> None:
    """What both tiers have: everything, one on top of it, one derived; and none that was deleted."""
    out.mkdir()
    main = loader.get_snapshot(loader.snapshot_key_set(task("main"), "configuration"), policy)
    loader.restore_snapshot(main, out / "main")
    expect((out / "main/disk").read_bytes() == OLD, "the disk is another")
    expect((out / "main/plain").read_bytes() == PLAIN, "the plain file is another")
    expect(seen(out / "main/tree") == seen(work / "tree"), "the directory is another")
    topic = loader.get_snapshot_by_id("on-top", read_policy=policy)
    expect(disk_of(topic, loader, out / "topic") == changed(OLD), "the disk on top is another")
    derived = loader.get_snapshot_by_id("derived", read_policy=policy)
    loader.restore_directory(derived, "tree", out / "derived")
    expect(seen(out / "derived") == seen(work / "tree"), "the derived directory is another")
    try:
        loader.get_snapshot_by_id("deleted", read_policy=policy)
    except NotFound:
        return
    raise AssertionError("a deleted snapshot was found")


@contextmanager
def managed(folder: Path) -> Iterator[tuple[WorkspaceManager, ProcessRuntime]]:
    """The host's workspaces; recovered, without a problem."""
    function = DigestFunction.BLAKE3
    with opened(folder, function) as (loader, cache), ExitStack() as stack:
        catalog = stack.enter_context(Catalog.open(folder / "state/catalog.sqlite"))
        runtime = stack.enter_context(ProcessRuntime(folder / "state/runtime"))
        manager = stack.enter_context(
            WorkspaceManager(catalog, loader, cache, runtime, folder / "state", host=HOST)
        )
        summary = manager.recover()
        expect(not summary.problems, f"recovery had problems: {summary.problems}")
        yield manager, runtime


def write_workspaces(folder: Path) -> None:
    """A host with a workspace of two versions, a paused one, a committed one, a fork and a deleted one."""
    volume = Volume("data", "/data")
    (folder / "state").mkdir()
    with managed(folder) as (manager, runtime):
        with manager.catalog.transaction() as transaction:
            transaction.put_policy(Policy("data-only", ScopePolicy(Scope.DATA)))
        for name, policy in (
            ("versions", "default"),
            ("paused", "default"),
            ("paused-data", "data-only"),
            ("committed", "default"),
            ("deleted", "default"),
        ):
            manager.create(name, volumes=[volume], policy=policy, start=False)
            (runtime.root(name) / "data").rmdir()
            fill(runtime.root(name), name)
        manager.create_snapshot("versions", "first")
        (runtime.root("versions") / "data/file").write_text("second")
        manager.create_version("versions")
        (runtime.root("versions") / "data/file").write_text("third")
        manager.create_version("paused")
        manager.pause("paused")
        manager.pause("paused-data")
        manager.commit("committed", "golden")
        manager.fork("committed", "fork", start=False)
        manager.create_version("deleted")
        manager.delete("deleted")


def continue_workspaces(folder: Path, work: Path) -> None:
    """List, resume, roll back, fork, save on top, commit, pause and delete what is there."""
    doctor(folder)
    with managed(folder) as (manager, runtime):
        states = {each.id: each.state for each in manager.workspaces(include_deleted=True)}
        paused, stopped, deleted = WorkspaceState.PAUSED, WorkspaceState.STOPPED, WorkspaceState.DELETED
        expect(
            states
            == {
                "versions": stopped,
                "paused": paused,
                "paused-data": paused,
                "committed": stopped,
                "fork": stopped,
                "deleted": deleted,
            },
            f"the workspaces are {states}",
        )
        numbers = [(each.number, each.display_name) for each in manager.list_versions("versions")]
        expect(numbers == [(1, "first"), (2, "Version 2")], f"the versions are {numbers}")
        expect(manager.events("deleted", limit=None), "the events are gone")
        for name in ("committed", "fork"):
            expect(contents(runtime, name) == contents_written("committed", work), f"{name} is another")
        manager.resume("paused")
        expect(contents(runtime, "paused") == contents_written("paused", work), "paused is another")
        manager.resume("paused-data")
        root = runtime.root("paused-data")
        expect((root / "data/file").read_text() == "data paused-data", "a Data pause brought other content")
        expect(not (root / "secret").exists(), "a Data pause holds more than data")
        expect((runtime.root("versions") / "data/file").read_text() == "third", "versions is another")
        manager.rollback("versions", 1, keep_current=True)
        expect(contents(runtime, "versions") == contents_written("versions", work), "version 1 is another")
        manager.rollback("versions", 3)
        expect((runtime.root("versions") / "data/file").read_text() == "third", "what was kept is another")
        expect(manager.create_version("versions").version == 4, "a number was skipped or used again")
        manager.fork("committed", "fork-2", start=False)
        expect(contents(runtime, "fork-2") == contents_written("committed", work), "fork-2 is another")
        (runtime.root("fork-2") / "data/file").write_text("changed")
        manager.commit("fork-2")
        manager.fork("fork-2", "fork-3", start=False)
        expect((runtime.root("fork-3") / "data/file").read_text() == "changed", "fork-3 is another")
        manager.pause("paused")
        manager.resume("paused")
        for each in manager.workspaces():
            if each.id != "versions":
                runtime.stop(each.id)
                manager.delete(each.id)
    doctor(folder)


def contents(runtime: ProcessRuntime, workspace_id: str) -> dict[str, tuple[object, ...]]:
    """What a workspace holds, but for folders' times, which a placement may set."""
    return without_folder_times(seen(runtime.root(workspace_id)))


def contents_written(word: str, work: Path) -> dict[str, tuple[object, ...]]:
    """The same of what was once written to it."""
    folder = work / f"written-{word}"
    if not folder.exists():
        folder.mkdir()
        fill(folder, word)
    return without_folder_times(seen(folder))


def without_folder_times(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """What was seen, with no times of directories."""
    return {
        name: (entry[0], *entry[2:]) if entry[0] == "directory" else entry for name, entry in found.items()
    }


def doctor(folder: Path) -> None:
    """Nothing is wrong with the host, says the command line."""
    state = folder / "state"
    where = ("--catalog", f"sqlite:///{state}/catalog.sqlite", "--state-dir", str(state), "--host-name", HOST)
    command_line("--cache-dir", str(folder / "cache"), "doctor", *where)


def command_line(*arguments: str) -> None:
    """Run the command line of the release that is imported here."""
    command = [sys.executable, "-c", "from snaploader.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    expect(done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}")


def prepare(work: Path) -> None:
    """What snapshots are made of, and what they are compared with."""
    (work / "tree").mkdir(parents=True)
    fill(work / "tree", "tree")


def write(folder: Path, work: Path) -> None:
    """Make all of it."""
    for name, function in FUNCTIONS.items():
        (folder / name).mkdir(parents=True)
        prepare(work / name)
        write_snapshots(folder / name, work / name, function)
    (folder / "host").mkdir()
    write_workspaces(folder / "host")


def continue_(folder: Path, work: Path) -> None:
    """Read all of it, and go on with it."""
    for name, function in FUNCTIONS.items():
        prepare(work / name)
        continue_snapshots(folder / name, work / name, function)
    continue_workspaces(folder / "host", work)


def pack(folder: Path, archive: Path) -> None:
    """Keep a folder as an archive, with modes, times and hard links, but without its owner."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name, filter=anonymous)


def unpack(archive: Path, folder: Path) -> None:
    """The opposite of `pack`. Modes are kept: those of blobs say that they must not change."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "fully_trusted_filter"):
            tar.extraction_filter = staticmethod(tarfile.fully_trusted_filter)
        tar.extractall(folder)
        # These have no time otherwise; their folders keep theirs.
        for entry in tar.getmembers():
            if entry.issym():
                os.utime(folder / entry.name, (entry.mtime, entry.mtime), follow_symlinks=False)


def main() -> None:
    """Do what the command line says."""
    action, folder, *rest = sys.argv[1:]
    if action == "pack":
        pack(Path(folder), Path(*rest))
        return
    with tempfile.TemporaryDirectory() as work:
        {"write": write, "continue": continue_}[action](Path(folder), Path(work))


if __name__ == "__main__":
    main()
