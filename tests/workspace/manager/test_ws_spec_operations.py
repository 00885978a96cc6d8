"""What holds for all operations: events, what readers see, names, deadlines, locks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from manager_hosts import Host, HostFactory

from snaploader._environment import HostEnvironment
from snaploader.errors import DeadlineExceeded, NotFound
from snaploader.testing import FakeCAS
from snaploader.workspace.lifecycle import LifecycleExecutor
from snaploader.workspace.model import Scope, SnapshotSource, Workspace, WorkspaceState, pin_name
from snaploader.workspace.policy import Transition


@pytest.fixture
def ready(host: Host) -> Host:
    """A host with a workspace that runs, has a version and a commit, and one that is paused."""
    host.create()
    host.write("data/a", "content")
    host.manager.create_version("one")
    host.manager.commit("one")
    host.create("parked")
    host.manager.pause("parked")
    host.clock.advance(minutes=1)
    return host


Act = Callable[[Host], object]
OPERATIONS: dict[str, tuple[str, Act]] = {
    "snapshot_create": ("one", lambda host: host.manager.create_snapshot("one", "a name")),
    "version_create": ("one", lambda host: host.manager.create_version("one")),
    "version_rollback": ("one", lambda host: host.manager.rollback("one", 1, keep_current=True)),
    "workspace_pause": ("one", lambda host: host.manager.pause("one")),
    "workspace_resume": ("parked", lambda host: host.manager.resume("parked")),
    "workspace_commit": ("one", lambda host: host.manager.commit("one")),
    "workspace_stop": ("one", lambda host: host.manager.stop("one")),
    "workspace_delete": ("one", lambda host: host.manager.delete("one")),
    "workspace_create": ("new", lambda host: host.create("new")),
    "workspace_fork": ("new", lambda host: host.manager.fork("one", "new")),
}


@pytest.mark.parametrize(
    ("event", "workspace_id", "act"), [(key, *value) for key, value in OPERATIONS.items()]
)
def test_every_operation_leaves_one_event_with_id_workspace_type_payload_and_time(
    ready: Host, event: str, workspace_id: str, act: Act
) -> None:
    before = ready.manager.events()
    act(ready)
    [left] = ready.manager.events()[len(before) :]
    assert (left.workspace_id, left.type, left.created_at) == (workspace_id, event, ready.clock.now)
    assert left.id > before[-1].id
    assert isinstance(left.payload, dict)


def test_starting_leaves_an_event_too(ready: Host) -> None:
    ready.manager.stop("one")
    ready.manager.start("one")
    assert ready.events()[-2:] == ["workspace_stop", "workspace_start"]


def seen(host: Host, workspace_id: str) -> tuple[Any, ...]:
    """All that a reader sees of a workspace, but for what is under way."""
    manager = host.manager
    try:
        workspace = replace(manager.workspace(workspace_id), operation=None)
    except NotFound:
        return ()
    known = [
        (info.runtime_name, info.is_managed, info.version) for info in manager.list_snapshots(workspace_id)
    ]
    with host.catalog.reading() as reader:
        runs = reader.runs(workspace_id)
    return (
        *(workspace, known, manager.list_versions(workspace_id), manager.events(workspace_id), runs),
        workspace_id in {each.id for each in manager.workspaces()},
    )


@pytest.mark.parametrize(
    ("event", "workspace_id", "act"),
    [(event, *operation) for event, operation in OPERATIONS.items() if operation[0] != "new"],
)
def test_a_reader_sees_an_operation_not_at_all_or_as_a_whole(
    ready: Host, event: str, workspace_id: str, act: Act
) -> None:
    steps: list[tuple[str, tuple[Any, ...]]] = []
    before = seen(ready, workspace_id)

    def look(step: str) -> None:
        steps.append((step.partition(".")[2], seen(ready, workspace_id)))

    object.__setattr__(ready.manager._services, "environment", HostEnvironment(after_step=look))
    act(ready)
    after = seen(ready, workspace_id)
    assert before != after
    recorded = [step for step, _ in steps].index("recorded")
    assert recorded >= 2
    assert [state for _, state in steps[:recorded]] == [before] * recorded
    assert [state for _, state in steps[recorded:]] == [after] * (len(steps) - recorded)


# What snapshots there are


@pytest.mark.parametrize("at", [1, 2])
def test_a_snapshot_taken_while_they_are_listed_is_never_shown_as_unmanaged(
    ready: Host, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    content = type(ready.manager._services.content)
    pinned_names, calls = content.pinned_names, []

    def pinned_meanwhile(self: Any, workspace_id: str) -> list[str]:
        calls.append(workspace_id)
        if len(calls) == at:
            ready.manager.pause("one")
            ready.manager.resume("one")
            ready.manager.create_version("one")
        return pinned_names(self, workspace_id)

    ready.cache.pin(pin_name("one.lost"))
    monkeypatch.setattr(content, "pinned_names", pinned_meanwhile)
    infos = ready.manager.list_snapshots("one")
    unmanaged = [info.runtime_name for info in infos if not info.is_managed]
    assert unmanaged == ["workspaces/one/one.lost"]
    assert len(calls) == 2


def test_a_snapshot_that_goes_while_they_are_listed_is_not_shown_as_unmanaged(
    ready: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.manager.pause("one")
    ready.manager.resume("one")
    reading = type(ready.catalog).reading

    def reading_meanwhile(self: Any) -> Any:
        monkeypatch.undo()
        ready.manager.create_version("one")  # takes the place of the pause
        return reading(self)

    monkeypatch.setattr(type(ready.catalog), "reading", reading_meanwhile)
    assert all(info.is_managed for info in ready.manager.list_snapshots("one"))


def test_what_is_not_on_this_host_is_listed_and_marked_so(make_host: HostFactory) -> None:
    home, other = make_host("host-a"), make_host("host-b")
    home.create()
    home.write("data/a", "content")
    home.manager.create_version("one")
    home.manager.commit("one")
    assert [(info.is_managed, info.is_local) for info in home.manager.list_snapshots("one")] == [
        (True, True)
    ] * 2
    assert [(info.is_managed, info.is_local) for info in other.manager.list_snapshots("one")] == [
        (True, False)
    ] * 2


# Versions


def test_what_is_captured_is_what_the_workspace_continues_on(
    ready: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    continued: list[tuple[str, str]] = []
    monkeypatch.setattr(
        ready.runtime, "continue_on", lambda spec, name: continued.append((spec.workspace_id, name))
    )
    result = ready.manager.create_version("one")
    assert continued == [("one", result.runtime_name)]


def test_a_version_holds_everything_and_is_found_by_its_number(ready: Host) -> None:
    result = ready.manager.create_version("one")
    assert (result.scope, result.version, result.display_name) == (Scope.FULL, 2, "Version 2")
    assert ready.manager.version_snapshot_name("one", 2) == result.runtime_name
    assert ready.manager.list_versions("one")[1].source is SnapshotSource.PRE_EXEC
    for workspace_id, number in (("one", 3), ("nobody", 1)):
        with pytest.raises(NotFound, match=f"'{workspace_id}'"):
            ready.manager.version_snapshot_name(workspace_id, number)


# Deadlines, locks


@pytest.mark.parametrize(
    ("workspace_id", "act"),
    [
        ("parked", lambda host: host.manager.resume("parked")),
        ("new", lambda host: host.manager.fork("one", "new")),
        ("new", lambda host: host.create("new")),
    ],
    ids=["resume", "fork", "create"],
)
def test_whatever_starts_a_workspace_gives_it_a_deadline(
    ready: Host, workspace_id: str, act: Callable[[Host], Workspace]
) -> None:
    ready.follow(autostop_after=timedelta(hours=2))
    act(ready)
    with ready.catalog.reading() as reader:
        run = reader.latest_run(workspace_id)
    assert run is not None
    assert run.deadline == ready.clock.now + timedelta(hours=2)


def test_an_operation_waits_for_a_host_that_has_the_lock_in_the_database(
    make_host: HostFactory, database: str
) -> None:
    if database == "sqlite":
        pytest.skip("SQLite is for one host, whose own lock is enough")
    host, other = make_host("host-a", lock_timeout_s=0.02), make_host("host-b")
    host.create()
    with other.catalog.lock("one", wait_s=0) as held:
        assert held
        with pytest.raises(DeadlineExceeded, match="another host"):
            host.manager.create_version("one")
        with host.manager.try_hold("one") as held_too:
            assert held_too is None
        assert host.manager.recover().busy == ("one",)
    assert host.manager.create_version("one").version == 1


# Deleting


def test_what_the_lifecycle_deletes_is_gone_here_and_from_the_remote_cache(
    ready: Host, remote: FakeCAS
) -> None:
    first, second = (
        ready.manager.commit("one").runtime_name,
        ready.manager.commit("one").runtime_name,
    )
    ready.manager.create_version("one")  # both commits may be evicted here from now on
    for runtime_name in (first, second):
        ready.loader.get_snapshot_by_id(runtime_name, read_policy="newest")
    ready.follow(time_until_dormant=timedelta(hours=1), delete_after_dormant=timedelta(hours=1))
    ready.manager.delete("parked")
    with LifecycleExecutor(ready.manager, clock=ready.clock) as lifecycle:
        for expected in (Transition.DORMANCY, Transition.DELETE):
            ready.clock.advance(hours=1, minutes=1)
            stats = lifecycle.run_once()
            assert (dict(stats.transitions), dict(stats.errors)) == ({"one": expected}, {})
    assert ready.manager.workspace("one").state is WorkspaceState.DELETED
    assert ready.cache.pins() == []
    assert ready.cache.refs() == []
    for runtime_name in (first, second):
        with pytest.raises(NotFound):
            ready.loader.get_snapshot_by_id(runtime_name, read_policy="newest")
    assert all("Tombstone" in str(result) for result in remote.action_results.values())
    assert ready.findings() == []
