"""Manifests that a hostile server makes up: every one is loaded or refused, in bounded memory."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snaploader import (
    FileCache,
    RemoteCache,
    SnapshotKey,
    SnapshotLoader,
    VMConfiguration,
    VMMetadata,
    keys as key_names,
)
from snaploader._proto import any_pb2, remote_execution_pb2 as reapi
from snaploader._proto.snaploader_pb2 import DirectoryNames
from snaploader.cli.lookup import snapshot_record, vm_configuration_record
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import DataLoss, SnaploaderError
from snaploader.formats.chunktable import ChunkTable, encode_tree
from snaploader.formats.digests import BYTES, VARINT, tag, varint
from snaploader.formats.manifest import MAX_TREES_BYTES, pack_any
from snaploader.keys import SnapshotKeySet
from snaploader.testing import EmbeddedServer, FakeCAS, ServerOptions

SHA256 = DigestFunction.SHA256
KEY = SnapshotKey(ref="main")
KEY_SET = SnapshotKeySet(KEY, (), KEY)
MANY = 1 << 19
CONTENT = b"the content of every file"
DIGEST = Digest.of(CONTENT, SHA256)


class HostileHost:
    """A host, and a server that holds what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remote = FakeCAS()
        self.cache = FileCache(folder / "cache")
        self.put(CONTENT)

    def put(self, data: bytes) -> reapi.Digest:
        digest = Digest.of(data, SHA256)
        self.remote.blobs[digest] = data
        return reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes)

    def publish(self, result: reapi.ActionResult) -> None:
        self.remote.action_results[key_names.remote_manifest_digest(KEY, SHA256)] = result.SerializeToString()

    def use(self) -> bool:
        """Find, describe and restore what was published; whether all of that went well."""
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as folder,
            SnapshotLoader(self.cache, self.remote, readonly=True) as loader,
        ):
            output = Path(folder, "output")
            try:
                snapshot = loader.get_snapshot(KEY_SET, "newest")
                json.dumps([snapshot_record(snapshot), vm_configuration_record(snapshot)])
                loader.restore_snapshot(snapshot, output)
            except SnaploaderError:
                assert not output.exists()
                return False
            assert sorted(path.name for path in output.iterdir()) == sorted(snapshot.manifest.names)
            return True


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileHost]:
    host = HostileHost(tmp_path_factory.mktemp("hostile"))
    yield host
    host.cache.close()


INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
INT64 = st.one_of(
    st.sampled_from([0, 1, -1, 1 << 62, -(1 << 63), (1 << 63) - 1]), st.integers(-(10**13), 10**13)
)
UINT32 = st.integers(0, (1 << 32) - 1)
TEXT = st.one_of(
    st.sampled_from(["", ".", "..", "a/b", "a", "b", "\0", "x" * 256, "name"]), st.text(max_size=5)
)


def fill_time(draw: st.DrawFn, timestamp: object) -> None:
    timestamp.seconds = draw(INT64)  # type: ignore[attr-defined]
    timestamp.nanos = draw(st.one_of(st.just(0), INT32))  # type: ignore[attr-defined]


def fill_properties(draw: st.DrawFn, properties: reapi.NodeProperties) -> None:
    if draw(st.booleans()):
        fill_time(draw, properties.mtime)
    if draw(st.booleans()):
        properties.unix_mode.value = draw(st.one_of(st.integers(0, 0o1777), UINT32))
    for name in draw(
        st.lists(st.sampled_from(["size", "chunk_size", "unix_name", "unix_target"]), max_size=3)
    ):
        value = draw(
            st.one_of(st.sampled_from(["0", "25", "4096", "9999999999999999", "ff", "ff2f", "61"]), TEXT)
        )
        properties.properties.add(name=name, value=value)


