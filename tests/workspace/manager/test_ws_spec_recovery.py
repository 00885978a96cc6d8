"""Recovery whatever lies in the folder of paused workspaces: it is set aside, and the others come back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host, HostFactory

from snaploader.errors import Unavailable
from snaploader.workspace.host import HeldLock

REMOVED = object()


@pytest.fixture
def parked(host: Host) -> Host:
    """A host whose catalog has lost three paused workspaces."""
    for workspace_id in ("one", "two", "three"):
        host.create(workspace_id)
        host.write("data/a", workspace_id, workspace_id)
        host.manager.pause(workspace_id)
    with host.catalog.transaction() as tx:
        for workspace_id in ("one", "two", "three"):
            tx.forget_workspace(workspace_id)
    return host


def folder_of(host: Host) -> Path:
    return Path(host.manager.records.folder)


def change(host: Host, workspace_id: str, name: str, value: object) -> None:
    """Change or remove a value of a record on disk."""
    file = folder_of(host) / workspace_id / "record.json"
    content = json.loads(file.read_text())
    if value is REMOVED:
        del content["workspace"][name]
    else:
        content["workspace"][name] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slot", REMOVED),
        ("slot", None),
        ("slot", "0"),
        ("slot", -1),
        ("slot", True),
        ("slot", 1 << 70),
        ("owner", "a\0b"),
        ("owner", "\ud800"),
        ("base", "x" * 100_000),
        ("created_at", REMOVED),
        ("created_at", "0001-01-01T00:00:00+14:00"),
        ("last_used_at", "9999-12-31T23:59:59-14:00"),
        ("readiness", {"kind": "none", "target": "", "interval_s": 10**400, "timeout_s": 1}),
    ],
)
def test_a_record_with_an_impossible_value_is_trashed_and_the_others_come_back(
    parked: Host, name: str, value: object
) -> None:
    change(parked, "two", name, value)
    summary = parked.manager.recover()
    assert summary.restored == ("one", "three")
    assert [note.name for note in summary.trashed] == ["two"]
    assert summary.problems == ()
    assert "two" not in parked.manager.slots.owners().values()


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", "ü".encode() * 127, "\N{DROMEDARY CAMEL}".encode() * 63, b"x" * 255, b"two words"],
    ids=["no text", "of two bytes each", "of four bytes each", "the longest", "a space"],
)
def test_a_folder_with_any_name_is_trashed_and_swept_by_the_next_start(parked: Host, name: bytes) -> None:
    folder = os.fsencode(folder_of(parked))
    os.mkdir(folder + b"/" + name)
    with open(folder + b"/" + name + b"/record.json", "x"):
        pass
    summary = parked.manager.recover()
    assert len(summary.restored) == 3
    assert [note.name for note in summary.trashed] == [os.fsdecode(name)]
    assert summary.problems == ()
    [aside] = [each for each in os.listdir(folder) if b".trash-" in each]
    assert aside.startswith(name[:200] + b".trash-")
    parked.manager.recover()
    assert sorted(os.listdir(folder)) == [b"one", b"three", b"two"]


@pytest.mark.timeout(30)
def test_a_record_that_is_a_pipe_is_trashed_and_holds_nothing_up(parked: Host) -> None:
    record = folder_of(parked) / "one/record.json"
    record.unlink()
    os.mkfifo(record)
    summary = parked.manager.recover()
    assert sorted(summary.restored) == ["three", "two"]
    assert [note.name for note in summary.trashed] == ["one"]


def test_a_lock_that_fails_trashes_no_record_and_the_next_start_restores_it(
    parked: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_acquire = parked.manager.locks.try_acquire

    def fail_once(workspace_id: str) -> HeldLock | None:
        if workspace_id != "two":
            return try_acquire(workspace_id)
        monkeypatch.undo()
        raise Unavailable("no connection for the lock")

    monkeypatch.setattr(parked.manager.locks, "try_acquire", fail_once)
    summary = parked.manager.recover()
    assert [(note.name, note.reason) for note in summary.problems] == [("two", "no connection for the lock")]
    assert (summary.trashed, summary.restored) == ((), ("one", "three"))
    again = parked.manager.recover()
    assert (again.problems, again.adopted) == ((), ("two",))


@pytest.mark.parametrize("kind", [".staging-", ".trash-"])
def test_names_that_hold_staging_or_trash_are_skipped_while_they_cannot_be_swept(
    make_host: HostFactory, kind: str
) -> None:
    host, second = make_host(), make_host()
    host.create()
    host.manager.pause("one")
    folder = folder_of(host)
    leftover = f"one{kind}x"
    (folder / leftover).mkdir()
    (folder / leftover / "record.json").write_bytes((folder / "one/record.json").read_bytes())
    with host.manager.hold("one"):
        summary = second.manager.recover()
        assert (summary.restored, summary.trashed, summary.pruned) == ((), (), ())
        assert sorted(os.listdir(folder)) == ["one", leftover]
    assert second.manager.recover().restored == ("one",)
    assert os.listdir(folder) == ["one"]


def test_folders_are_swept_before_records_are_read(parked: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def watch(name: str) -> None:
        method: Callable[..., Any] = getattr(parked.manager.records, name)
        monkeypatch.setattr(
            parked.manager.records, name, lambda entry: (steps.append(f"{name} {entry}"), method(entry))[1]
        )

    (folder_of(parked) / "one.trash-1").mkdir()
    watch("sweep")
    watch("read")
    parked.manager.recover()
    assert steps[:2] == ["read one.trash-1", "sweep one.trash-1"]
    assert sorted(steps[2:5]) == ["read one", "read three", "read two"]
    assert "sweep" not in steps[4:]
