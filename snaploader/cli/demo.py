"""`snaploader demo`: save on one host, load lazily on another, save the changes, and check every claim."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cow import COWStore
from snaploader._proto.snaploader_pb2 import VMConfiguration
from snaploader.cli import demo_image
from snaploader.cli.options import command, option
from snaploader.cli.output import CheckFailed, Output
from snaploader.cli.process import load_grpc
from snaploader.cli.resources import Caches
from snaploader.cli.values import format_size, format_time, size_type
from snaploader.errors import NotFound, translate_os_errors
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKeySet, SnapshotTask
from snaploader.loader import SaveResult, SnapshotLoader

if TYPE_CHECKING:
    from snaploader.remote import RemoteCache

DISK = "disk.img"
"""The name of the image in every snapshot."""

CONFIGURATION = "demo"

EDIT = b"# Edited on host B, in place, through the copy-on-write store.\n"


@command("demo")
@option("--size", type=size_type(64 << 20), default="256MiB", help="Size of the image.")
@option(
    "--data",
    "data_bytes",
    type=size_type(16 << 20),
    default="64MiB",
    help="About how many bytes of files go into it.",
)
@option("--work-dir", type=click.Path(path_type=Path), help="Folder to work in.  [default: temporary]")
def demo(caches: Caches, size: int, data_bytes: int, work_dir: Path | None) -> None:
    """Save a real disk image on one host, load it lazily on another, and prove every byte right.

    Makes an ext4 image from files of this machine, starts a server, and plays four hosts with a cache each.
    Needs e2fsprogs. Uses neither the local nor the remote cache that is configured.
    """
    output = caches.output
    begin = time.monotonic()
    if work_dir is not None:
        with translate_os_errors(f"cannot use the folder {str(work_dir)!r}"):
            work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="snaploader-demo-", dir=work_dir) as folder:
        story = Story(Path(folder), output)
        story.play(size, data_bytes)
    seconds = time.monotonic() - begin
    failed = [proof.claim for proof in story.proofs if not proof.holds]
    output.data(
        {
            "steps": [dataclasses.asdict(row) for row in story.steps],
            "proofs": [dataclasses.asdict(proof) for proof in story.proofs],
            "passed": not failed,
            "seconds": round(seconds, 6),
        }
    )
    output.table(
        {
            "step": "step",
            "host": "host",
            "touched>": "touched_bytes",
            "fetched>": "fetched_bytes",
            "uploaded>": "uploaded_bytes",
            "time>": lambda step: format_time(step.seconds),
        },
        story.steps,
    )
    output.text()
    output.table(
        {"": lambda proof: "ok" if proof.holds else "FAILED", "proof": "claim", "evidence": "evidence"},
        story.proofs,
    )
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(story.proofs)} proofs failed: {'; '.join(failed)}")
    output.text()
    output.text(f"all {len(story.proofs)} proofs hold; {format_time(seconds)} in all")


@dataclass(slots=True)
class Step:
    """One step, in figures; None where a figure makes no sense."""

    step: str
    host: str
    touched_bytes: int | None = None
    """Read, written or hashed here."""
    fetched_bytes: int | None = None
    """Content that came from the server: chunks, trees and all."""
    uploaded_bytes: int | None = None
    """Content that went to the server."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Proof:
    claim: str
    holds: bool
    evidence: str


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

    def save(self, branch: str, disk: COWStore | Path, step: Step) -> SaveResult:
        key_set = self.key_set(branch)
        assert key_set.write_key is not None
        result = self.loader.cache_snapshot(
            key_set.write_key,
            chunked_files={DISK: disk},
            vm_configuration=VMConfiguration(cpu_count=2),
            key_set=key_set,
            default_ref="main",
        )
        step.touched_bytes, step.uploaded_bytes = result.hashed_bytes, result.uploaded_bytes
        return result