@st.composite
def trees(draw: st.DrawFn) -> bytes:
    tree = reapi.Tree()
    directory = tree.root
    fill_properties(draw, directory.node_properties)
    for name in draw(st.lists(st.one_of(TEXT, st.just("0")), max_size=3)):
        node = directory.files.add(name=name, is_executable=draw(st.booleans()))
        size = draw(st.one_of(st.just(DIGEST.size_bytes), INT64))
        node.digest.hash, node.digest.size_bytes = DIGEST.hash, size
        fill_properties(draw, node.node_properties)
    for name in draw(st.lists(TEXT, max_size=2)):
        link = directory.symlinks.add(name=name, target=draw(TEXT))
        fill_properties(draw, link.node_properties)
    return bytes(tree.SerializeToString())


@st.composite
def results(draw: st.DrawFn, host: HostileHost) -> reapi.ActionResult:
    result = reapi.ActionResult()
    metadata = VMMetadata(snapshot_id=draw(TEXT))
    fill_time(draw, metadata.created_timestamp)
    fill_time(draw, metadata.last_executed_task.completed_timestamp)
    metadata.last_executed_task.task_id = draw(TEXT)
    configuration = VMConfiguration(cpu_count=draw(INT64), memory_bytes=draw(INT64))
    result.execution_metadata.auxiliary_metadata.append(pack_any(configuration))
    packed = pack_any(metadata)
    garbage = any_pb2.Any(type_url=packed.type_url, value=draw(st.binary(max_size=8)))
    result.execution_metadata.auxiliary_metadata.append(draw(st.sampled_from([packed, packed, garbage])))
    for name in draw(st.lists(TEXT, max_size=2)):
        output = result.output_files.add(path=name, is_executable=draw(st.booleans()))
        output.digest.hash, output.digest.size_bytes = DIGEST.hash, DIGEST.size_bytes
        fill_properties(draw, output.node_properties)
    names = draw(st.lists(TEXT, max_size=2))
    for name in names:
        result.output_directories.add(path=name).tree_digest.CopyFrom(host.put(draw(trees())))
    if draw(st.booleans()):
        result.execution_metadata.auxiliary_metadata.append(pack_any(DirectoryNames(names=names)))
    return result


def add_digest(message: reapi.Digest, data: bytes) -> None:
    message.hash, message.size_bytes = SHA256.hash(data), len(data)


def repeated_listing(seed: int) -> bytes:
    """A few kilobytes that name a million paths."""
    leaf = reapi.Directory()
    for number in range(1000):
        leaf.symlinks.add(name=f"{seed:x}-{number:x}", target="x")
    tree = reapi.Tree(children=[leaf])
    for number in range(1000):
        add_digest(tree.root.directories.add(name=f"{number:x}").digest, leaf.SerializeToString())
    return bytes(tree.SerializeToString())


def fields_of(number: int, payloads: Iterable[bytes]) -> bytes:
    """A message with these in one repeated field; protobuf's own are slow for very many."""
    key = bytes((tag(number, BYTES),))
    return b"".join(key + varint(len(payload)) + payload for payload in payloads)


def one_field(number: int, payload: bytes) -> bytes:
    return fields_of(number, [payload])


def links(names: Iterable[bytes]) -> bytes:
    """A tree of nothing but symbolic links."""
    return one_field(1, fields_of(3, (one_field(1, name) + one_field(2, b"x") for name in names)))


def huge_listing(seed: int) -> bytes:
    """Links of a few bytes each, in one directory."""
    return links(f"{seed:x}-{number:x}".encode() for number in range(MANY))


