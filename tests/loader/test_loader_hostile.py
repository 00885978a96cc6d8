"""Manifests that a hostile server makes up: every one is loaded or refused, in bounded memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snaploader import FileCache, SnapshotKey, SnapshotLoader, VMConfiguration, VMMetadata
from snaploader import keys as key_names
from snaploader._proto import any_pb2
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader._proto.snaploader_pb2 import DirectoryNames
from snaploader.cli.describe import snapshot_record, vm_configuration_record
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import SnaploaderError
from snaploader.keys import SnapshotKeySet
from snaploader.manifest import pack_any
from snaploader.testing import FakeCAS

SHA256 = DigestFunction.SHA256
KEY = SnapshotKey(ref="main")
KEY_SET = SnapshotKeySet(KEY, (), KEY)
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