@dataclass
class Story:
    """What happens in a folder, which must be empty, and what came of it."""

    folder: Path
    output: Output
    steps: list[Step] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)

    image: Path = field(init=False)
    name: str = field(init=False)
    """The file in the image that the story is about."""
    content: bytes = field(init=False)

    def play(self, size: int, data_bytes: int) -> None:
        """Play it with an image of `size` bytes, in which files of about `data_bytes` are."""
        load_grpc()
        from snaploader.testing import EmbeddedServer

        demo_image.require_tools()
        self.image = self.folder / "original.img"
        with self.step(
            "build the image", f"making an ext4 image of {format_size(size)} from files of this machine"
        ) as step:
            self.name, original = demo_image.build_image(self.image, size, data_bytes, self.folder)
            step.touched_bytes = self.image.stat().st_blocks * 512
        self.content = original.read_bytes()
        with EmbeddedServer(self.folder / "server") as server:
            with self.host("A", server.url) as host:
                stored_bytes = self.save_main(host)
            with self.host("B", server.url) as host:
                edited_at = self.work_on_feature(host, stored_bytes)
            with self.host("C", server.url) as host:
                self.load_main(host)
            with self.host("D", server.url) as host:
                self.load_feature(host, edited_at)

    @contextlib.contextmanager
    def host(self, name: str, url: str) -> Iterator[Host]:
        """A host with an empty cache, which is gone after the block."""
        from snaploader.remote import RemoteCache

        folder = self.folder / f"cache-{name}"
        with (
            FileCache(folder) as file_cache,
            RemoteCache(url) as remote,
            SnapshotLoader(file_cache, remote) as loader,
        ):
            yield Host(name, loader, remote)
        shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def step(self, name: str, what: str, host: Host | None = None) -> Iterator[Step]:
        """Say what the block does, time it and write it down."""
        self.output.talk(what)
        step = Step(name, "-" if host is None else host.name)
        before = 0 if host is None else host.fetched_bytes()
        begin = time.monotonic()
        yield step
        step.seconds = time.monotonic() - begin
        if host is not None:
            step.fetched_bytes = host.fetched_bytes() - before
        self.steps.append(step)

    def prove(self, claim: str, holds: bool, evidence: str) -> None:
        self.proofs.append(Proof(claim, holds, evidence))

    def save_main(self, host: Host) -> int:
        """Host A. Returns how much of the image is data, and not holes."""
        with self.step("save main", "host A saves the image for branch main", host) as step:
            result = host.save("main", self.image, step)
        self.prove(
            "host A saved main, locally and remotely",
            result.key.ref == "main" and result.saved_locally and result.saved_remotely,
            f"snapshot {result.snapshot_id} under ref {result.key.ref!r}",
        )
        return sum(file.size_bytes for file in result.files) - result.hole_bytes

    def work_on_feature(self, host: Host, stored_bytes: int) -> int:
        """Host B: load, read, write, save. Returns where in the image it wrote."""
        what = "host B, with an empty cache, loads lazily for branch feature"
        with self.step("load feature, lazily", what, host) as step:
            snapshot = host.loader.get_snapshot(host.key_set("feature"))
            unpacked = host.loader.unpack_snapshot(snapshot, self.folder / "B")
            step.touched_bytes = 0
        missed = [failure.key.ref for failure in snapshot.failures if isinstance(failure.error, NotFound)]
        self.prove(
            "branch feature has no snapshot yet and falls back to main",
            snapshot.key.ref == "main" and missed == ["feature"],
            f"served by ref {snapshot.key.ref!r} from the {snapshot.source} cache, after {missed}",
        )
        with unpacked:
            store = unpacked.chunked_files[DISK]
            offset = self.read_lazily(host, store)
            fetched = host.fetched_bytes()
            self.prove(
                "host B fetched less than a quarter of the image's data for that",
                0 < fetched < stored_bytes / 4,
                f"{format_size(fetched)} of {format_size(stored_bytes)}",
            )
            what = "host B overwrites the beginning of that file, in place, through the store"
            with self.step("write into the file", what, host) as step:
                step.touched_bytes = store.write_at(offset, EDIT)
            dirty = len(store.dirty_chunks)
            self.prove("the write made one chunk dirty", dirty == 1, f"{dirty} of {store.chunk_count} chunks")
            what = "host B saves the changed image for branch feature"
            with self.step("save feature", what, host) as step:
                result = host.save("feature", store, step)
        saved = result.files[0]
        self.prove(
            "saving feature hashed and uploaded one chunk, and the tree that names it",
            saved.hashed_chunks == 1 and result.uploaded_blobs == 2,
            f"{saved.hashed_chunks} of {saved.chunks} chunks hashed, {result.uploaded_blobs} blobs uploaded",
        )
        return offset

    def read_lazily(self, host: Host, store: COWStore) -> int:
        """Read the file with debugfs. Returns where in the image it begins."""
        what = f"host B reads {self.name} with debugfs, which gets the blocks it asks for through the store"
        with self.step("debugfs reads a file", what, host) as step:
            window = demo_image.Window(store, self.folder / "window.img")
            content = window.read_file(self.name)
            step.touched_bytes = window.loaded_bytes
        self.prove(
            "the file that debugfs read on host B is the one of this machine",
            content == self.content,
            f"{format_size(len(content))}, SHA-256 {_short(hashlib.sha256(content).hexdigest())}",
        )
        return window.offset(self.name)

    def load_main(self, host: Host) -> None:
        with self.step("restore main", "host C, with an empty cache, restores main in full", host) as step:
            snapshot = host.loader.get_snapshot(host.key_set("main"))
            step.touched_bytes = host.loader.restore_snapshot(snapshot, self.folder / "C").written_bytes
        ref = snapshot.key.ref
        self.prove("main is served by its own ref", ref == "main", f"ref {ref!r}")
        self.check_image("main", self.folder / "C" / DISK, self.image, self.content)

    def load_feature(self, host: Host, edited_at: int) -> None:
        exported = self.folder / "exported.img"
        what = "host D, with an empty cache, loads feature lazily and exports it"
        with self.step("export feature", what, host) as step:
            snapshot = host.loader.get_snapshot(host.key_set("feature"))
            with host.loader.unpack_snapshot(snapshot, self.folder / "D") as unpacked:
                store = unpacked.chunked_files[DISK]
                store.export(exported)
                step.touched_bytes = store.size - store.statistics().hole_bytes
        ref = snapshot.key.ref
        self.prove("feature is served by its own ref now", ref == "feature", f"ref {ref!r}")
        # What the image must be, made without this library: the original, and the edit.
        expected = self.folder / "expected.img"
        os.replace(self.image, expected)
        with expected.open("r+b") as file:
            os.pwrite(file.fileno(), EDIT, edited_at)
        self.check_image("feature", exported, expected, EDIT + self.content[len(EDIT) :])

    def check_image(self, ref: str, loaded: Path, expected: Path, content: bytes) -> None:
        """Compare an image, the file in it and the holes with what they should be, and remove it."""
        self.output.talk(f"checking {ref}: checksums, e2fsck, the file in it")
        got, wanted = _sha256(loaded), _sha256(expected)
        self.prove(
            f"the image of {ref} is right to the last byte",
            got == wanted,
            f"SHA-256 {_short(got)}, expected {_short(wanted)}",
        )
        clean, said = demo_image.is_clean(loaded)
        self.prove(f"e2fsck -fn finds the image of {ref} clean", clean, said.removeprefix(f"{loaded}: "))
        read = demo_image.read_file(loaded, self.name)
        self.prove(
            f"debugfs reads the file of {ref} as it should be",
            read == content,
            f"SHA-256 {_short(hashlib.sha256(read).hexdigest())}",
        )
        used, needed = loaded.stat().st_blocks * 512, expected.stat().st_blocks * 512
        self.prove(
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
