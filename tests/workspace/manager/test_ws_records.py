"""Records of paused workspaces: whole or not there, and read back exactly or refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snaploader.errors import DataLoss, NotFound
from snaploader.workspace.model import (
    Readiness,
    Resources,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
)
from snaploader.workspace.policy import Policy, ScopePolicy, StopAction
from snaploader.workspace.records import KeptVersion, PausedRecord, PausedRecords, owner_of

NOW = datetime(2026, 5, 4, 3, 2, 1, 123456, UTC)


def snapshot(name: str, kind: SnapshotKind = SnapshotKind.VERSION) -> SnapshotRecord:
    return SnapshotRecord(
        name,
        "one",
        f"workspaces/one/{name}",
        kind,
        Scope.DATA,
        SnapshotSource.PRE_EXEC,
        NOW,
        display_name="before\tthe update",
        parent="earlier",
        manifest_ref="ab" * 32,
        is_remote=True,
        size_bytes=12345,
    )


RECORD = PausedRecord(
    Workspace(
        WorkspaceSpec(
            "one",
            ("sleep", "infinity"),
            {"LANG": "C.UTF-8"},
            (Volume("data", "/var/my data"), Volume("conf", "/..config")),
            Readiness("tcp", "127.0.0.1:80", 0.5, 3),
            "debian:12",
            ("/dev/kvm",),
            Resources(2, 1 << 30),
            {"team": "web"},
        ),
        "host-a",
        WorkspaceState.PAUSED,
        NOW,
        NOW + timedelta(seconds=5),
        owner="ann",
        base="debian",
        policy="gentle",
        autostart_schedule="30 9 * * *",
        slot=3,
        current_snapshot="p",
        base_snapshot="b",
        paused_at=NOW + timedelta(microseconds=7),
        ttl=timedelta(hours=1, microseconds=1),
        template_version=2,
        automatic_updates=True,
    ),
    Policy("gentle", ScopePolicy(Scope.FULL, Scope.DATA), timedelta(hours=1), StopAction.PAUSE),
    (snapshot("v1"), snapshot("p", SnapshotKind.PAUSE)),
    (KeptVersion(1, "v1", "Version 1"),),
)


@pytest.fixture
def records(tmp_path: Path) -> PausedRecords:
    return PausedRecords(tmp_path / "paused")


def test_a_record_is_read_back_as_it_was_written(records: PausedRecords) -> None:
    records.write(RECORD)
    assert records.read("one") == RECORD
    assert (records.entries(), records.leftovers()) == (["one"], [])


def test_a_source_in_words_is_kept_beside_one_that_an_earlier_release_knows(records: PausedRecords) -> None:
    written = replace(RECORD, snapshots=(replace(snapshot("v1"), source="nightly"), RECORD.snapshots[1]))
    records.write(written)
    assert records.read("one") == written
    document = json.loads(Path(records.path("one"), "record.json").read_text())
    assert [each["source"] for each in document["snapshots"]] == ["manual", "pre_exec"]


def test_a_record_takes_the_place_of_an_earlier_one(records: PausedRecords) -> None:
    records.write(RECORD)
    changed = replace(RECORD, workspace=replace(RECORD.workspace, owner="bob", dormant_at=NOW))
    records.write(changed)
    assert records.read("one") == changed
    assert os.listdir(records.folder) == ["one"]


def test_a_removed_record_is_gone(records: PausedRecords) -> None:
    records.write(RECORD)
    assert records.remove("one")
    assert not records.remove("one")
    assert os.listdir(records.folder) == []
    with pytest.raises(NotFound, match="'one'"):
        records.read("one")


def test_a_trashed_entry_is_a_leftover_that_a_sweep_removes(records: PausedRecords) -> None:
    records.write(RECORD)
    records.trash("one")
    assert records.entries() == []
    [leftover] = records.leftovers()
    assert owner_of(leftover) == "one"
    records.sweep(leftover)
    assert os.listdir(records.folder) == []


def test_a_file_that_is_named_like_a_leftover_is_none(records: PausedRecords) -> None:
    Path(records.folder, "one.trash-1").write_text("")
    records.sweep("one.trash-1")
    assert (records.leftovers(), records.strangers()) == ([], ["one.trash-1"])


def test_a_write_that_fails_leaves_the_earlier_record_and_nothing_else(
    records: PausedRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(RECORD)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("snaploader.workspace.records.write_new", fail)
    with pytest.raises(Exception, match="No space"):
        records.write(replace(RECORD, snapshots=(*RECORD.snapshots, snapshot("v2"))))
    assert records.read("one") == RECORD
    assert os.listdir(records.folder) == ["one"]


def change(records: PausedRecords, *path: str | int, to: Any) -> None:
    """Write the record with one value changed."""
    records.write(RECORD)
    file = Path(records.folder, "one", "record.json")
    values = json.loads(file.read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("format",), None),
        (("workspace",), None),
        (("workspace", "workspace_id"), "two"),
        (("workspace", "workspace_id"), "../etc"),
        (("workspace", "workspace_id"), 7),
        (("workspace", "created_at"), "yesterday"),
        (("workspace", "created_at"), "2026-05-04T03:02:01"),
        (("workspace", "volumes", 0, "durable_dir"), "/a/../b"),
        (("workspace", "readiness", "interval_s"), 0),
        (("workspace", "current_snapshot"), "other"),
        (("workspace", "command", 0), 5),
        (("policy", "values", "onPause"), "Everything"),
        (("snapshots",), []),
        (("snapshots", 0, "kind"), "best"),
        (("snapshots", 0, "size_bytes"), -1),
        (("versions", 0, "number"), 0),
        (("versions", 0, "number"), 2**31),
        (("versions", 0, "snapshot_name"), "other"),
    ],
)
def test_a_record_with_a_wrong_value_is_refused(
    records: PausedRecords, path: tuple[str | int, ...], value: Any
) -> None:
    change(records, *path, to=value)
    with pytest.raises(DataLoss, match="'one'"):
        records.read("one")


def test_a_record_that_lacks_its_slot_says_so(records: PausedRecords) -> None:
    change(records, "workspace", "slot", to=None)
    with pytest.raises(DataLoss, match="lacks its slot"):
        records.read("one")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b"1" * 5000])
def test_a_file_that_is_no_record_is_refused(records: PausedRecords, content: bytes) -> None:
    records.write(RECORD)
    Path(records.folder, "one", "record.json").write_bytes(content)
    with pytest.raises(DataLoss, match=r"record\.json"):
        records.read("one")


def test_a_folder_without_a_record_is_one_that_cannot_be_read(records: PausedRecords) -> None:
    os.mkdir(f"{records.folder}/one")
    with pytest.raises(NotFound, match="No such file"):
        records.read("one")
