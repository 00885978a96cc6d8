"""What is wrong with workspaces is found and named, and nothing else."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snaploader import FileCache, SnapshotLoader
from snaploader.digest import Digest, DigestFunction
from snaploader.testing import FakeCAS
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.check import Finding, FindingKind, check
from snaploader.workspace.manager import WorkspaceManager
from snaploader.workspace.model import (
    Operation,
    OperationKind,
    SnapshotRecord,
    SnapshotStatus,
    Volume,
    WorkspaceSpec,
    pin_name,
)
from snaploader.workspace.testing import FakeRuntime

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Host:
    """A manager, and what it stands on."""

    def __init__(self, manager: WorkspaceManager, runtime: FakeRuntime, folder: Path) -> None:
        self.manager = manager
        self.runtime = runtime
        self.folder = folder

    def populate(self) -> None:
        """Make a workspace in each state: `running`, `stopped`, `paused`, `gone`; and a fork."""
        for workspace_id in ("running", "stopped", "paused", "gone"):
            self.manager.create(workspace_id, volumes=[Volume("data", "/data")])
            (self.runtime.root(workspace_id) / "data/file").write_text(workspace_id)
            self.manager.create_version(workspace_id)
        self.manager.commit("running", "golden")
        self.manager.fork("running", "forked", start=False)
        self.manager.stop("stopped")
        self.manager.pause("paused")
        self.manager.commit("paused")
        self.manager.delete("gone")

    def findings(self) -> list[tuple[FindingKind, str]]:
        """Kind and workspace of all that is wrong."""
        return [(finding.kind, finding.workspace_id) for finding in check(self.manager)]

    def version(self, workspace_id: str) -> SnapshotRecord:
        """The snapshot of version 1."""
        with self.manager.catalog.reading() as reader:
            return reader.snapshot(reader.version(workspace_id, 1).snapshot_name)


@contextmanager
def open_host(folder: Path, catalog: Catalog) -> Iterator[Host]:
    with (
        FileCache(folder / "cache") as file_cache,
        SnapshotLoader(file_cache, FakeCAS(), workers=1) as loader,
        closing(FakeRuntime(folder / "runtime")) as runtime,
        WorkspaceManager(
            catalog, loader, file_cache, runtime, folder / "state", host="here", workers=2
        ) as manager,
    ):
        yield Host(manager, runtime, folder)


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a host with a workspace in each state; made once, as all of it is flushed to disk."""
    folder = tmp_path_factory.mktemp("populated") / "host"
    folder.mkdir()
    with Catalog.open(folder / "catalog.db") as catalog, open_host(folder, catalog) as host:
        host.populate()
    return folder


@pytest.fixture
def host(tmp_path: Path, populated: Path) -> Iterator[Host]:
    """A host with a workspace in each state. What is looked at is the same with every database."""
    folder = tmp_path / "host"
    shutil.copytree(populated, folder, symlinks=True)
    with Catalog.open(folder / "catalog.db") as catalog:
        with catalog.transaction() as transaction:  # the copy is the host's from now on
            state = transaction.host_state("here")
            assert state is not None
            transaction.claim_host(state._replace(state_directory=str(folder / "state"), place=None))
        with open_host(folder, catalog) as opened:
            yield opened


@pytest.mark.slow
def test_nothing_is_wrong_with_what_a_manager_does(tmp_path: Path, catalog: Catalog) -> None:
    with open_host(tmp_path, catalog) as host:
        host.populate()
        assert check(host.manager) == []
        host.runtime.end("running", 3)
        assert host.findings() == [(FindingKind.PROCESS, "running")]
        host.manager.recover()
        assert check(host.manager) == []


def test_nothing_is_wrong_with_workspaces_in_all_states(host: Host) -> None:
    assert check(host.manager) == []


def test_an_operation_that_nobody_is_at_is_found(host: Host) -> None:
    with host.manager.catalog.transaction() as transaction:
        transaction.begin_operation("stopped", Operation(OperationKind.PAUSE, "token", "here", NOW))
    assert check(host.manager) == [
        Finding(
            FindingKind.OPERATION,
            "stopped",
            "pause began at 2026-01-01 00:00:00 on host 'here', and nobody is doing it",
        )
    ]


@pytest.mark.parametrize("status", [SnapshotStatus.PENDING, SnapshotStatus.DELETING])
def test_a_snapshot_that_is_neither_there_nor_gone_is_found(host: Host, status: SnapshotStatus) -> None:
    record = replace(host.version("stopped"), name="stopped.x", runtime_name="x", status=status)
    with host.manager.catalog.transaction() as transaction:
        transaction.put_snapshot(record)
    (finding,) = check(host.manager)
    assert finding.kind is FindingKind.UNFINISHED
    assert str(finding) == f"stopped: snapshot 'stopped.x' is {status}, and nobody is doing it"