def wide_names(seed: int) -> bytes:
    """Names that take four times their bytes in memory, as one character of them needs four."""
    return links(f"{seed}-{number}\U0001f600".encode().ljust(250, b"n") for number in range(MANY // 3))


def many_children(seed: int) -> bytes:
    """Directories without a parent, all different."""
    leaves = (one_field(3, one_field(1, b"%x-%x" % (seed, number))) for number in range(MANY))
    return one_field(1, b"") + fields_of(2, leaves)


def many_directories(seed: int) -> bytes:
    """Directories that are all different, in the root."""
    leaves = [one_field(3, one_field(1, b"%x-%x" % (seed, n)) + one_field(2, b"x")) for n in range(MANY // 4)]
    size = bytes((tag(2, VARINT),))
    nodes = (
        one_field(1, b"%x" % number)
        + one_field(2, one_field(1, SHA256.hash(leaf).encode()) + size + varint(len(leaf)))
        for number, leaf in enumerate(leaves)
    )
    return one_field(1, fields_of(2, nodes)) + fields_of(2, leaves)


def many_files(seed: int) -> bytes:
    """Files that are all different, in the root; and padding, which is passed over."""
    size = bytes((tag(2, VARINT),))
    nodes = (
        one_field(1, b"%x" % number)
        + one_field(2, one_field(1, b"%064x" % (seed << 32 | number)) + size + varint(1000 + number))
        for number in range(MANY)
    )
    return one_field(1, fields_of(1, nodes)) + one_field(15, bytes(MAX_TREES_BYTES // 2))


def many_chunks(seed: int) -> bytes:
    """A chunked file of half a million chunks."""
    hashes = np.random.default_rng(seed).integers(0, 256, (MANY, 32), np.uint8)
    return encode_tree(ChunkTable(4096 * MANY, 4096, SHA256, np.arange(MANY), hashes))


def hostile_result(host: HostileHost, make: Callable[[int], bytes], count: int) -> reapi.ActionResult:
    result = reapi.ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(VMConfiguration()))
    names = [str(number) for number in range(count)]
    for seed, name in enumerate(names):
        result.output_directories.add(path=name).tree_digest.CopyFrom(host.put(make(seed)))
    if make is not many_chunks:
        result.execution_metadata.auxiliary_metadata.append(pack_any(DirectoryNames(names=names)))
    return result


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """At most 400 MiB are taken in the block."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 400 << 20


SHAPES = [
    (repeated_listing, 100),
    (huge_listing, 3),
    (wide_names, 2),
    (many_children, 2),
    (many_directories, 3),
    (many_files, 1),
    (many_chunks, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "count"), SHAPES)
def test_no_manifest_takes_more_than_400_mib(
    tmp_path: Path, make: Callable[[int], bytes], count: int
) -> None:
    host = HostileHost(tmp_path)
    with host.cache, SnapshotLoader(host.cache, host.remote, readonly=True) as loader:
        host.publish(hostile_result(host, make, count))
        with bounded_memory(), contextlib.suppress(SnaploaderError):
            loader.get_snapshot(KEY_SET, "newest")


def test_trees_are_bounded_together_before_one_of_them_is_read(tmp_path: Path) -> None:
    host = HostileHost(tmp_path)
    result = reapi.ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(VMConfiguration()))
    for number in range(3):
        digest = result.output_directories.add(path=f"{number}").tree_digest
        digest.hash, digest.size_bytes = f"{number:064x}", 50 << 20
    host.publish(result)
    with (
        host.cache,
        SnapshotLoader(host.cache, host.remote, readonly=True) as loader,
        pytest.raises(DataLoss, match="trees have 157286400 bytes together"),
    ):
        loader.get_snapshot(KEY_SET, "newest")
    assert not host.remote.reads


@pytest.mark.slow
def test_a_million_chunks_are_found_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostileHost(tmp_path)
    host.publish(hostile_result(host, many_chunks, 2))
    monkeypatch.setattr(host.remote, "find_missing", lambda _: set())
    with host.cache, SnapshotLoader(host.cache, host.remote, readonly=True) as loader, bounded_memory():
        snapshot = loader.get_snapshot(KEY_SET, "newest")
    assert sum(table.stored_count for table in snapshot.tables.values()) == 2 * MANY
    assert len(snapshot.absent) == 2 * MANY


_FIND = """
import contextlib, re, sys
from pathlib import Path
from snaploader import DigestFunction, FileCache, RemoteCache, SnapshotKey, SnapshotLoader
from snaploader.errors import SnaploaderError
from snaploader.keys import SnapshotKeySet

class LyingCache(RemoteCache):
    def find_missing(self, digests):
        missing = super().find_missing(digests)
        return missing if sys.argv[3] == "honest" else set()

key = SnapshotKey(ref="main")
with (
    FileCache(sys.argv[2]) as cache,
    LyingCache(sys.argv[1], digest_function=DigestFunction.SHA256) as remote,
    SnapshotLoader(cache, remote, readonly=True) as loader,
    contextlib.suppress(SnaploaderError),
):
    loader.get_snapshot(SnapshotKeySet(key, (), key), "newest")
print(int(re.search("VmHWM: *([0-9]+)", Path("/proc/self/status").read_text().replace("\\t", " "))[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "count", "server", "most_mib"),
    [(many_chunks, 3, "honest", 340), (many_chunks, 3, "lying", 340), (many_files, 1, "honest", 380)],
)
def test_no_process_takes_more_than_400_mib(
    tmp_path: Path, make: Callable[[int], bytes], count: int, server: str, most_mib: int
) -> None:
    """As the system counts it: with Python, gRPC and what is between allocations; that varies."""
    host = HostileHost(tmp_path)
    with host.cache, EmbeddedServer(options=ServerOptions(check_completeness=False)) as remote:
        result = hostile_result(host, make, count)
        for data in host.remote.blobs.values():
            remote.put_blob(data, SHA256)
        with RemoteCache(remote.url, digest_function=SHA256) as client:
            client.update_action_result(key_names.remote_manifest_digest(KEY, SHA256), result)
        script = [sys.executable, "-c", _FIND, remote.url, str(tmp_path / "fresh"), server]
        peak = int(subprocess.run(script, check=True, stdout=subprocess.PIPE, timeout=240).stdout)
    assert peak < most_mib


def test_nothing_holds_a_tree_that_was_read(tmp_path: Path) -> None:
    """The bytes of a tree go when it is decoded, and not only when cycles are looked for."""
    host = HostileHost(tmp_path)
    result = reapi.ActionResult()
    result.execution_metadata.auxiliary_metadata.append(pack_any(VMConfiguration()))
    padding = one_field(15, bytes(8 << 20))
    names = ["a", "b", "c"]
    for name in names:
        tree = links([name.encode()]) + padding
        result.output_directories.add(path=name).tree_digest.CopyFrom(host.put(tree))
    result.execution_metadata.auxiliary_metadata.append(pack_any(DirectoryNames(names=names)))
    host.publish(result)
    with host.cache, SnapshotLoader(host.cache, host.remote, readonly=True) as loader:
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            snapshot = loader.get_snapshot(KEY_SET, "newest")
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert list(snapshot.directories) == names
    assert held < 4 << 20
    assert peak < 20 << 20, "one tree at a time: as it comes, and as it is read from the cache"


@given(data=st.data())
def test_whatever_a_manifest_says_it_is_restored_or_refused(
    hostile: HostileHost, data: st.DataObject
) -> None:
    hostile.publish(data.draw(results(hostile)))
    hostile.use()


@pytest.mark.parametrize("seconds", [-(1 << 63), (1 << 63) - 1, 253_402_300_800, -62_135_596_801])
def test_a_time_that_no_calendar_has_is_no_reason_to_fail(hostile: HostileHost, seconds: int) -> None:
    result = reapi.ActionResult()
    metadata = VMMetadata()
    metadata.created_timestamp.seconds = seconds
    metadata.last_executed_task.completed_timestamp.seconds = seconds
    result.execution_metadata.auxiliary_metadata.extend([pack_any(VMConfiguration()), pack_any(metadata)])
    output = result.output_files.add(path="file")
    output.digest.hash, output.digest.size_bytes = DIGEST.hash, DIGEST.size_bytes
    hostile.publish(result)
    assert hostile.use()
