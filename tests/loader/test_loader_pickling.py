"""What calls return goes to another process and comes back equal; what belongs to a process says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import FrozenInstanceError, replace
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import struct_pb2
from loader_hosts import CHUNK, CONFIGURATION, Host, HostFactory, image, metadata, task

from cow import COWStore
from snaploader import (
    ChunkTable,
    DigestFunction,
    DirectorySource,
    FileCache,
    InvalidArgument,
    KeyFailure,
    Manifest,
    NotFound,
    RemoteCache,
    Snapshot,
    SnapshotKey,
    SnapshotLoader,
    VMConfiguration,
    VMMetadata,
    errors,
)
from snaploader._proto import timestamp_pb2
from snaploader.formats.manifest import pack_any
from snaploader.testing import EmbeddedServer, FakeCAS

DISK = image(1)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


WAYS = pytest.mark.parametrize("renewed", [pickled, copy.copy, copy.deepcopy], ids=lambda way: way.__name__)
Way = Callable[[Any], Any]


@pytest.fixture
def host(make_host: HostFactory) -> Host:
    return make_host("a", remote=FakeCAS())


def saved(host: Host, **kwargs: Any) -> Snapshot:
    """A snapshot with a file and a directory beside the disk, in which there is a chunked file too."""
    home = host.folder / "home"
    (home / "sub").mkdir(parents=True, exist_ok=True)
    (home / "sub" / "notes").write_bytes(b"notes")
    (home / "big").write_bytes(image(2))
    (home / "link").symlink_to("sub/notes")
    result = host.save(
        DISK,
        files={"kernel": home / "sub" / "notes"},
        directories={"home": DirectorySource(home, chunk_threshold_bytes=CHUNK)},
        vm_metadata=metadata(1_700_000_000),
        **kwargs,
    )
    return host.loader.get_snapshot_by_id(result.snapshot_id)


@WAYS
def test_a_snapshot_comes_back_equal_and_can_be_unpacked(host: Host, renewed: Way) -> None:
    snapshot = saved(host)
    again = renewed(snapshot)
    assert again == snapshot
    assert isinstance(again.manifest, Manifest)
    assert again.vm_metadata == snapshot.vm_metadata
    assert again.vm_configuration == CONFIGURATION
    assert again.tables == snapshot.tables
    assert again.directories == snapshot.directories
    assert host.read(again) == DISK


@WAYS
def test_what_comes_back_is_as_immutable_as_before(host: Host, renewed: Way) -> None:
    snapshot = renewed(saved(host))
    with pytest.raises(FrozenInstanceError):
        snapshot.manifest = None
    with pytest.raises(TypeError):
        snapshot.manifest.files["other"] = None
    table = snapshot.tables["disk"]
    assert not table.indices.flags.writeable
    assert not table.hashes.flags.writeable
    with pytest.raises(TypeError):
        snapshot.directories["home"]["other"] = None


@WAYS
def test_all_results_come_back_equal(host: Host, tmp_path: Path, renewed: Way) -> None:
    result = host.save(DISK)
    snapshot = host.find()
    derived = host.loader.derive_snapshot(snapshot)
    results = [
        result,
        derived,
        host.loader.restore_snapshot(snapshot, tmp_path / "out"),
        host.loader.delete_snapshot(derived.snapshot_id),
        host.keys(),
        task(),
        snapshot.manifest.chunked_files["disk"],
        snapshot.absent,
        KeyFailure(SnapshotKey(ref="main"), NotFound("gone", transient=True)),
        replace(snapshot, failures=(KeyFailure(SnapshotKey(), NotFound("gone")),)),
    ]
    assert [renewed(each) for each in results] == results
    assert [hash(renewed(each)) for each in results[-2:-1]] == [hash(each) for each in results[-2:-1]]


def test_failures_of_another_kind_or_key_are_not_equal() -> None:
    failure = KeyFailure(SnapshotKey(), NotFound("gone"))
    assert failure != KeyFailure(SnapshotKey(ref="main"), NotFound("gone"))
    assert failure != KeyFailure(SnapshotKey(), NotFound("lost"))
    assert failure != KeyFailure(SnapshotKey(), errors.DataLoss("gone"))
    assert failure != KeyFailure(SnapshotKey(), NotFound("gone", transient=True))


@WAYS
@pytest.mark.parametrize(
    "kind",
    [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)],
    ids=lambda kind: kind.__name__,
)
def test_errors_come_back_with_what_they_say(kind: type[errors.SnaploaderError], renewed: Way) -> None:
    error = kind("what failed", transient=not kind.transient)
    error.add_note("needed for chunk 1")
    error.uploaded = (FakeCAS().digest_function,)
    again = renewed(error)
    assert type(again) is kind
    assert (str(again), again.message) == ("what failed", "what failed")
    assert again.transient is not kind.transient
    assert (again.uploaded, again.__notes__) == (error.uploaded, error.__notes__)


@WAYS
def test_messages_come_back_equal_though_no_default_pool_knows_them(renewed: Way) -> None:
    message = metadata(5)
    message.properties["a"] = "b"
    parts = [
        message,
        message.last_executed_task,
        message.last_executed_task.completed_timestamp,
        timestamp_pb2.Timestamp(seconds=3),
        pack_any(message),
        VMConfiguration(cpu_count=3),
    ]
    for part in parts:
        again = renewed(part)
        assert again == part
        assert type(again) is type(part)


@WAYS
def test_a_manifest_with_metadata_of_others_comes_back_equal(renewed: Way) -> None:
    others = (pack_any(struct_pb2.Struct()), pack_any(VMMetadata(vm_id="other")))
    manifest = Manifest(pack_any(CONFIGURATION), DigestFunction.BLAKE3, other_metadata=others)
    assert renewed(manifest) == manifest


def test_a_pickled_table_takes_forty_bytes_for_each_chunk() -> None:
    chunks = 50_000
    hashes = np.random.default_rng(1).integers(0, 256, (chunks, 32), np.uint8)
    table = ChunkTable(chunks * CHUNK, CHUNK, DigestFunction.BLAKE3, np.arange(chunks), hashes)
    assert len(pickle.dumps(table)) < 40 * chunks + 1000


def unpack_elsewhere(snapshot: Snapshot, cache: str, url: str, folder: str) -> tuple[bytes, int]:
    """Runs in another process, which has seen nothing yet."""
    with (
        FileCache(cache) as file_cache,
        RemoteCache(url) as remote,
        SnapshotLoader(file_cache, remote) as loader,
        loader.unpack_snapshot(snapshot, folder) as unpacked,
    ):
        disk = unpacked.chunked_files["disk"]
        return disk.read_at(0, disk.size), unpacked.statistics()["disk"].origins["remote"].chunks


@pytest.fixture(scope="module")
def spawning() -> None:
    """What multiprocessing starts once, and keeps."""
    resource_tracker.ensure_running()


@pytest.mark.usefixtures("spawning")
def test_a_snapshot_is_unpacked_by_a_process_that_was_spawned(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path
) -> None:
    snapshot = saved(make_host("a", server))
    arguments = (str(tmp_path / "b"), server.url, str(tmp_path / "out"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        data, fetched = pool.submit(unpack_elsewhere, snapshot, *arguments).result()
    assert data == DISK
    assert fetched == snapshot.tables["disk"].stored_count


def test_what_belongs_to_a_process_says_what_to_pickle_instead(
    make_host: HostFactory, server: EmbeddedServer, tmp_path: Path
) -> None:
    host = make_host("a", server)
    with host.unpack(saved(host)) as unpacked, COWStore(tmp_path / "store", size=CHUNK) as store:
        for thing, instead in [
            (unpacked, "pickle its `snapshot`"),
            (host.loader, "what it returns can be pickled"),
            (host.cache, "on the same folder"),
            (host.remote, "with the same arguments"),
            (store, "its private files are its own"),
        ]:
            for refused in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=instead):
                    refused(thing)
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == DISK


def test_a_snapshot_may_be_saved_without_a_configuration(host: Host) -> None:
    snapshot = saved(host, vm_configuration=None)
    assert snapshot.vm_configuration == VMConfiguration()
    assert snapshot.unpack_configuration(VMConfiguration) == VMConfiguration()


def test_a_configuration_of_the_embedders_own_type_is_read_as_that(host: Host) -> None:
    own = struct_pb2.Struct()
    own.update({"machine": "c3"})
    snapshot = saved(host, vm_configuration=own)
    assert snapshot.vm_configuration is None
    assert snapshot.unpack_configuration(struct_pb2.Struct) == own
    assert snapshot.unpack_configuration(VMConfiguration) is None


def test_a_configuration_that_cannot_be_read_is_none_or_an_error(host: Host) -> None:
    snapshot = saved(host)
    packed = pack_any(CONFIGURATION)
    packed.value = b"\xff"
    broken = replace(snapshot, manifest=replace(snapshot.manifest, vm_configuration=packed))
    assert broken.vm_configuration is None
    with pytest.raises(InvalidArgument, match="VMConfiguration"):
        broken.unpack_configuration(VMConfiguration)