def test_a_commit_that_failed_and_waits_for_the_next_try_is_fine(host: Host) -> None:
    record = replace(
        host.version("stopped"), name="stopped.x", runtime_name="x", status=SnapshotStatus.ORPHANED
    )
    with host.manager.catalog.transaction() as transaction:
        transaction.put_snapshot(record)
    host.manager.file_cache.pin(pin_name("stopped.x"))
    assert check(host.manager) == []


@pytest.mark.parametrize("workspace_id", ["stopped", "gone", "unknown"])
def test_a_pin_without_a_snapshot_in_the_catalog_is_found(host: Host, workspace_id: str) -> None:
    host.manager.file_cache.pin(pin_name(f"{workspace_id}.x"))
    (finding,) = check(host.manager)
    assert (finding.kind, finding.workspace_id) == (FindingKind.UNMANAGED, workspace_id)
    assert finding.is_known == (workspace_id != "unknown")
    assert f"'workspace.{workspace_id}.x'" in finding.detail


def test_a_pin_that_is_of_no_workspace_is_found(host: Host) -> None:
    host.manager.file_cache.pin(pin_name("Not-an-id.x"))
    host.manager.file_cache.pin("somebody-elses")
    assert check(host.manager) == [
        Finding(FindingKind.UNMANAGED, "", "pin 'workspace.Not-an-id.x' is of no workspace", is_known=False)
    ]


def test_a_snapshot_that_may_be_evicted_is_found(host: Host) -> None:
    host.manager.file_cache.unpin(pin_name(host.version("stopped").name))
    assert host.findings() == [(FindingKind.UNPINNED, "stopped")]


def test_a_commit_may_be_evicted_once_nothing_goes_on_from_it(host: Host) -> None:
    commit = host.manager.workspace("running").current_snapshot
    host.manager.file_cache.unpin(pin_name(commit))
    assert host.findings() == [(FindingKind.UNPINNED, "running")]
    host.manager.rollback("running", 1)
    assert check(host.manager) == []


def test_a_snapshot_with_a_missing_blob_is_found(host: Host) -> None:
    host.manager.file_cache.remove(Digest.of(b"stopped", DigestFunction.SHA256))
    (finding,) = check(host.manager)
    assert finding.kind is FindingKind.INCOMPLETE
    assert "1 of its blobs" in finding.detail


def test_a_snapshot_without_its_manifest_is_found(host: Host) -> None:
    host.manager.file_cache.delete_ref(host.version("stopped").manifest_ref)
    (finding,) = check(host.manager)
    assert (finding.kind, finding.workspace_id) == (FindingKind.INCOMPLETE, "stopped")
    assert "no local manifest" in finding.detail


def test_a_damaged_pin_is_found(host: Host) -> None:
    (path,) = host.folder.rglob(pin_name(host.version("stopped").name))
    path.write_bytes(b"rot")
    (finding,) = check(host.manager)
    assert finding.kind is FindingKind.INCOMPLETE
    assert "damaged" in finding.detail


def test_a_pin_that_does_not_keep_the_manifest_is_found(host: Host) -> None:
    record = host.version("stopped")
    pin = host.manager.file_cache.pinned(pin_name(record.name))
    host.manager.file_cache.pin(pin_name(record.name), hashes=[pin.hashes])
    assert host.findings() == [(FindingKind.INCOMPLETE, "stopped")]


def test_a_workspace_that_goes_on_from_nothing_is_found(host: Host) -> None:
    with host.manager.catalog.transaction() as transaction:
        transaction.update_workspace("stopped", current_snapshot="stopped.lost")
    (finding,) = check(host.manager)
    assert finding.kind is FindingKind.INCOMPLETE
    assert "'stopped.lost'" in finding.detail


def test_a_workspace_that_ended_by_itself_is_found(host: Host) -> None:
    host.runtime.end("running", 3)
    assert [str(finding) for finding in check(host.manager)] == [
        "running: it is running, but no process is: its command has ended, exit code 3"
    ]


@pytest.mark.parametrize("workspace_id", ["stopped", "forked"])
def test_a_process_that_should_not_run_is_found(host: Host, workspace_id: str) -> None:
    host.runtime.start(host.manager.workspace(workspace_id).spec)
    assert host.findings() == [(FindingKind.PROCESS, workspace_id)]


@pytest.mark.parametrize("workspace_id", ["paused", "gone", "unknown"])
def test_files_of_a_workspace_that_has_none_are_found(host: Host, workspace_id: str) -> None:
    spec = WorkspaceSpec(workspace_id)
    host.runtime.create(spec)
    assert host.findings() == [(FindingKind.FOLDER, workspace_id)]
    host.runtime.start(spec)
    assert host.findings() == [(FindingKind.PROCESS, workspace_id), (FindingKind.FOLDER, workspace_id)]


def test_files_that_are_gone_are_found(host: Host) -> None:
    host.runtime.remove("stopped")
    assert host.findings() == [(FindingKind.FOLDER, "stopped")]


def test_a_missing_record_is_found(host: Host) -> None:
    host.manager.records.remove("paused")
    assert host.findings() == [(FindingKind.RECORD, "paused")]


