"""What events say: the names and ids of all that they are about, as the page on workspaces has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host

from snaploader.errors import Unavailable
from snaploader.workspace.lifecycle import LifecycleExecutor
from snaploader.workspace.manager.operation import Work
from snaploader.workspace.model import Event, SnapshotInfo, Version

PAGE = Path(__file__).parents[3] / "docs/workspaces.md"
ITEM = re.compile(r"^- \*\*`(\w+)`\*\*: (.*(?:\n  .*)*)$", re.MULTILINE)


def documented() -> dict[str, set[str]]:
    """The names that the page has for each type of event, beside those of all."""
    section = PAGE.read_text(encoding="utf-8").partition("### Events")[2].partition("\n## ")[0]
    # What stands in parentheses are values.
    return {
        kind: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", names)))
        for kind, names in ITEM.findall(section)
    }


def event_of(host: Host, kind: str) -> Event:
    [*_, event] = host.manager.events(types=[kind])
    return event


def snapshot(host: Host, name: str, workspace_id: str = "one") -> SnapshotInfo:
    [found] = [
        each for each in host.manager.list_snapshots(workspace_id) if each.record and each.record.name == name
    ]
    return found


def version(host: Host, number: int) -> Version:
    return host.manager.list_versions("one")[number - 1]


def told(host: Host, kind: str, **expected: Any) -> None:
    """The last event of that type says this, what all events do, and nothing that the page does not name."""
    payload = dict(event_of(host, kind).payload)
    about = {"workspace": payload["workspace"], "host": "host-a", "owner": "ann", "base": "debian"}
    if host.manager.workspace(about["workspace"]).template_version is not None:
        about["template"] = "debian"
    assert payload == {**about, **expected}
    assert payload["workspace"] == event_of(host, kind).workspace_id
    assert expected.keys() <= documented()[kind] | {"reason"}
    missing = documented()[kind] - payload.keys()
    assert not missing


def runs(host: Host, workspace_id: str = "one") -> int:
    with host.catalog.reading() as reader:
        run = reader.latest_run(workspace_id)
    assert run is not None
    return run.id


@pytest.fixture
def started(host: Host) -> Host:
    """A host with a workspace of which everything is set."""
    (host.folder / "template/data").mkdir(parents=True)
    host.create(owner="ann", base="debian", source=host.folder / "template")
    return host


def about(host: Host, name: str, workspace_id: str = "one") -> dict[str, Any]:
    record = snapshot(host, name, workspace_id).record
    assert record is not None
    return {"snapshot": name, "runtime_name": record.runtime_name, "scope": record.scope.value}


def test_a_creation(started: Host) -> None:
    base = started.manager.workspace("one").base_snapshot
    told(started, "workspace_create", policy="default", run=runs(started), **about(started, base))


def test_a_creation_without_content_or_start_says_less(host: Host) -> None:
    host.create(start=False)
    expected = {"workspace": "one", "host": "host-a", "policy": "default"}
    assert event_of(host, "workspace_create").payload == expected


def test_an_adoption(started: Host) -> None:
    started.manager.create_version("one")
    current = about(started, started.manager.workspace("one").current_snapshot)
    with started.catalog.transaction() as tx:
        tx.forget_workspace("one")
    started.manager.adopt("one", owner="ann", base="debian")
    told(
        started,
        "workspace_adopt",
        **current,
        policy="default",
        slot=0,
        state="running",
        snapshots=2,
        versions=1,
        run=runs(started),
    )


def test_a_fork(started: Host) -> None:
    origin = started.manager.commit("one").snapshot_name
    fork = started.manager.fork("one", "two")
    told(
        started,
        "workspace_fork",
        origin=origin,
        origin_workspace="one",
        origin_runtime_name=f"workspaces/one/{origin}",
        policy="default",
        run=runs(started, "two"),
        **about(started, fork.base_snapshot, "two"),
    )


@pytest.mark.parametrize(
    ("kind", "take", "source", "name"),
    [
        (
            "snapshot_create",
            lambda host: host.manager.create_snapshot("one", "first", "nightly"),
            *("nightly", "first"),
        ),
        ("version_create", lambda host: host.manager.create_version("one"), *("pre_exec", "Version 1")),
    ],
)
def test_a_version(started: Host, kind: str, take: Callable[[Host], Any], source: str, name: str) -> None:
    taken = take(started)
    told(
        started,
        kind,
        **about(started, taken.snapshot_name),
        source=source,
        version=1,
        version_id=version(started, 1).id,
        display_name=name,
    )


def test_a_rollback(started: Host) -> None:
    first = started.manager.create_snapshot("one", "first").snapshot_name
    started.manager.rollback("one", 1, keep_current=True)
    kept = version(started, 2)
    told(
        started,
        "version_rollback",
        **about(started, first),
        source="manual",
        version=1,
        version_id=version(started, 1).id,
        display_name="first",
        kept_snapshot=kept.snapshot_name,
        kept_runtime_name=kept.runtime_name,
        kept_version=2,
    )


def test_a_pause_and_a_resume(started: Host) -> None:
    paused = about(started, started.manager.pause("one").snapshot_name)
    told(started, "workspace_pause", **paused, run=runs(started))
    started.manager.resume("one")
    told(started, "workspace_resume", **paused, run=runs(started))


def test_a_commit(started: Host) -> None:
    name = started.manager.commit("one", "golden").snapshot_name
    told(started, "workspace_commit", **about(started, name), display_name="golden")


def test_a_stop_and_a_start(started: Host) -> None:
    started.manager.stop("one")
    told(started, "workspace_stop", run=runs(started))
    started.manager.start("one")
    told(started, "workspace_start", run=runs(started))


def test_a_deletion_and_the_commits_that_it_leaves(started: Host) -> None:
    started.manager.create_version("one")
    commit = about(started, started.manager.commit("one").snapshot_name)
    started.manager.delete("one", forget_remote=True)
    told(started, "workspace_delete", snapshots=3, commits=1, run=runs(started))
    told(started, "remote_orphan", **commit)


def test_dormancy(started: Host) -> None:
    started.manager.change_policy("default", {"timeUntilDormantSeconds": 60, "deleteAfterDormantSeconds": 60})
    tick = started.clock.advance(hours=1)
    with LifecycleExecutor(started.manager, clock=started.clock) as executor:
        executor.run_once(tick)
    deleting_at = (tick + timedelta(seconds=60)).isoformat()
    told(started, "dormancy_mark", deleting_at=deleting_at, policy="default")
    assert event_of(started, "workspace_stop").payload["reason"] == "dormancy"


def test_a_change(started: Host) -> None:
    started.manager.change_policy("gentle", {})
    started.manager.templates.add_version("debian")
    started.manager.create("two", template="debian", owner="ann")
    now = {"owner": "ann", "policy": "gentle", "autostart_schedule": "0 9 * * *", "automatic_updates": True}
    started.manager.change("two", ttl=timedelta(hours=1), **now)  # type: ignore[arg-type]
    was = {"owner": "ann", "policy": "default", "autostart_schedule": "", "automatic_updates": False}
    told(started, "workspace_change", **now, ttl_s=3600, before={**was, "ttl_s": None})


def test_an_update_to_another_version_of_the_template(started: Host) -> None:
    for _ in range(2):
        started.manager.templates.add_version("debian")
    started.manager.create("two", template="debian", template_version=1, owner="ann")
    started.manager.stop("two")
    started.manager.start("two", update=True)
    told(started, "workspace_update", from_version=1, to_version=2)


def test_a_deadline_that_is_moved(started: Host) -> None:
    started.manager.change("one", ttl=timedelta(hours=1))
    started.manager.stop("one")
    started.manager.start("one")
    before = started.clock.now + timedelta(hours=1)
    deadline = started.manager.extend("one", timedelta(hours=1))
    told(
        started,
        "deadline_extend",
        deadline=deadline.isoformat(),
        before=before.isoformat(),
        run=runs(started),
    )


def test_an_operation_that_failed(started: Host) -> None:
    started.manager.create_version("one")
    [target] = [each.snapshot_name for each in started.manager.list_versions("one")]
    started.runtime.fail_next("place", Unavailable("broken"))
    with pytest.raises(Unavailable):
        started.manager.rollback("one", 1)
    told(started, "operation_failed", operation="rollback", error="broken", snapshot=target, version=1)


def test_an_operation_that_was_interrupted(started: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    started.manager.create_version("one")
    [target] = [each.snapshot_name for each in started.manager.list_versions("one")]
    with monkeypatch.context() as patch:
        patch.setattr(Work, "__exit__", lambda *_: None)
        started.runtime.fail_next("place", Unavailable("killed"))
        with pytest.raises(Unavailable):
            started.manager.rollback("one", 1)
    started.manager.recover()
    told(
        started,
        "operation_recovered",
        operation="rollback",
        outcome="undone",
        reason="recovery",
        snapshot=target,
        version=1,
    )


def test_a_restoration(started: Host) -> None:
    name = started.manager.pause("one").snapshot_name
    with started.catalog.transaction() as tx:
        tx.forget_workspace("one")
    started.manager.recover()
    told(started, "workspace_restore", **about(started, name), policy="default", slot=0)
