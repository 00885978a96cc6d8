"""What the catalog does not know: snapshots are listed and marked so, workspaces that run are adopted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import DATA, START, Host, HostFactory

from snaploader import SnapshotKey, VMConfiguration, VMMetadata
from snaploader.context import CallContext, current
from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from snaploader.testing import FakeCAS
from snaploader.workspace.host import SlotPool
from snaploader.workspace.model import (
    Resources,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotInfo,
    SnapshotKind,
    WorkspaceState,
    pin_name,
)
from snaploader.workspace.runtime import RuntimeStatus


def lose(host: Host, workspace_id: str = "one") -> None:
    """Let the catalog know nothing of a workspace any more."""
    with host.catalog.transaction() as tx:
        tx.forget_workspace(workspace_id)


def unmanaged(host: Host) -> list[SnapshotInfo]:
    return [info for info in host.manager.list_snapshots("one") if not info.is_managed]


# Snapshots


def save(
    host: Host,
    snapshot_id: str,
    vm_id: str = "one",
    *,
    said: str = "",
    properties: dict[str, str] | None = None,
    **how: Any,
) -> None:
    """Save a snapshot with the loader, as any program may; `said` is the id that it says it has."""
    file = host.folder / "file"
    file.write_text(snapshot_id)
    metadata = VMMetadata(vm_id=vm_id, snapshot_id=said or snapshot_id, properties=properties)
    host.loader.cache_snapshot(
        SnapshotKey(instance_name=how.pop("instance_name", "")),
        files={"file": file},
        vm_configuration=VMConfiguration(),
        vm_metadata=metadata,
        snapshot_id=snapshot_id,
        remote=False,
        **how,
    )


def test_a_snapshot_that_a_program_took_of_the_workspace_is_listed(host: Host) -> None:
    host.create()
    managed = host.manager.create_version("one")
    save(host, "nightly/7")
    save(host, "of another", vm_id="one-more")
    save(host, "of another instance", instance_name="elsewhere")
    infos = host.manager.list_snapshots("one")
    assert [(info.runtime_name, info.is_managed, info.is_local) for info in infos] == [
        (managed.runtime_name, True, True),
        ("nightly/7", False, True),
    ]
    assert (infos[1].record, infos[1].told, infos[1].version) == (None, None, None)


def test_a_snapshot_that_the_catalog_lost_tells_what_it_is(host: Host) -> None:
    host.create()
    taken = host.manager.create_snapshot("one", "before", "nightly")
    with host.catalog.transaction() as tx:
        before = tx.snapshot(taken.snapshot_name)
        tx.update_workspace("one", current_snapshot="")
        tx.remove_snapshot(taken.snapshot_name)
    [info] = unmanaged(host)
    told = info.told
    assert told is not None
    assert (info.display_name, told.source, told.scope) == ("before", "nightly", Scope.FULL)
    assert (told.name, told.kind, told.created_at) == (taken.snapshot_name, SnapshotKind.VERSION, START)
    assert told.manifest_ref == before.manifest_ref


def test_one_without_its_pin_is_listed_until_it_is_evicted(host: Host) -> None:
    host.create()
    taken = host.manager.create_version("one")
    with host.catalog.transaction() as tx:
        tx.update_workspace("one", current_snapshot="")
        ref = tx.snapshot(taken.snapshot_name).manifest_ref
        tx.remove_snapshot(taken.snapshot_name)
    host.cache.unpin(pin_name(taken.snapshot_name))
    assert [info.runtime_name for info in unmanaged(host)] == [taken.runtime_name]
    host.cache.delete_ref(ref)
    assert unmanaged(host) == []


def test_one_of_which_only_the_pin_is_left_is_listed_as_not_here(host: Host) -> None:
    host.create()
    host.cache.pin(pin_name("one.lost"))
    assert unmanaged(host) == [SnapshotInfo("workspaces/one/one.lost", is_managed=False, is_local=False)]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_manifest_that_says_what_no_snapshot_can_be_called_is_passed_over(host: Host, name: str) -> None:
    host.create()
    save(host, "nightly/7", said=name)
    assert unmanaged(host) == []


@pytest.mark.parametrize(
    "said",
    [
        {"kind": "other"},
        {"scope": ""},
        {"source": "a\nb"},
        {"display_name": "x" * 201},
        {"parent": "x" * 300},
    ],
)
def test_what_cannot_be_a_record_tells_nothing_and_is_not_adopted(host: Host, said: dict[str, str]) -> None:
    host.create()
    taken = host.manager.create_version("one")
    properties = {"kind": "version", "scope": "Full", "source": "manual", "display_name": "", "parent": ""}
    name = taken.runtime_name[:-1] + "x"
    save(host, name, properties={**properties, **said}, pin=pin_name(name.rpartition("/")[2]))
    [info] = unmanaged(host)
    assert (info.runtime_name, info.told) == (name, None)
    lose(host)
    host.manager.adopt("one", volumes=[DATA])
    managed = [info.runtime_name for info in host.manager.list_snapshots("one") if info.is_managed]
    assert managed == [taken.runtime_name]


def test_what_the_runtime_keeps_is_told_of_managed_and_unmanaged_ones(host: Host) -> None:
    host.create()
    first = host.manager.create_version("one").runtime_name
    second = host.manager.create_version("one").runtime_name
    host.runtime.kept["one"] = (first, "layer-7")
    infos = host.manager.list_snapshots("one")
    assert [(info.runtime_name, info.is_managed, info.is_local, info.is_in_runtime) for info in infos] == [
        (first, True, True, True),
        (second, True, True, False),
        ("layer-7", False, False, True),
    ]


def test_who_does_not_ask_for_unmanaged_ones_reads_no_manifest(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    managed = host.manager.create_version("one").runtime_name
    save(host, "nightly/7")
    host.runtime.kept["one"] = (managed, "layer-7")

    def refs(*_: object) -> list[str]:
        raise AssertionError("all manifests were looked at")

    monkeypatch.setattr(host.cache, "refs", refs)
    [info] = host.manager.list_snapshots("one", unmanaged=False)
    assert (info.runtime_name, info.is_in_runtime) == (managed, True)


def test_listing_uses_nothing_up(host: Host) -> None:
    host.create()
    save(host, "nightly/7")
    for entry in host.cache.entries():
        [path] = Path(host.cache.root).rglob(entry.key[2:])
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    assert len(unmanaged(host)) == 1
    assert {entry.last_used_s for entry in host.cache.entries()} == {10**9}


@pytest.mark.parametrize(
    "ask",
    [
        lambda host: host.manager.list_snapshots("one"),
        lambda host: host.manager.sizes(),
        lambda host: host.manager.orphaned_uploads(),
        lambda host: host.findings(),
    ],
    ids=["list_snapshots", "sizes", "orphaned_uploads", "check"],
)
def test_the_loader_is_asked_as_its_own_caller_and_not_as_that_of_the_manager(
    host: Host, remote: FakeCAS, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Host], object]
) -> None:
    def refuse(*_: object) -> None:
        raise Unavailable("no route")

    with CallContext(group_id="other").use():
        host.create()
        host.write("data/a", "precious" * 1000)
        host.manager.create_version("one")
        with monkeypatch.context() as patch, pytest.raises(Unavailable):
            patch.setattr(remote, "update_action_result", refuse)
            host.manager.commit("one")
    save(host, "nightly/7")
    expected = ask(host)
    with CallContext(group_id="other").use():
        assert ask(host) == expected


def test_a_recovery_asks_as_the_caller_of_the_loader_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, status = [], host.runtime.status

    def looked(workspace_id: str) -> RuntimeStatus:
        asked.append(current().group_id)
        return status(workspace_id)

    host.create()
    monkeypatch.setattr(host.runtime, "status", looked)
    with CallContext(group_id="other").use():
        host.manager.recover()
    assert set(asked) == {None}


# Workspaces


def test_a_workspace_that_runs_is_adopted_as_it_is(host: Host) -> None:
    made = host.create(command=["serve"])
    host.write("data/a", "precious")
    lose(host)
    host.calls()
    host.clock.advance(hours=1)
    adopted = host.manager.adopt(
        "one",
        command=["serve"],
        volumes=[DATA],
        resources=Resources(vcpus=2),
        labels={"team": "web"},
        owner="ann",
        base="debian",
    )
    assert not {"create", "start", "stop", "place", "capture", "remove"} & set(host.calls())
    assert (adopted.state, adopted.slot, adopted.host) == (WorkspaceState.RUNNING, made.slot, "host-a")
    assert (adopted.owner, adopted.base, adopted.spec.labels) == ("ann", "debian", {"team": "web"})
    assert adopted.created_at == adopted.last_used_at == host.clock.now
    assert host.manager.workspace("one") == adopted
    assert host.events() == ["workspace_adopt"]
    assert (host.findings(), host.leftovers()) == ([], [])
    host.manager.create_version("one")
    host.write("data/a", "changed")
    host.manager.rollback("one", 1)
    assert host.read("data/a") == "precious"
    assert host.is_running()


def test_a_workspace_that_does_not_run_is_adopted_as_stopped(host: Host) -> None:
    host.create(start=False)
    lose(host)
    assert host.manager.adopt("one", volumes=[DATA]).state is WorkspaceState.STOPPED
    with host.catalog.reading() as reader:
        assert reader.latest_run("one") is None
    host.manager.start("one")
    assert host.findings() == []


def test_what_runs_gets_its_deadline_by_its_policy(host: Host) -> None:
    host.create()
    lose(host)
    host.manager.change_policy("short", {"autostopAfterSeconds": 60})
    host.manager.adopt("one", policy="short")
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert run.deadline is not None
    assert (run.transition, run.status) == (RunTransition.START, RunStatus.SUCCEEDED)
    assert (run.deadline - host.clock.now).total_seconds() == 60


def test_its_snapshots_are_taken_in_with_it(host: Host, remote: FakeCAS) -> None:
    (host.folder / "template/data").mkdir(parents=True)
    (host.folder / "template/rest").write_text("rest")
    base = host.create(source=host.folder / "template").base_snapshot
    for name in ("first", ""):
        host.write("data/a", name)
        host.clock.advance(seconds=1)
        host.manager.create_snapshot("one", name, "nightly", scope=Scope.DATA)
    host.clock.advance(seconds=1)
    commit = host.manager.commit("one", "golden").snapshot_name
    before = [info.record for info in host.manager.list_snapshots("one")]
    lose(host)
    host.manager.adopt("one", volumes=[DATA])
    infos = host.manager.list_snapshots("one")
    sizes = [0 if info.record is None else info.record.size_bytes for info in infos]
    assert all(sizes)
    # A manifest does not tell what of its blobs is content.
    same_size = [each and replace(each, size_bytes=size) for each, size in zip(before, sizes, strict=True)]
    assert [info.record for info in infos] == same_size
    assert [(info.version, info.display_name) for info in infos] == [
        (None, ""),
        (1, "first"),
        (2, "Version 2"),
        (None, "golden"),
    ]
    workspace = host.manager.workspace("one")
    assert (workspace.base_snapshot, workspace.current_snapshot) == (base, commit)
    host.manager.rollback("one", 1)
    assert (host.read("data/a"), host.read("rest")) == ("first", "rest")
    host.manager.fork("one", "two")
    assert host.manager.create_version("one").version == 3
    host.manager.delete("one")
    assert (host.findings(), host.leftovers(), remote is host.remote) == ([], [], True)


def test_versions_of_one_tick_keep_their_order(host: Host) -> None:
    host.create()
    taken = [host.manager.create_version("one").snapshot_name for _ in range(6)]
    lose(host)
    host.manager.adopt("one", volumes=[DATA])
    assert [version.snapshot_name for version in host.manager.list_versions("one")] == taken
    assert host.manager.workspace("one").current_snapshot == taken[-1]


def test_what_is_not_whole_and_what_was_a_pause_stays_out(host: Host) -> None:
    host.create()
    broken = host.manager.create_version("one")
    host.manager.pause("one")
    host.manager.resume("one")
    kept = host.manager.create_version("one")
    with host.catalog.reading() as reader:
        ref = reader.snapshot(broken.snapshot_name).manifest_ref
    host.cache.delete_ref(ref)
    lose(host)
    host.manager.adopt("one", volumes=[DATA])
    managed = [each.record.name for each in host.manager.list_snapshots("one") if each.record is not None]
    assert managed == [kept.snapshot_name]
    assert [info.runtime_name for info in unmanaged(host)] == [broken.runtime_name]


def test_what_the_catalog_knows_is_not_adopted(host: Host, make_host: HostFactory) -> None:
    host.create()
    with pytest.raises(FailedPrecondition, match="the catalog knows it, as running on host 'host-a'"):
        host.manager.adopt("one")
    host.manager.delete("one")
    with pytest.raises(FailedPrecondition, match="the catalog knows it, as deleted"):
        host.manager.adopt("one")
    assert make_host("host-b").manager.workspaces() == []


def test_a_paused_one_is_left_to_recovery(host: Host) -> None:
    host.create()
    host.manager.pause("one")
    lose(host)
    with pytest.raises(FailedPrecondition, match="Let `recover` take it back"):
        host.manager.adopt("one")
    assert host.manager.recover().adopted == ("one",)


@pytest.mark.parametrize(
    ("error", "workspace_id", "how"),
    [
        (NotFound, "nothing", {}),
        (NotFound, "one", {"policy": "nothing"}),
        (InvalidArgument, "", {}),
        (InvalidArgument, "A B", {}),
        (InvalidArgument, "one", {"labels": {"": ""}}),
        (InvalidArgument, "one", {"autostart_schedule": "soon"}),
        (TypeError, "one", {"command": "serve"}),
        (TypeError, "one", {"comand": ["serve"]}),
    ],
)
def test_an_adoption_that_is_refused_changes_nothing(
    host: Host, error: type[Exception], workspace_id: str, how: dict[str, Any]
) -> None:
    host.create()
    lose(host)
    host.manager.slots.release(0, "one")
    before = host.cache.pins()
    with pytest.raises(error):
        host.manager.adopt(workspace_id, **how)
    assert host.is_running()
    assert (host.manager.workspaces(), host.manager.slots.owners()) == ([], {})
    assert host.cache.pins() == before
    assert host.manager.adopt("one").slot == 0


def test_it_needs_a_slot(make_host: HostFactory, tmp_path: Any) -> None:
    host = make_host(slots=SlotPool(tmp_path / "few", 1))
    host.create()
    lose(host)
    host.manager.slots.release(0, "one")
    host.create("two")
    with pytest.raises(ResourceExhausted):
        host.manager.adopt("one")
    host.manager.delete("two")
    host.manager.adopt("one")


def test_a_remote_cache_that_does_not_answer_is_told_and_nothing_is_changed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create()
    host.manager.commit("one")
    lose(host)

    def broken(*_: object) -> None:
        raise Unavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(host.loader.manifests), "remote_entry", broken)
        with pytest.raises(Unavailable):
            host.manager.adopt("one")
    assert host.manager.workspaces() == []
    host.manager.adopt("one")


def test_a_lock_file_of_what_could_not_be_adopted_is_not_left(host: Host) -> None:
    with pytest.raises(NotFound):
        host.manager.adopt("nothing")
    assert host.manager.locks.ids() == []