def test_a_damaged_record_is_found(host: Host) -> None:
    Path(host.manager.records.folder, "paused/record.json").write_text("{}")
    assert host.findings() == [(FindingKind.RECORD, "paused")]


@pytest.mark.parametrize("workspace_id", ["stopped", "gone", "unknown"])
def test_a_record_of_a_workspace_that_is_not_paused_is_found(host: Host, workspace_id: str) -> None:
    Path(host.manager.records.folder, workspace_id).mkdir()
    assert host.findings() == [(FindingKind.RECORD, workspace_id)]


def test_what_is_no_record_at_all_is_found(host: Host) -> None:
    Path(host.manager.records.folder, "Not an id").mkdir()
    assert host.findings() == [(FindingKind.RECORD, "")]


@pytest.mark.parametrize("field", ["slot", "current_snapshot"])
def test_a_record_that_says_something_else_than_the_catalog_is_found(host: Host, field: str) -> None:
    record = host.manager.records.read("paused")
    changes: dict[str, int | str] = {"slot": 4711, "current_snapshot": host.version("paused").name}
    workspace = replace(record.workspace, **{field: changes[field]})
    host.manager.records.write(replace(record, workspace=workspace))
    (finding,) = check(host.manager)
    assert finding.kind is FindingKind.RECORD
    assert field in finding.detail


def test_a_slot_that_is_free_or_anothers_is_found(host: Host) -> None:
    slot = host.manager.workspace("stopped").slot
    assert slot is not None
    host.manager.slots.release(slot, "stopped")
    assert host.findings() == [(FindingKind.SLOT, "stopped")]
    host.manager.slots.reserve(slot, "running")
    assert host.findings() == [(FindingKind.SLOT, "running"), (FindingKind.SLOT, "stopped")]


@pytest.mark.parametrize("workspace_id", ["stopped", "gone", "unknown"])
def test_a_slot_that_the_catalog_knows_nothing_of_is_found(host: Host, workspace_id: str) -> None:
    host.manager.slots.acquire(workspace_id)
    assert host.findings() == [(FindingKind.SLOT, workspace_id)]


def test_what_was_left_half_made_is_found(host: Host) -> None:
    Path(host.manager.records.folder, "stopped.staging-x").mkdir()
    (host.folder / "runtime/workspaces/running.trash-x").mkdir()
    (host.folder / "runtime/workspaces/unknown.staging-x").mkdir()
    assert host.findings() == [
        (FindingKind.LEFTOVER, "running"),
        (FindingKind.LEFTOVER, "stopped"),
        (FindingKind.LEFTOVER, "unknown"),
    ]


def test_records_that_recovery_moved_aside_are_fine(host: Host) -> None:
    Path(host.manager.records.folder, "old.trash-x").mkdir()
    assert check(host.manager) == []


def test_what_is_here_of_another_hosts_workspace_is_found(host: Host) -> None:
    with host.manager.catalog.transaction() as transaction:
        transaction.update_workspace("stopped", host="there")
    kinds = {kind for kind, _ in host.findings()}
    assert kinds == {FindingKind.FOLDER, FindingKind.UNMANAGED, FindingKind.SLOT}
    assert all("it lives on host 'there'" in finding.detail for finding in check(host.manager))


def test_what_somebody_works_on_is_left_out(host: Host) -> None:
    gate = host.runtime.hold_next("capture")
    thread = threading.Thread(target=host.manager.create_version, args=("running",))
    thread.start()
    try:
        gate.wait_reached(timeout_s=60)
        assert host.manager.workspace("running").operation is not None
        assert check(host.manager) == []
    finally:
        gate.open()
        thread.join()
    assert check(host.manager) == []


def breakages() -> dict[str, Callable[[Host], object]]:
    """Ways to break things that recovery mends."""

    def interrupt(host: Host) -> None:
        with host.manager.catalog.transaction() as transaction:
            transaction.begin_operation("running", Operation(OperationKind.SNAPSHOT, "t", "here", NOW))

    return {
        "operation": interrupt,
        "ended": lambda host: host.runtime.end("running"),
        "runs": lambda host: host.runtime.start(host.manager.workspace("stopped").spec),
        "files": lambda host: host.runtime.create(WorkspaceSpec("paused")),
        "no files": lambda host: host.runtime.remove("stopped"),
        "no record": lambda host: host.manager.records.remove("paused"),
        "slot": lambda host: host.manager.slots.acquire("stopped"),
        "staging": lambda host: Path(host.manager.records.folder, "paused.staging-x").mkdir(),
        "trash": lambda host: (host.folder / "runtime/workspaces/running.trash-x").mkdir(),
    }


@pytest.mark.parametrize("how", breakages())
def test_nothing_is_wrong_after_a_recovery(host: Host, how: str) -> None:
    breakages()[how](host)
    assert check(host.manager) != []
    host.manager.recover()
    assert check(host.manager) == []
