"""Recovery at start-up: every sentence of it, and what is on the host against what the catalog says."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host, HostFactory, open_host

from snaploader.errors import FailedPrecondition, ResourceExhausted, Unavailable
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.check import check
from snaploader.workspace.host import HeldLock, SlotPool, WorkspaceLocks
from snaploader.workspace.manager import RecoverySummary
from snaploader.workspace.model import (
    OperationKind,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotStatus,
    WorkspaceState,
)
from snaploader.workspace.records import PausedRecord


def paused_folder(host: Host) -> Path:
    return Path(host.manager.records.folder)


def change_record(host: Host, workspace_id: str, **values: Any) -> None:
    """Change values of a record on disk."""
    file = paused_folder(host) / workspace_id / "record.json"
    content = json.loads(file.read_text())
    content["workspace"].update(values)
    file.write_text(json.dumps(content))


def forget(host: Host, *workspace_ids: str) -> None:
    """Let the catalog lose workspaces."""
    with host.catalog.transaction() as tx:
        for workspace_id in workspace_ids:
            tx.forget_workspace(workspace_id)


def create_paused(host: Host, *workspace_ids: str) -> None:
    for workspace_id in workspace_ids:
        host.create(workspace_id)
        host.write("data/a", f"content of {workspace_id}", workspace_id)
        host.manager.pause(workspace_id)


def nothing_done(summary: RecoverySummary) -> bool:
    return not (summary.repaired or summary.pruned or summary.trashed or summary.problems)


def test_a_host_in_order_is_left_as_it_is(host: Host) -> None:
    create_paused(host, "one")
    host.create("two")
    host.create("three", start=False)
    summary = host.manager.recover()
    assert summary.restored == ("one",)
    assert nothing_done(summary)
    assert host.events("two") == ["workspace_create"]
    assert host.findings() == []


# The folder of paused workspaces


@pytest.mark.parametrize("name", ["one.staging-abc", "one.trash-abc", "no id.trash-1", "x.staging-.trash-"])
def test_stale_staging_and_trash_folders_are_swept(host: Host, name: str) -> None:
    (paused_folder(host) / name).mkdir()
    (paused_folder(host) / name / "record.json").write_text("{}")
    summary = host.manager.recover()
    assert [note.name for note in summary.pruned] == [name]
    assert os.listdir(paused_folder(host)) == []
    assert summary.trashed == ()


def test_what_the_runtime_left_half_made_is_swept_first(host: Host) -> None:
    host.manager.recover()
    assert host.calls()[0] == "sweep"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "record.json").unlink(), "No such file"),
        (lambda folder: (folder / "record.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "record.json").write_text("[" * 100_000), "RecursionError|is damaged"),
        (lambda folder: (folder / "record.json").write_bytes(b"\xff"), "is damaged"),
        (lambda folder: folder.rename(folder.with_name("other")), "is that of workspace 'one'"),
        (lambda folder: folder.rename(folder.with_name("Bad_Id")), "is no workspace id"),
    ],
)
def test_an_unreadable_record_is_renamed_aside_and_swept_by_the_next_start(
    host: Host, damage: Callable[[Path], object], reason: str
) -> None:
    create_paused(host, "one", "two")
    forget(host, "one")
    damage(paused_folder(host) / "one")
    summary = host.manager.recover()
    assert summary.restored == ("two",)
    [note] = summary.trashed
    assert any(each in note.reason for each in reason.split("|"))
    assert [name for name in os.listdir(paused_folder(host)) if name.startswith(f"{note.name}.trash-")]
    assert host.manager.recover().trashed == ()
    assert os.listdir(paused_folder(host)) == ["two"]


def test_a_record_that_cannot_be_read_for_lack_of_descriptors_stays(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_paused(host, "one")

    def fail(workspace_id: str) -> PausedRecord:
        raise ResourceExhausted(f"too many open files to read that of {workspace_id}")

    monkeypatch.setattr(host.manager.records, "read", fail)
    summary = host.manager.recover()
    assert summary.trashed == ()
    assert any("too many open files" in problem.reason for problem in summary.problems)
    assert host.manager.records.entries() == ["one"]


def test_a_record_that_lacks_its_slot_is_trashed(host: Host) -> None:
    create_paused(host, "one")
    forget(host, "one")
    change_record(host, "one", slot=None)
    [note] = host.manager.recover().trashed
    assert note.name == "one"
    assert "lacks its slot" in note.reason


def _file(path: Path) -> None:
    path.write_text("mine")


def _folder_with(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("mine")

    return make


def _record_and_more(path: Path) -> None:
    path.mkdir()
    for name in ("record.json", "notes"):
        (path / name).write_text("mine")


def _link(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "record.json").write_text("mine")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["stray", "Stray", "stray.trash-1", "stray.staging-" + "0" * 32])
@pytest.mark.parametrize(
    "make",
    [_file, _folder_with("notes"), _folder_with("record.json.old"), _record_and_more, _link],
    ids=["file", "folder", "folder with another file", "record and more", "link to a folder"],
)
def test_what_is_no_record_is_told_and_left_where_it_is(
    host: Host, name: str, make: Callable[[Path], None]
) -> None:
    create_paused(host, "one")
    stray = paused_folder(host) / name
    make(stray)
    before = sorted(path for path in stray.rglob("*"))
    for _ in range(2):
        summary = host.manager.recover()
        assert [note.name for note in summary.unknown] == [name]
        assert nothing_done(summary)
        assert summary.restored == ("one",)
    assert sorted(path for path in stray.rglob("*")) == before
    assert sorted(os.listdir(paused_folder(host))) == sorted(["one", name])
    assert [finding.detail for finding in check(host.manager)] == [
        f"{name!r} is no record of a paused workspace"
    ]


def test_an_empty_folder_that_no_workspace_could_have_is_left_where_it_is(host: Host) -> None:
    (paused_folder(host) / "lost+found").mkdir()
    assert [note.name for note in host.manager.recover().unknown] == ["lost+found"]
    assert os.listdir(paused_folder(host)) == ["lost+found"]


def test_nothing_is_lost_of_a_stranger_in_the_place_of_a_record(host: Host) -> None:
    stray = paused_folder(host) / "one"
    host.create("one")
    stray.write_text("mine")
    with pytest.raises(FailedPrecondition, match="no record of a paused workspace: move it away"):
        host.manager.pause("one")
    assert host.is_running("one")
    host.manager.delete("one")
    host.manager.recover()
    assert stray.read_text() == "mine"
    assert host.leftovers() == []


# Slots


def test_the_newest_wins_its_slot_and_the_losers_are_trashed(make_host: HostFactory) -> None:
    host = make_host()
    create_paused(host, "one", "two", "three")
    for number, workspace_id in enumerate(("one", "two", "three")):
        created_at = host.clock.now + timedelta(seconds=[0, 2, 1][number])
        change_record(host, workspace_id, slot=7, created_at=created_at.isoformat())
    forget(host, "one", "two", "three")
    for slot in (0, 1, 2):
        os.unlink(host.folder / "state" / "slots" / str(slot))
    summary = host.manager.recover()
    assert summary.restored == ("two",)
    assert sorted(note.name for note in summary.trashed) == ["one", "three"]
    assert all("slot 7" in note.reason and "'two'" in note.reason for note in summary.trashed)
    assert host.manager.slots.owners() == {7: "two"}
    assert host.manager.workspace("two").slot == 7


def test_the_snapshots_of_a_loser_go_with_its_record_and_not_before(host: Host) -> None:
    create_paused(host, "one", "two")
    host.manager.resume("one")
    host.manager.create_version("one")
    host.manager.pause("one")
    pins = host.cache.pins()
    later = host.clock.now + timedelta(seconds=1)
    change_record(host, "two", slot=0, created_at=later.isoformat())
    forget(host, "one", "two")
    os.unlink(host.folder / "state" / "slots" / "1")
    assert [note.name for note in host.manager.recover().trashed] == ["one"]
    assert host.cache.pins() == pins  # until then the record can be put back by hand
    host.manager.recover()
    assert [pin for pin in host.cache.pins() if pin.startswith("workspace.one.")] == []
    assert [pin for pin in pins if pin.startswith("workspace.two.")] == list(host.cache.pins())
    host.manager.resume("two")
    assert host.read("data/a", "two") == "content of two"
    assert host.findings() == []


@pytest.mark.parametrize("still_here", ["in the catalog", "as a record", "unreadable"])
def test_a_record_that_was_set_aside_takes_nothing_with_it_that_may_be_needed(
    host: Host, still_here: str
) -> None:
    create_paused(host, "one")
    pins = host.cache.pins()
    aside = paused_folder(host) / "one.trash-1"
    shutil.copytree(paused_folder(host) / "one", aside)
    if still_here != "in the catalog":
        forget(host, "one")
    if still_here == "unreadable":
        shutil.rmtree(paused_folder(host) / "one")
        (aside / "record.json").write_text("{")
    assert [note.name for note in host.manager.recover().pruned][:1] == ["one.trash-1"]
    assert host.cache.pins() == pins
    assert not aside.exists()


def test_a_workspace_whose_slot_cannot_be_reserved_is_trashed(make_host: HostFactory) -> None:
    host = make_host()
    create_paused(host, "one")
    host.create("two")
    forget(host, "one")
    change_record(host, "one", slot=1)
    summary = host.manager.recover()
    [note] = summary.trashed
    assert "slot 1 cannot be reserved: workspace 'two' holds it" in note.reason
    assert summary.restored == ()
    assert host.is_running("two")


def test_a_slot_that_the_pool_does_not_have_cannot_be_reserved(
    make_host: HostFactory, tmp_path: Path
) -> None:
    host = make_host()
    create_paused(host, "one")
    forget(host, "one")
    smaller = make_host(slots=SlotPool(tmp_path / "few", 1))
    change_record(host, "one", slot=3)
    [note] = smaller.manager.recover().trashed
    assert "there is no such slot" in note.reason


def test_paused_workspaces_are_locked_one_at_a_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    create_paused(host, "one", "three", "two")
    acquire, held, most = WorkspaceLocks.acquire, [0], [0]

    def counted(*args: Any, **kwargs: Any) -> HeldLock:
        lock = acquire(*args, **kwargs)
        held[0] += 1
        most[0] = max(most[0], held[0])
        return lock

    release = HeldLock.release

    def counted_release(lock: HeldLock) -> None:
        held[0] -= 1
        release(lock)

    monkeypatch.setattr(WorkspaceLocks, "acquire", counted)
    monkeypatch.setattr(HeldLock, "release", counted_release)
    assert host.manager.recover().restored == ("one", "three", "two")
    assert (held, most) == ([0], [1])


def test_a_paused_workspace_that_is_resumed_while_records_are_read_is_left_alone(
    host: Host, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_paused(host, "one", "two")
    other = make_host(runtime=host.runtime)
    read = host.manager.records.read

    def resumed_meanwhile(workspace_id: str) -> PausedRecord:
        if workspace_id == "two" and other.manager.workspace("one").state is WorkspaceState.PAUSED:
            other.manager.resume("one")
        return read(workspace_id)

    monkeypatch.setattr(host.manager.records, "read", resumed_meanwhile)
    summary = host.manager.recover()
    assert (summary.restored, summary.trashed, summary.problems) == (("two",), (), ())
    assert host.is_running("one")


def test_a_slot_of_a_workspace_that_is_gone_is_free_again(host: Host) -> None:
    host.manager.slots.reserve(5, "ghost")
    summary = host.manager.recover()
    assert [note.name for note in summary.pruned] == ["slot 5"]
    assert host.manager.slots.owners() == {}


def test_a_paused_workspace_takes_its_slot_back_from_one_that_is_gone(host: Host) -> None:
    create_paused(host, "one")
    host.manager.slots.release(0, "one")
    host.manager.slots.reserve(0, "ghost")
    assert host.manager.recover().restored == ("one",)
    assert host.manager.slots.owners() == {0: "one"}


def test_a_loser_that_the_catalog_knows_is_stopped_without_a_slot_and_loses_nothing(host: Host) -> None:
    create_paused(host, "one", "two")
    later = host.clock.now + timedelta(seconds=1)
    change_record(host, "two", slot=0, created_at=later.isoformat())
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", slot=5)
        tx.update_workspace("two", slot=0)
    summary = host.manager.recover()
    assert [note.name for note in summary.trashed] == ["one"]
    workspace = host.manager.workspace("one")
    assert workspace.state in {WorkspaceState.STOPPED, WorkspaceState.PAUSED}
    assert host.manager.workspace("two").slot == 0
    if workspace.state is WorkspaceState.STOPPED:
        host.manager.start("one")
    else:
        host.manager.resume("one")
    assert host.read("data/a", "one") == "content of one"
    assert host.manager.workspace("one").slot not in {None, 0}
    assert host.findings() == []


# Restored workspaces


def test_a_restored_workspace_holds_only_its_slot_until_it_is_resumed(host: Host) -> None:
    create_paused(host, "one")
    forget(host, "one")
    os.unlink(host.folder / "state" / "slots" / "0")
    host.calls()
    summary = host.manager.recover()
    assert (summary.restored, summary.adopted) == (("one",), ("one",))
    assert host.manager.workspace("one").state is WorkspaceState.PAUSED
    assert host.manager.slots.owners() == {0: "one"}
    assert host.runtime.workspaces() == []
    assert not {"create", "start", "place", "attach"} & set(host.calls())
    assert host.findings() == []


def test_a_catalog_that_lost_everything_gets_paused_workspaces_back_with_their_history(host: Host) -> None:
    host.follow(Scope.FULL, Scope.DATA, name="gentle")
    host.create("one", policy="gentle", owner="ann", base="debian", command=["serve"])
    host.write("data/a", "first")
    host.manager.create_snapshot("one", "the first")
    host.write("data/a", "second")
    host.manager.create_version("one")
    host.manager.commit("one")
    host.manager.pause("one")
    before = host.manager.workspace("one")
    versions = host.manager.list_versions("one")
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
        tx.remove_policy("gentle")
    summary = host.manager.recover()
    assert summary.adopted == ("one",)
    after = host.manager.workspace("one")
    assert after == before
    kept = [(each.number, each.display_name, each.runtime_name) for each in host.manager.list_versions("one")]
    assert kept == [(each.number, each.display_name, each.runtime_name) for each in versions]
    with host.catalog.reading() as reader:
        assert reader.policy("gentle").scopes.commit_scope is Scope.DATA
    assert host.events() == ["workspace_restore"]
    host.manager.resume("one")
    assert host.read("data/a") == "second"
    host.manager.rollback("one", 1)
    assert host.read("data/a") == "first"
    assert host.manager.create_version("one").version == 3
    assert host.findings() == []


def test_a_record_whose_snapshot_is_not_whole_is_trashed(host: Host) -> None:
    create_paused(host, "one")
    [ref] = host.cache.pinned(host.cache.pins()[0]).refs
    host.cache.delete_ref(ref)
    forget(host, "one")
    [note] = host.manager.recover().trashed
    assert "is not whole" in note.reason
    with pytest.raises(LookupError):
        host.manager.workspace("one")


def test_a_record_with_the_id_of_anothers_snapshot_is_trashed(host: Host) -> None:
    create_paused(host, "one")
    file = paused_folder(host) / "one/record.json"
    content = json.loads(file.read_text())
    content["snapshots"][0]["runtime_name"] = "workspaces/two/" + content["snapshots"][0]["name"]
    file.write_text(json.dumps(content))
    forget(host, "one")
    [note] = host.manager.recover().trashed
    assert "which is another's" in note.reason
    with pytest.raises(LookupError):
        host.manager.workspace("one")


def test_a_record_of_another_workspace_of_that_id_is_trashed_and_written_anew(host: Host) -> None:
    create_paused(host, "one")
    file = paused_folder(host) / "one/record.json"
    right = file.read_text()
    name = json.loads(right)["workspace"]["current_snapshot"]
    file.write_text(right.replace(name, "one.of-another-catalog"))
    summary = host.manager.recover()
    [note] = summary.trashed
    assert note.name == "one"
    assert "the catalog does not know its snapshot 'one.of-another-catalog'" in note.reason
    assert summary.restored == ("one",)
    assert json.loads(file.read_text()) == json.loads(right)
    assert host.findings() == []
    host.manager.recover()
    host.manager.resume("one")
    assert host.read("data/a", "one") == "content of one"


@pytest.mark.parametrize("lost", [{1}, {2}, {3}, {1, 3}, {2, 3}, {1, 2, 3}])
def test_numbers_of_versions_that_were_lost_are_not_given_again(host: Host, lost: set[int]) -> None:
    host.create("one")
    versions = [host.manager.create_version("one") for _ in range(3)]
    host.manager.pause("one")
    for version in versions:
        if version.version in lost:
            host.cache.delete_ref(host.cache.pinned(f"workspace.{version.snapshot_name}").refs[0])
    forget(host, "one")
    assert host.manager.recover().adopted == ("one",)
    kept = [version.number for version in host.manager.list_versions("one")]
    assert kept == [number for number in (1, 2, 3) if number not in lost]
    host.manager.resume("one")
    assert host.manager.create_version("one").version == 4
    host.manager.pause("one")
    forget(host, "one")
    assert host.manager.recover().adopted == ("one",)
    assert [version.number for version in host.manager.list_versions("one")] == [*kept, 4]


def test_a_record_of_a_workspace_that_is_not_paused_any_more_is_removed(host: Host) -> None:
    create_paused(host, "one")
    record = host.manager.records.read("one")
    host.manager.resume("one")
    host.manager.records.write(record)
    summary = host.manager.recover()
    assert [note.reason for note in summary.pruned] == ["a record of it as paused, and it is running"]
    assert host.is_running()
    assert host.findings() == []


def test_a_record_of_a_deleted_workspace_is_removed(host: Host) -> None:
    create_paused(host, "one")
    record = host.manager.records.read("one")
    host.manager.delete("one")
    host.manager.records.write(record)
    host.manager.recover()
    assert host.manager.records.entries() == []
    assert host.findings() == []


def test_a_record_of_a_workspace_of_another_host_is_left_alone_and_reported(make_host: HostFactory) -> None:
    host, other = make_host("host-a"), make_host("host-b")
    create_paused(host, "one")
    shutil.copytree(paused_folder(host) / "one", paused_folder(other) / "one")
    [problem] = other.manager.recover().problems
    assert "host-a" in problem.reason
    assert other.manager.records.entries() == ["one"]


# The catalog against what is there


def test_a_workspace_that_should_run_and_does_not_is_started(host: Host) -> None:
    host.create()
    host.write("data/a", "content")
    host.runtime.end("one")
    summary = host.manager.recover()
    assert [note.name for note in summary.repaired] == ["one"]
    assert host.is_running()
    assert host.read("data/a") == "content"
    assert host.manager.events("one")[-1].payload["reason"] == "recovery"
    assert host.findings() == []


def test_a_workspace_that_should_run_and_has_no_files_is_started_from_its_snapshot(host: Host) -> None:
    host.create()
    host.write("data/a", "content")
    host.manager.create_version("one")
    host.runtime.stop("one")
    host.runtime.remove("one")
    host.manager.recover()
    assert host.is_running()
    assert host.read("data/a") == "content"
    assert host.findings() == []


def test_a_workspace_that_cannot_be_started_is_stopped_with_a_failed_run(host: Host) -> None:
    host.create()
    host.runtime.end("one")
    host.runtime.fail_next("start", FailedPrecondition("no such command"))
    host.manager.recover()
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert (run.transition, run.status) == (RunTransition.START, RunStatus.FAILED)
    assert host.findings() == []


def test_a_workspace_that_should_be_stopped_and_runs_is_stopped(host: Host) -> None:
    workspace = host.create(start=False)
    host.runtime.start(workspace.spec)
    host.manager.recover()
    assert not host.is_running()
    assert host.findings() == []


def test_files_and_processes_of_a_paused_workspace_are_removed(host: Host) -> None:
    create_paused(host, "one")
    spec = host.manager.workspace("one").spec
    host.runtime.create(spec)
    host.runtime.start(spec)
    host.manager.recover()
    assert host.runtime.workspaces() == []
    assert host.findings() == []


def test_files_and_processes_of_a_deleted_workspace_are_removed(host: Host) -> None:
    spec = host.create().spec
    host.manager.delete("one")
    host.runtime.create(spec)
    host.runtime.start(spec)
    host.manager.slots.reserve(3, "one")
    host.manager.recover()
    assert host.runtime.workspaces() == []
    assert host.findings() == []


def test_a_paused_workspace_without_a_record_gets_it_again(host: Host) -> None:
    create_paused(host, "one")
    record = host.manager.records.read("one")
    host.manager.records.remove("one")
    summary = host.manager.recover()
    assert summary.restored == ("one",)
    assert host.manager.records.read("one") == record
    assert host.findings() == []


def test_a_record_that_is_behind_the_catalog_is_written_again(host: Host) -> None:
    create_paused(host, "one")
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", owner="bob")
    host.manager.recover()
    assert host.manager.records.read("one").workspace.owner == "bob"
    assert nothing_done(host.manager.recover())


def test_a_paused_workspace_without_record_and_whole_snapshot_is_stopped(host: Host) -> None:
    create_paused(host, "one")
    host.manager.records.remove("one")
    [ref] = host.cache.pinned(host.cache.pins()[0]).refs
    host.cache.delete_ref(ref)
    summary = host.manager.recover()
    assert summary.restored == ()
    assert host.manager.workspace("one").state is WorkspaceState.STOPPED


def test_a_running_workspace_whose_slot_is_another_s_goes_on_without(host: Host) -> None:
    host.create("one")
    host.create("two")
    host.manager.slots.release(0, "one")
    host.manager.slots.reserve(0, "two")
    host.manager.recover()
    assert host.manager.workspace("one").slot is None
    assert host.is_running("one")
    host.manager.stop("one")
    host.manager.start("one")
    assert host.manager.workspace("one").slot is not None
    assert host.findings() == []


def test_what_the_catalog_does_not_know_is_left_alone(host: Host) -> None:
    spec = host.create().spec
    host.manager.create_version("one")
    forget(host, "one")
    summary = host.manager.recover()
    assert summary.problems == ()
    assert host.runtime.status(spec.workspace_id).is_running
    assert len(host.cache.pins()) == 1


# Interrupted operations


@pytest.mark.parametrize("kind", list(OperationKind))
def test_an_operation_that_nobody_is_at_is_taken_back(host: Host, kind: OperationKind) -> None:
    from snaploader.workspace.manager.operation import new_operation

    host.create("other")
    if kind is OperationKind.RESUME:
        create_paused(host, "one")
    else:
        host.create("one", start=kind is not OperationKind.START)
    with host.catalog.transaction() as tx:
        tx.begin_operation("one", new_operation(host.manager._services, kind))
    summary = host.manager.recover()
    assert summary.repaired[0].reason == f"a {kind} had been interrupted"
    if kind in {OperationKind.CREATE, OperationKind.FORK}:
        assert [each.id for each in host.manager.workspaces()] == ["other"]
    else:
        assert host.manager.workspace("one").operation is None
        assert host.events("one")[-1] == "operation_recovered"
    assert (host.findings(), host.leftovers()) == ([], [])


def test_an_operation_that_is_under_way_is_left_alone(make_host: HostFactory) -> None:
    host, second = make_host(), make_host()
    host.create()
    with host.manager.hold("one"):
        host.runtime.end("one")
        summary = second.manager.recover()
    assert summary.busy == ("one",)
    assert not host.is_running()
    second.manager.recover()
    assert host.is_running()


def test_an_operation_of_another_host_is_left_alone(make_host: HostFactory) -> None:
    host, other = make_host("host-a"), make_host("host-b")
    host.create()
    from snaploader.workspace.manager.operation import new_operation

    with host.catalog.transaction() as tx:
        tx.begin_operation("one", new_operation(host.manager._services, OperationKind.SNAPSHOT))
    assert nothing_done(other.manager.recover())
    assert host.manager.workspace("one").operation is not None


def test_snapshots_on_their_way_out_are_removed(host: Host) -> None:
    host.create()
    host.write("data/a", "content")
    first = host.manager.pause("one").snapshot_name
    host.manager.resume("one")
    host.manager.create_version("one")
    with host.catalog.reading() as reader:
        [version] = reader.snapshots("one")
    with host.catalog.transaction() as tx:
        ghost = replace(
            version,
            name=first,
            runtime_name=f"workspaces/one/{first}",
            status=SnapshotStatus.DELETING,
        )
        tx.put_snapshot(ghost)
    summary = host.manager.recover()
    assert [note.name for note in summary.pruned] == [first]
    assert host.leftovers() == []


def test_a_host_under_another_name_frees_no_slot_and_says_why(host: Host) -> None:
    host.create()
    with open_host(host.folder, host.catalog, None, host="renamed", runtime=host.runtime) as renamed:
        [problem] = renamed.manager.recover().problems
        assert "is that of host 'host-a', and this is host 'renamed'" in problem.reason
        with pytest.raises(FailedPrecondition, match="use that name for this host"):
            renamed.manager.create("two")
    assert host.manager.slots.owners() == {0: "one"}
    assert host.is_running()
    assert host.findings() == []


def test_lock_files_of_workspaces_that_are_gone_are_removed(host: Host) -> None:
    host.create()
    host.manager.stop("one")
    host.manager.locks.acquire("ghost").release()
    host.manager.recover()
    assert host.manager.locks.ids() == ["one"]


# It never raises


def test_one_bad_folder_does_not_stop_the_others(host: Host) -> None:
    create_paused(host, "one", "two", "three")
    forget(host, "one", "two", "three")
    (paused_folder(host) / "two" / "record.json").write_text("no record")
    summary = host.manager.recover()
    assert summary.restored == ("one", "three")
    assert [note.name for note in summary.trashed] == ["two"]


def test_one_workspace_that_fails_does_not_stop_the_others(host: Host) -> None:
    host.create("one")
    host.create("two")
    for workspace_id in ("one", "two"):
        host.runtime.end(workspace_id)
    host.runtime.fail_next("start", ValueError("a bug"))
    summary = host.manager.recover()
    assert [note.name for note in summary.problems] == ["one"]
    assert host.is_running("two")


@pytest.mark.parametrize("method", ["sweep", "workspaces"])
def test_a_runtime_that_fails_is_reported(host: Host, method: str) -> None:
    create_paused(host, "one")
    host.runtime.fail_next(method, Unavailable("broken"))
    summary = host.manager.recover()
    assert [note.reason for note in summary.problems] == ["broken"]
    assert summary.restored == ("one",)


def test_a_catalog_that_fails_is_reported(host: Host, catalog: Catalog) -> None:
    create_paused(host, "one")
    host.catalog.close()
    summary = host.manager.recover()
    assert summary.restored == ()
    assert any("closed" in note.reason for note in summary.problems)
    assert host.manager.records.entries() == ["one"]


def test_the_summary_is_logged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    (paused_folder(host) / "Bad").mkdir()
    with caplog.at_level(logging.INFO, "snaploader.workspace.manager.recovery"):
        summary = host.manager.recover()
    assert str(summary) in caplog.text


def test_a_recovery_done_twice_finds_nothing_more(host: Host) -> None:
    create_paused(host, "one", "two")
    forget(host, "two")
    host.create("three")
    host.runtime.end("three")
    host.manager.recover()
    assert nothing_done(host.manager.recover())
