"""What a save reads, stores, uploads and refuses."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loader_hosts import CHUNK, CONFIGURATION, HostFactory, image, metadata

from cow import COWStore
from snaploader import SnapshotTask, VMConfiguration, VMMetadata
from snaploader.cli.lookup import snapshot_record
from snaploader.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
    Unavailable,
)
from snaploader.filecache import layout
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions


def test_saving_again_reads_hashes_and_uploads_only_what_was_touched(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    content = image(1, chunks=64)
    make_host("a", server).save(content)
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(10 * CHUNK + 5, b"one chunk")
        disk.write_at(20 * CHUNK - 2, b"two chunks")
        (file,) = host.save(chunked_files={"disk": disk}).files
        assert (file.hashed_chunks, file.hashed_bytes) == (3, 3 * CHUNK)
        disk.write_at(30 * CHUNK, b"again")
        result = host.save(chunked_files={"disk": disk})
        assert result.files[0].hashed_chunks == 1
        # One chunk, and the tree that names them all.
        assert result.uploaded_blobs == 2
        unchanged = host.save(chunked_files={"disk": disk})
        assert unchanged.hashed_bytes == 0
        assert unchanged.uploaded_blobs == 0
        origins = disk.statistics().origins
    assert origins["remote"].chunks == 4


def test_zero_chunks_are_holes_and_never_stored(make_host: HostFactory) -> None:
    host = make_host("a")
    content = image(2, chunks=8, holes=(1, 2), tail=0) + bytes(17)
    (file,) = host.save(content).files
    assert file.hole_bytes == 2 * CHUNK + 17
    assert file.chunks == 6
    assert len(host.chunk_files()) == 6


def test_a_chunk_overwritten_with_zeros_becomes_a_hole(make_host: HostFactory) -> None:
    host = make_host("a")
    content = bytearray(image(3))
    host.save(bytes(content))
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(5 * CHUNK, bytes(CHUNK))
        content[5 * CHUNK : 6 * CHUNK] = bytes(CHUNK)
        before = host.find().tables["disk"]
        host.save(chunked_files={"disk": disk})
        after = host.find().tables["disk"]
    assert after.stored_count == before.stored_count - 1
    assert host.load() == content


def test_a_write_after_a_save_never_changes_what_was_saved(make_host: HostFactory) -> None:
    host = make_host("a")
    content = image(4)
    path = host.folder / "disk.img"
    path.write_bytes(content)
    with COWStore.from_file(path, host.folder / "store", CHUNK) as disk:
        host.save(chunked_files={"disk": disk})
        for offset in range(0, len(content), CHUNK):
            disk.write_at(offset, b"scribble")
        assert host.load() == content
        host.save(chunked_files={"disk": disk}, branch="topic")
        disk.write_at(0, b"SCRIBBLE")
        assert host.load() == content
        assert host.load("topic")[:8] == b"scribble"


def test_equal_chunks_are_stored_and_uploaded_once(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    result = host.save(b"\x07" * (10 * CHUNK))
    assert len(host.chunk_files()) == 1
    assert result.stored_bytes + result.deduplicated_bytes == 10 * CHUNK
    assert result.stored_bytes < 10 * CHUNK
    assert result.uploaded_blobs == 2


def test_the_same_state_gives_the_same_manifest(make_host: HostFactory, server: EmbeddedServer) -> None:
    manifests = []
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        host = make_host(name, server)
        paths = {}
        for number, file in enumerate(sorted(order)):
            paths[file] = host.folder / file
            paths[file].write_bytes(image(number))
        host.save(chunked_files={file: paths[file] for file in order})
        # The metadata says when it was saved, and as what.
        manifest = host.find(policy="newest").manifest
        manifests.append(replace(manifest, vm_metadata=None).serialize())
    assert manifests[0] == manifests[1]


def test_every_untouched_chunk_is_made_complete_remotely(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    """Chunks that only local caches served age out on the server; a later save puts them back."""
    content = image(5)
    host = make_host("a", server)
    host.save(content)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(0, b"x")
        for digest in server.blobs():
            server.delete_blob(digest)
        host.save(chunked_files={"disk": disk})
    assert make_host("b", server).load() == b"x" + content[1:]


def test_an_untouched_chunk_that_is_nowhere_is_an_error_and_publishes_nothing(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(6))
    host = make_host("b", server)
    with host.unpack(host.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(0, b"x")
        lost = unpacked.snapshot.tables["disk"].get(7)
        server.delete_blob(lost)
        with pytest.raises(SnaploaderError, match=lost.hash):
            host.save(chunked_files={"disk": disk}, branch="topic")
        with pytest.raises(NotFound):
            host.loader.get_snapshot(replace(host.keys("topic"), fallback_keys=()), "local-first")
        # Nothing was lost by the failure: the written chunk still counts as unsaved.
        server.put_blob(make_host("a", server).cache.read(lost), lost.function)
        assert host.save(chunked_files={"disk": disk}, branch="topic").files[0].hashed_chunks >= 1
    assert make_host("c", server).load("topic")[:1] == b"x"


def test_a_foreign_store_is_read_whole_and_saved(make_host: HostFactory) -> None:
    one, two = make_host("one"), make_host("two")
    content = image(7)
    one.save(content)
    with one.unpack(one.find()) as unpacked:
        disk = unpacked.chunked_files["disk"]
        disk.write_at(3, b"!")
        two.save(chunked_files={"disk": disk})
    assert two.load() == content[:3] + b"!" + content[4:]


def test_local_survives_an_outage_during_the_remote_part(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        key_set = host.keys()
        faults.add(Fault("FindMissingBlobs", status="UNAVAILABLE", times=1000))
        with pytest.raises(Unavailable) as caught:
            host.save(image(8), key=key_set.write_key)
        assert any("saved in the local cache" in note for note in caught.value.__notes__)
        assert host.read(host.loader.get_snapshot(key_set, "local-only")) == image(8)


def test_the_manifest_is_published_last(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    key_set = host.keys()
    server.clear_log()
    host.save(image(9), key=key_set.write_key)
    methods = [request.method for request in server.requests]
    last_upload = max(i for i, m in enumerate(methods) if m in ("BatchUpdateBlobs", "Write"))
    assert methods.index("UpdateActionResult") > last_upload


def test_a_failed_upload_publishes_no_remote_manifest(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        key_set = host.keys()
        calls = server.calls("UpdateActionResult")
        for method in ("BatchUpdateBlobs", "Write"):
            faults.add(Fault(method, status="PERMISSION_DENIED", times=1000))
        with pytest.raises(PermissionDenied):
            host.save(image(10), key=key_set.write_key)
        assert server.calls("UpdateActionResult") == calls


def test_a_snapshot_id_is_never_overwritten(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1), snapshot_id="run-1")
    for host in (a, b):
        with pytest.raises(FailedPrecondition, match="run-1"):
            host.save(image(2), snapshot_id="run-1")
    assert b.read(b.loader.get_snapshot_by_id("run-1")) == image(1)
    assert b.load() == image(1)


def test_a_failed_id_manifest_does_not_suppress_the_branch_manifest(
    make_host: HostFactory, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("a", server)
    put_ref = host.cache.put_ref

    def put_ref_failing(key: str, data: bytes, *, overwrite: bool = True) -> bool:
        if not overwrite:
            raise ResourceExhausted("no space")
        return put_ref(key, data, overwrite=overwrite)

    key = host.keys().write_key
    monkeypatch.setattr(host.cache, "put_ref", put_ref_failing)
    result = host.save(image(1), key=key)
    assert result.saved_locally
    assert any("no space" in warning for warning in result.warnings)
    assert host.load(policy="local-only") == image(1)


def test_options_that_store_nothing_are_errors(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host("a")
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(InvalidArgument, match="nothing to save"):
        host.save()
    with pytest.raises(InvalidArgument, match="no remote cache"):
        host.save(image(1), remote=True)
    with pytest.raises(InvalidArgument, match="choose one"):
        host.save(files={"f": path}, chunked_files={"f": path})
    with pytest.raises(InvalidArgument, match="key_set"):
        host.save(image(1), save_policy="none-available")
    with pytest.raises(InvalidArgument):
        host.save(image(1), save_policy="sometimes")
    for name in ("a/b", "..", "", "nul\0", "x" * 300):
        with pytest.raises(InvalidArgument):
            host.save(files={name: path})
    with pytest.raises(NotFound):
        host.save(files={"f": tmp_path / "absent"})
    with pytest.raises(NotFound):
        host.save(chunked_files={"f": tmp_path / "absent"})
    with pytest.raises(SnaploaderError):
        host.save(files={"f": tmp_path})
    with pytest.raises(SnaploaderError):
        host.save(chunked_files={"f": tmp_path})
    with pytest.raises(NotFound):
        host.find()


def test_readonly_holds_on_every_path(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server, readonly=True)
    for kwargs in ({}, {"remote": False}):
        with pytest.raises(FailedPrecondition, match="read-only"):
            host.save(image(1), **kwargs)
    assert host.blobs() == []
    assert server.blobs() == []


def test_a_file_that_changes_meanwhile_is_refused(make_host: HostFactory) -> None:
    host = make_host("a")
    path = host.folder / "to-save.img"

    def change(_: object) -> None:
        with path.open("r+b") as file:
            file.write(b"changed")

    with pytest.raises(FailedPrecondition, match="changed while"):
        host.save(image(1), progress=change)


def test_the_first_error_stops_the_rest_and_leaks_nothing(make_host: HostFactory) -> None:
    host = make_host("a")

    def fail(_: object) -> None:
        raise RuntimeError("the progress bar broke")

    with pytest.raises(RuntimeError, match="progress bar"):
        host.save(image(1), progress=fail)
    assert host.save(image(1)).saved_locally


def test_a_cache_that_is_too_small_refuses_instead_of_publishing(make_host: HostFactory) -> None:
    host = make_host("a", max_bytes=6 * CHUNK)
    with pytest.raises(ResourceExhausted):
        host.save(image(1, chunks=32, holes=()))
    with pytest.raises(NotFound):
        host.find()


@pytest.mark.parametrize(
    ("policy", "branch", "is_saved"),
    [
        ("always", "topic", True),
        ("first-non-default-ref", "topic", False),
        ("first-non-default-ref", "main", True),
        ("none-available", "topic", False),
        ("none-available", "other", False),
        ("none-available", "main", True),
        ("first-non-default-ref", "other", True),
    ],
)
def test_save_policies(
    make_host: HostFactory, server: EmbeddedServer, policy: str, branch: str, is_saved: bool
) -> None:
    host = make_host("a", server)
    host.save(image(1), "main")
    host.save(image(1), "topic")
    result = host.save(image(2), branch, save_policy=policy, default_ref="main", key_set=host.keys(branch))
    assert result.saved_locally
    assert result.saved_remotely is is_saved
    assert bool(result.remote_skipped) is not is_saved
    assert make_host("b", server).load(branch) == image(2 if is_saved else 1)
    assert host.load(branch) == image(2)


def test_the_default_branch_is_refreshed_at_an_interval(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    options: dict[str, Any] = {"default_ref": "main", "min_refresh_interval_s": 3600.0}
    assert host.save(image(1), vm_metadata=metadata(time.time()), **options).saved_remotely
    assert not host.save(image(2), vm_metadata=metadata(time.time()), **options).saved_remotely
    old = metadata(time.time() - 4000)
    host.save(image(3), vm_metadata=old)
    assert host.save(image(4), vm_metadata=metadata(time.time()), **options).saved_remotely


def test_replacing_a_snapshot_20_times_evicts_no_other(
    make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each load counts as a use, however soon after the last.
    monkeypatch.setattr(layout, "GRANULARITY_NS", 0)
    keep = image(1)
    host = make_host("a", max_bytes=60 * CHUNK)
    host.save(keep, "keep")
    for round_ in range(20):
        host.save(image(100 + round_), "replaced")
        assert host.load("keep", default="") == keep
    assert host.load("replaced", default="") == image(119)


def test_a_server_that_takes_no_updates_is_reported_and_the_local_snapshot_stands(
    make_host: HostFactory,
) -> None:
    with EmbeddedServer(options=ServerOptions(update_enabled=False)) as server:
        host = make_host("a", server)
        key_set = host.keys()
        with pytest.raises((FailedPrecondition, PermissionDenied)) as caught:
            host.save(image(1), key=key_set.write_key)
        assert any("saved in the local cache" in note for note in caught.value.__notes__)
        assert host.read(host.loader.get_snapshot(key_set, "local-only")) == image(1)


def test_saves_from_many_threads_at_once(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            path = host.folder / f"disk-{number}"
            path.write_bytes(image(number))
            host.save(chunked_files={"disk": path}, branch=f"branch-{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors
    for number in range(8):
        assert make_host("b", server).load(f"branch-{number}") == image(number)


def test_progress_rises_to_the_total(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    seen: dict[str, list[Any]] = {}
    host.save(image(1), progress=lambda p: seen.setdefault(p.stage, []).append(p))
    assert set(seen) == {"store", "upload"}
    for reports in seen.values():
        done = [report.done_bytes for report in reports]
        assert done == sorted(done)
    assert seen["upload"][-1].done_bytes == seen["upload"][-1].total_bytes


def test_vm_configuration_is_required_to_be_a_message(make_host: HostFactory) -> None:
    host = make_host("a")
    with pytest.raises(TypeError):
        host.save(image(1), vm_configuration={"cpus": 2})
    assert CONFIGURATION.cpu_count == 2


def test_the_task_that_ran_last_is_recorded(make_host: HostFactory, server: EmbeddedServer) -> None:
    ran = SnapshotTask(task_id="t", invocation_id="i", action_digest=f"{'a' * 64}/7")
    host, other = make_host("a", server, clock=lambda: 1_700_000_000.5), make_host("b", server)
    for given in (None, VMMetadata(vm_id="vm")):
        host.save(image(1), task=ran, vm_metadata=given)
        found = other.find(policy="newest").vm_metadata
        assert found is not None
        assert found.vm_id == ("vm" if given else "")
        last = found.last_executed_task
        assert (last.task_id, last.invocation_id, last.action_digest) == ("t", "i", ran.action_digest)
        assert last.completed_timestamp.ToNanoseconds() == 1_700_000_000_500_000_000
    record = snapshot_record(other.find(policy="newest"))
    assert record["last_executed_task"] == {
        "task_id": "t",
        "invocation_id": "i",
        "action_digest": ran.action_digest,
        "completed": "2023-11-14T22:13:20+00:00",
    }


def test_what_the_metadata_says_of_a_task_stands(make_host: HostFactory) -> None:
    host = make_host("a")
    given = metadata(1_600_000_000)
    given.last_executed_task.task_id = "theirs"
    host.save(image(1), task=SnapshotTask(task_id="ours", invocation_id="i"), vm_metadata=given)
    found = host.find().vm_metadata
    assert found is not None
    assert found.last_executed_task.task_id == "theirs"
    assert found.last_executed_task.invocation_id == "i"
    assert found.last_executed_task.completed_timestamp.seconds == 1_600_000_000
    with pytest.raises(InvalidArgument, match="VMMetadata"):
        host.save(image(1), task=SnapshotTask(task_id="ours"), vm_metadata=VMConfiguration())
