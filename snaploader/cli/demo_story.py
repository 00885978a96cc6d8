"""The story that the demo tells: save on one host, load lazily on another, save the changes, check it all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cow import COWStore
from snaploader._proto.snaploader_pb2 import VMConfiguration
from snaploader.cli import demo_image
from snaploader.cli.demo import Ledger
from snaploader.cli.values import format_size
from snaploader.errors import NotFound
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKeySet
from snaploader.loader import SaveResult, SnapshotLoader
from snaploader.remote import RemoteCache
from snaploader.task import SnapshotTask
from snaploader.testing import EmbeddedServer

DISK = "disk.img"
"""The name of the image in every snapshot."""

CONFIGURATION = "demo"

EDIT = b"# Edited on host B, in place, through the copy-on-write store.\n"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Host:
    """A loader over an empty cache of its own, and the remote cache that all hosts share."""

    name: str
    loader: SnapshotLoader
    remote: RemoteCache

    def fetched_bytes(self) -> int:
        """Content that came from the server so far."""
        return self.remote.statistics().content_bytes_read

    def key_set(self, branch: str) -> SnapshotKeySet:
        """The keys of a task on `branch`, in a repository whose default branch is main."""
        task = SnapshotTask(environment={"GIT_BRANCH": branch, "GIT_REPO_DEFAULT_BRANCH": "main"})
        return self.loader.snapshot_key_set(task, CONFIGURATION)

    def save(self, branch: str, disk: COWStore | str | os.PathLike[str]) -> SaveResult:
        """Save an image as the snapshot of `branch`."""
        key_set = self.key_set(branch)
        assert key_set.write_key is not None
        return self.loader.cache_snapshot(
            key_set.write_key,
            chunked_files={DISK: disk},
            vm_configuration=VMConfiguration(cpu_count=2),
            key_set=key_set,
            default_ref="main",
        )


@contextlib.contextmanager
def open_host(name: str, folder: Path, url: str) -> Iterator[Host]:
    """A host with an empty cache in `folder`, which is gone after the block."""
    with (
        FileCache(folder) as file_cache,
        RemoteCache(url) as remote,
        SnapshotLoader(file_cache, remote) as loader,
    ):
        yield Host(name, loader, remote)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Subject:
    """The image, and the file in it that the story is about."""

    image: Path
    name: str
    content: bytes


def play(folder: Path, size: int, data_bytes: int, ledger: Ledger, tell: Tell) -> None:
    """Play the story in `folder`, which must be empty, and write down what came of it.

    Args:
        size: Of the image, in bytes.
        data_bytes: Of the files that go into it, about.
        tell: Gets a line for every step as it begins.
    """
    demo_image.require_tools()
    subject = _build(folder, size, data_bytes, ledger, tell)
    with EmbeddedServer(folder / "server") as server:

        def host(name: str) -> contextlib.AbstractContextManager[Host]:
            return open_host(name, folder / f"cache-{name}", server.url)

        with host("A") as host_a:
            stored_bytes = _save_main(host_a, subject, ledger, tell)
        with host("B") as host_b:
            edited_at = _work_on_feature(host_b, subject, stored_bytes, folder, ledger, tell)
        with host("C") as host_c:
            _load_main(host_c, subject, folder, ledger, tell)
        with host("D") as host_d:
            _load_feature(host_d, subject, edited_at, folder, ledger, tell)


def _build(folder: Path, size: int, data_bytes: int, ledger: Ledger, tell: Tell) -> Subject:
    tell(f"making an ext4 image of {format_size(size)} from files of this machine")
    image = folder / "original.img"
    with ledger.step("build the image") as step:
        name, original = demo_image.build_image(image, size, data_bytes, folder)
        step.touched_bytes = image.stat().st_blocks * 512
    return Subject(image, name, original.read_bytes())


def _save_main(host: Host, subject: Subject, ledger: Ledger, tell: Tell) -> int:
    """Host A. Returns how much of the image is data, and not holes."""
    tell("host A saves the image for branch main")
    with ledger.step("save main", host.name, host.fetched_bytes) as step:
        result = host.save("main", subject.image)
        step.touched_bytes, step.uploaded_bytes = result.hashed_bytes, result.uploaded_bytes
    ledger.prove(
        "host A saved main, locally and remotely",
        result.key.ref == "main" and result.saved_locally and result.saved_remotely,
        f"snapshot {result.snapshot_id} under ref {result.key.ref!r}",
    )
    return sum(file.size_bytes for file in result.files) - result.hole_bytes


def _work_on_feature(
    host: Host, subject: Subject, stored_bytes: int, folder: Path, ledger: Ledger, tell: Tell
) -> int:
    """Host B: load, read, write, save. Returns where in the image it wrote."""
    tell("host B, with an empty cache, loads lazily for branch feature")
    with ledger.step("load feature, lazily", host.name, host.fetched_bytes) as step:
        snapshot = host.loader.get_snapshot(host.key_set("feature"))
        unpacked = host.loader.unpack_snapshot(snapshot, folder / "B")
        step.touched_bytes = 0
    missed = [failure.key.ref for failure in snapshot.failures if isinstance(failure.error, NotFound)]
    ledger.prove(
        "branch feature has no snapshot yet and falls back to main",
        snapshot.key.ref == "main" and missed == ["feature"],
        f"served by ref {snapshot.key.ref!r} from the {snapshot.source} cache, after {missed}",
    )
    with unpacked:
        store = unpacked.chunked_files[DISK]
        offset = _read_lazily(host, store, subject, folder, ledger, tell)
        fetched = host.fetched_bytes()
        ledger.prove(
            "host B fetched less than a quarter of the image's data for that",
            0 < fetched < stored_bytes / 4,
            f"{format_size(fetched)} of {format_size(stored_bytes)}",
        )
        _write(host, store, offset, ledger, tell)
        _save_feature(host, store, ledger, tell)
    return offset


def _read_lazily(
    host: Host, store: COWStore, subject: Subject, folder: Path, ledger: Ledger, tell: Tell
) -> int:
    """Read the file with debugfs. Returns where in the image it begins."""
    tell(f"host B reads {subject.name} with debugfs, which gets the blocks it asks for through the store")
    with ledger.step("debugfs reads a file", host.name, host.fetched_bytes) as step:
        window = demo_image.Window(store, folder / "window.img")
        content = window.read_file(subject.name)
        step.touched_bytes = window.loaded_bytes
    ledger.prove(
        "the file that debugfs read on host B is the one of this machine",
        content == subject.content,
        f"{format_size(len(content))}, SHA-256 {_short(hashlib.sha256(content).hexdigest())}",
    )
    return window.first_block(subject.name) * window.block_size


def _write(host: Host, store: COWStore, offset: int, ledger: Ledger, tell: Tell) -> None:
    tell("host B overwrites the beginning of that file, in place, through the store")
    with ledger.step("write into the file", host.name, host.fetched_bytes) as step:
        step.touched_bytes = store.write_at(offset, EDIT)
    dirty = len(store.dirty_chunks)
    ledger.prove("the write made one chunk dirty", dirty == 1, f"{dirty} of {store.chunk_count} chunks")


def _save_feature(host: Host, store: COWStore, ledger: Ledger, tell: Tell) -> None:
    tell("host B saves the changed image for branch feature")
    with ledger.step("save feature", host.name, host.fetched_bytes) as step:
        result = host.save("feature", store)
        step.touched_bytes, step.uploaded_bytes = result.hashed_bytes, result.uploaded_bytes
    saved = result.files[0]
    ledger.prove(
        "saving feature hashed and uploaded one chunk, and the tree that names it",
        saved.hashed_chunks == 1 and result.uploaded_blobs == 2,
        f"{saved.hashed_chunks} of {saved.chunks} chunks hashed, {result.uploaded_blobs} blobs uploaded",
    )


def _load_main(host: Host, subject: Subject, folder: Path, ledger: Ledger, tell: Tell) -> None:
    tell("host C, with an empty cache, restores main in full")
    with ledger.step("restore main", host.name, host.fetched_bytes) as step:
        snapshot = host.loader.get_snapshot(host.key_set("main"))
        result = host.loader.restore_snapshot(snapshot, folder / "C")
        step.touched_bytes = result.written_bytes
    ledger.prove("main is served by its own ref", snapshot.key.ref == "main", f"ref {snapshot.key.ref!r}")
    _check_image("main", folder / "C" / DISK, subject.image, subject.name, subject.content, ledger, tell)


def _load_feature(
    host: Host, subject: Subject, edited_at: int, folder: Path, ledger: Ledger, tell: Tell
) -> None:
    tell("host D, with an empty cache, loads feature lazily and exports it")
    exported = folder / "exported.img"
    with ledger.step("export feature", host.name, host.fetched_bytes) as step:
        snapshot = host.loader.get_snapshot(host.key_set("feature"))
        with host.loader.unpack_snapshot(snapshot, folder / "D") as unpacked:
            store = unpacked.chunked_files[DISK]
            store.export(exported)
            step.touched_bytes = store.size - store.statistics().hole_bytes
    ref = snapshot.key.ref
    ledger.prove("feature is served by its own ref now", ref == "feature", f"ref {ref!r}")
    # What the image must be, made without this library: the original, and the edit.
    expected = folder / "expected.img"
    os.replace(subject.image, expected)
    with expected.open("r+b") as file:
        os.pwrite(file.fileno(), EDIT, edited_at)
    content = EDIT + subject.content[len(EDIT) :]
    _check_image("feature", exported, expected, subject.name, content, ledger, tell)


def _check_image(
    ref: str, loaded: Path, expected: Path, name: str, content: bytes, ledger: Ledger, tell: Tell
) -> None:
    tell(f"checking {ref}: checksums, e2fsck, the file in it")
    got, wanted = _sha256(loaded), _sha256(expected)
    ledger.prove(
        f"the image of {ref} is right to the last byte",
        got == wanted,
        f"SHA-256 {_short(got)}, expected {_short(wanted)}",
    )
    clean, said = demo_image.is_clean(loaded)
    ledger.prove(f"e2fsck -fn finds the image of {ref} clean", clean, said.removeprefix(f"{loaded}: "))
    read = demo_image.read_file(loaded, name)
    ledger.prove(
        f"debugfs reads the file of {ref} as it should be",
        read == content,
        f"SHA-256 {_short(hashlib.sha256(read).hexdigest())}",
    )
    used, needed = loaded.stat().st_blocks * 512, expected.stat().st_blocks * 512
    ledger.prove(
        f"the holes of {ref} are holes again",
        used <= needed * 1.1,
        f"{format_size(used)} on disk, {format_size(needed)} in the original",
    )
    loaded.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(hash_: str) -> str:
    return hash_[:16] + "…"
