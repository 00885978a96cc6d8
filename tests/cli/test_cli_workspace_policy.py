"""`workspace policy`, `owner`, `events`: what needs the catalog alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_runner import CommandLine

from snaploader.cli.workspace.policies import parse_field
from snaploader.errors import InvalidArgument
from snaploader.workspace.catalog import Catalog
from snaploader.workspace.model import Workspace, WorkspaceSpec, WorkspaceState


@pytest.fixture
def catalog_path(tmp_path: Path) -> Path:
    """Where the catalog is by default."""
    folder = tmp_path / "state/snaploader"
    folder.mkdir(parents=True)
    return folder / "catalog.sqlite"


def add_workspace(path: Path, workspace_id: str, **values: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    made = Workspace(
        WorkspaceSpec(workspace_id),
        "here",
        WorkspaceState.STOPPED,
        created_at=now,
        last_used_at=now,
        **values,
    )
    with Catalog.open(path) as catalog, catalog.transaction() as transaction:
        transaction.add_workspace(made)
        transaction.add_event(workspace_id, "workspace_create", {"by": values.get("owner", "")}, now)


def test_the_default_policy_is_there_and_does_nothing(cli: CommandLine) -> None:
    assert cli.json("workspace", "policy", "show", "default") == {
        "name": "default",
        "onPause": "Full",
        "autostopAction": "stop",
        "autostartAllowed": True,
    }


def test_a_policy_is_made_changed_listed_and_removed(cli: CommandLine) -> None:
    made = cli.json("workspace", "policy", "set", "agents", "onPause=Data", "autostopAfterSeconds=8h")
    assert made["onPause"] == "Data"
    assert made["autostopAfterSeconds"] == 8 * 3600
    changed = cli.json(
        "workspace", "policy", "set", "agents", "autostartAllowed=false", "autostopAction=pause"
    )
    assert changed == {**made, "autostartAllowed": False, "autostopAction": "pause"}
    assert cli.json("workspace", "policy", "show", "agents") == changed
    listed = cli.json("workspace", "policy", "ls")["policies"]
    assert [policy["name"] for policy in listed] == ["agents", "default"]
    assert cli.json("workspace", "policy", "rm", "agents") == {"removed": "agents"}
    assert cli("workspace", "policy", "show", "agents").exit_code == 3


def test_a_field_without_a_value_goes_back_to_its_default(cli: CommandLine) -> None:
    cli.ok("workspace", "policy", "set", "a", "timeUntilDormantSeconds=7d", "onCommit=Data")
    changed = cli.json("workspace", "policy", "set", "a", "timeUntilDormantSeconds=", "onCommit=")
    assert "timeUntilDormantSeconds" not in changed
    assert "onCommit" not in changed


def test_policies_are_shown_as_they_are_set(cli: CommandLine) -> None:
    text = cli.ok(
        "workspace",
        "policy",
        "set",
        "a",
        "failureTtlSeconds=1.5h",
        "autostopAfterSeconds=0.5",
        "autostartWeekdays=mon-wed,sat",
    ).text
    assert "autostartWeekdays=mon,tue,wed,sat\n" in text
    assert "failureTtlSeconds=5400\n" in text
    assert "autostopAfterSeconds=0.5\n" in text
    assert "onPause=Full\n" in text
    cli.ok("workspace", "policy", "set", "b", *text.split())
    assert cli.ok("workspace", "policy", "show", "b").text == text
    assert "failureTtlSeconds=5400\n" in cli.ok("workspace", "policy", "ls").text
    assert isinstance(cli.json("workspace", "policy", "show", "a")["failureTtlSeconds"], int)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["onPause=Data", "onCommit=Full"], "onCommit is Full and onPause is Data"),
        (["onpause=Full"], "unknown field 'onpause'"),
        (["onPause=Half"], "onPause: there is no scope 'Half'"),
        (["autostopAfterSeconds=soon"], "autostopAfterSeconds: 'soon' is no duration"),
        (["autostopAfterSeconds=0"], "autostopAfterSeconds: "),
        (["autostopAction=sleep"], "autostopAction: 'sleep' is neither stop nor pause"),
        (["autostartWeekdays=mon-someday"], "autostartWeekdays: 'someday' is no day of the week"),
        (["autostartAllowed=yes"], "autostartAllowed: 'yes' is neither true nor false"),
        (["onPause"], "'onPause' is not FIELD=VALUE"),
        (["=Full"], "'=Full' is not FIELD=VALUE"),
    ],
)
def test_a_wrong_field_is_refused_by_the_name_it_was_given(
    cli: CommandLine, fields: list[str], message: str
) -> None:
    outcome = cli("workspace", "policy", "set", "a", *fields)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert cli("workspace", "policy", "show", "a").exit_code == 3


def test_a_policy_in_use_and_the_default_one_stay(cli: CommandLine, catalog_path: Path) -> None:
    cli.ok("workspace", "policy", "set", "a")
    add_workspace(catalog_path, "web", policy="a")
    outcome = cli("workspace", "policy", "rm", "a")
    assert outcome.exit_code == 4
    assert "'web'" in outcome.stderr
    assert cli("workspace", "policy", "rm", "default").exit_code == 4
    assert cli("workspace", "policy", "rm", "nothing").exit_code == 3


def test_values_keep_their_types() -> None:
    assert parse_field("a=true") == ("a", True)
    assert parse_field("a=b=c") == ("a", "b=c")
    assert parse_field("aSeconds=2m") == ("aSeconds", 120.0)
    assert parse_field("a=") == ("a", None)
    with pytest.raises(InvalidArgument):
        parse_field("a")


def test_an_owner_is_suspended_and_active_again(cli: CommandLine) -> None:
    assert cli.json("workspace", "owner", "alice") == {"owner": "alice", "status": "active"}
    assert cli.json("workspace", "owner", "alice", "suspended")["status"] == "suspended"
    assert cli.ok("workspace", "owner", "alice").text == "alice: suspended\n"
    assert cli.json("workspace", "owner", "alice", "dormant")["status"] == "dormant"
    assert cli.json("workspace", "owner", "alice", "active")["status"] == "active"
    assert cli("workspace", "owner", "alice", "asleep").exit_code == 2


def test_events_are_listed_in_order_by_workspace_type_and_place(cli: CommandLine, catalog_path: Path) -> None:
    for workspace_id in ("one", "two"):
        add_workspace(catalog_path, workspace_id, owner=f"owner of {workspace_id}")
    everything = cli.json("workspace", "events")["events"]
    assert [event["workspace_id"] for event in everything] == ["one", "two"]
    assert everything[0]["payload"] == {"by": "owner of one"}
    assert everything[0]["created_at"] == "2026-01-01T00:00:00+00:00"
    assert cli.json("workspace", "events", "two")["events"] == everything[1:]
    assert cli.json("workspace", "events", "--after", everything[0]["id"])["events"] == everything[1:]
    assert cli.json("workspace", "events", "--limit", 1)["events"] == everything[1:]
    assert cli.json("workspace", "events", "--type", "workspace_fork", "one")["events"] == []
    refused = cli("workspace", "events", "--type", "nothing")
    assert refused.exit_code == 2
    assert "workspace_create" in refused.stderr  # one of those that there are
    text = cli.ok("workspace", "events", "two").text
    assert "workspace_create" in text
    assert '{"by": "owner of two"}' in text


def test_a_limit_of_events_keeps_the_newest_in_the_order_of_time(
    cli: CommandLine, catalog_path: Path
) -> None:
    for name in ("one", "two", "three"):
        cli.ok("workspace", "create", name, "--no-start")

    def listed(*options: object) -> list[str]:
        found = cli.json("workspace", "events", *options)["events"]
        return [each["workspace_id"] for each in found]

    assert listed("--limit", 2) == ["two", "three"]
    assert listed("--limit", 9) == ["one", "two", "three"]
    assert listed("--after", 0, "--limit", 2) == ["one", "two"]  # who follows misses none
    assert listed("--limit", 1, "one") == ["one"]


def test_events_of_a_workspace_that_never_was_are_not_found(cli: CommandLine) -> None:
    outcome = cli("workspace", "events", "nobody")
    assert outcome.exit_code == 3
    assert "'nobody'" in outcome.stderr


def test_what_the_lifecycle_goes_by_can_be_changed(cli: CommandLine, catalog_path: Path) -> None:
    add_workspace(catalog_path, "web")
    cli.ok("workspace", "policy", "set", "agents")
    schedule = "CRON_TZ=Europe/Berlin 30 9 * * 1-5"
    changed = cli.json(
        "workspace", "set", "web", "--policy", "agents", "--owner", "bob", "--schedule", schedule
    )
    assert (changed["policy"], changed["owner"], changed["autostart_schedule"]) == ("agents", "bob", schedule)
    assert cli.json("workspace", "set", "web", "--schedule", "")["autostart_schedule"] == ""
    first, second = (event["payload"] for event in cli.json("workspace", "events", "web")["events"][1:])
    assert (first["policy"], first["owner"], first["autostart_schedule"]) == ("agents", "bob", schedule)
    assert first["before"] == {"policy": "default", "owner": "", "autostart_schedule": ""}
    assert (second["autostart_schedule"], second["before"]) == ("", {"autostart_schedule": schedule})
    told = cli.ok("workspace", "events", "web").text.splitlines()[-1]
    assert told.endswith(
        'workspace_change  {"autostart_schedule": "", "before": {"autostart_schedule": "' + schedule + '"}}'
    )


def test_a_deadline_is_told_and_moved(cli: CommandLine) -> None:
    made = cli.json("workspace", "create", "web", "--ttl", "8h", "--schedule", "30 9 * * *")
    assert made["ttl_s"] == 8 * 3600
    shown = cli.json("workspace", "show", "web")
    [listed] = cli.json("workspace", "ls")["workspaces"]
    deadline = datetime.fromisoformat(shown["deadline"])
    assert shown["deadline"] == shown["latest_run"]["deadline"] == listed["deadline"]
    start = datetime.fromisoformat(shown["next_start_at"])
    assert (start.hour, start.minute, listed["next_start_at"]) == (9, 30, shown["next_start_at"])
    assert deadline < start <= deadline + timedelta(days=1)
    moved = cli.json("workspace", "extend", "web", "--by", "2h")
    assert datetime.fromisoformat(moved["deadline"]) == deadline + timedelta(hours=2)
    until = f"{deadline + timedelta(days=1):%Y-%m-%d %H:%M}"
    assert cli.ok("workspace", "extend", "web", "--until", until).text == f"web runs until {until}\n"
    text = cli.ok("workspace", "show", "web").text
    assert f"deadline    {until}" in text
    assert "ttl         8:00:00" in text
    assert "next start  " in text
    wide = cli.ok("workspace", "ls", "--wide", "--no-sizes").text
    assert "next start" in wide
    assert until in wide
    assert until not in cli.ok("workspace", "ls").text
    assert cli.json("workspace", "stop", "web")["ttl_s"] == 8 * 3600
    assert cli.json("workspace", "show", "web")["deadline"] is None
    assert cli.json("workspace", "set", "web", "--ttl", "0")["ttl_s"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--by", "1h", "--until", "2036-01-01"], 2),
        (["--until", "soon"], 2),
        (["--until", "2020-01-01"], 2),
        (["--by", "400d"], 2),
    ],
)
def test_what_is_no_later_deadline_is_refused(cli: CommandLine, arguments: list[str], code: int) -> None:
    cli.ok("workspace", "create", "web", "--ttl", "8h")
    assert cli("workspace", "extend", "web", *arguments).exit_code == code
    assert cli("workspace", "extend", "nobody", "--by", "1h").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["web"], 2),
        (["web", "--schedule", "at noon"], 2),
        (["web", "--policy", "nothing"], 3),
        (["nobody", "--owner", "bob"], 3),
    ],
)
def test_what_cannot_be_changed_is_refused(
    cli: CommandLine, catalog_path: Path, arguments: list[str], code: int
) -> None:
    add_workspace(catalog_path, "web")
    assert cli("workspace", "set", *arguments).exit_code == code
    assert len(cli.json("workspace", "events")["events"]) == 1
