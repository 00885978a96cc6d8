"""What the lifecycle goes by: changed as a whole or not at all, and no more than the runtime can capture."""

from __future__ import annotations

from typing import Any

import pytest
from manager_hosts import Host

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound
from snaploader.workspace.model import Scope
from snaploader.workspace.policy import Policy, ScopePolicy

FULL, DATA = Scope.FULL, Scope.DATA


@pytest.fixture
def data_host(host: Host) -> Host:
    """A host whose runtime captures durable directories alone, and whose default policy asks for no more."""
    host.runtime.scopes = frozenset({DATA})
    host.manager.change_policy("default", {"onPause": "Data"})
    return host


@pytest.mark.parametrize(
    ("values", "field"),
    [({}, "onPause"), ({"onPause": "full"}, "onPause"), ({"onPause": "Full", "onCommit": "Data"}, "onPause")],
)
def test_a_policy_that_asks_for_what_the_runtime_cannot_capture_is_refused(
    data_host: Host, values: dict[str, Any], field: str
) -> None:
    message = (
        f"policy 'p': {field} is Full, which the runtime of this host cannot capture: set {field} to Data"
    )
    with pytest.raises(InvalidArgument, match=message):
        data_host.manager.change_policy("p", values)
    with pytest.raises(InvalidArgument, match=message):
        data_host.manager.put_policy(Policy.from_mapping("p", values))
    with data_host.catalog.reading() as reader:
        assert [policy.name for policy in reader.policies()] == ["default"]


def test_a_commit_that_the_runtime_cannot_capture_is_named_as_such(host: Host) -> None:
    host.runtime.scopes = frozenset({FULL})
    with pytest.raises(InvalidArgument, match=r"onCommit is Data, .* set onCommit to Full"):
        host.manager.change_policy("p", {"onCommit": "Data"})


def test_a_refused_change_leaves_the_policy_as_it_was(data_host: Host) -> None:
    data_host.manager.change_policy("p", {"onPause": "Data", "autostopAfterSeconds": 60})
    with pytest.raises(InvalidArgument):
        data_host.manager.change_policy("p", {"onPause": "Full", "autostopAfterSeconds": 30})
    changed = data_host.manager.change_policy("p", {"autostopAfterSeconds": None, "autostopAction": "pause"})
    assert changed.to_mapping() == {
        "onPause": "Data",
        "autostopAction": "pause",
        "autostartAllowed": True,
    }
    with data_host.catalog.reading() as reader:
        assert reader.policy("p") == changed


def test_a_workspace_is_given_no_policy_that_the_runtime_cannot_follow(data_host: Host) -> None:
    with data_host.catalog.transaction() as tx:  # as a host with another runtime does
        tx.put_policy(Policy("full"))
    with pytest.raises(InvalidArgument, match="policy 'full': onPause is Full"):
        data_host.create(policy="full")
    assert (data_host.manager.workspaces(), data_host.manager.slots.owners()) == ([], {})
    data_host.create()
    with pytest.raises(InvalidArgument, match="policy 'full': onPause is Full"):
        data_host.manager.change("one", policy="full", owner="ann")
    workspace = data_host.manager.workspace("one")
    assert (workspace.policy, workspace.owner) == ("default", "")
    assert data_host.events() == ["workspace_create"]


def test_a_runtime_that_captures_data_alone_takes_versions_of_that(data_host: Host) -> None:
    (data_host.folder / "template/data").mkdir(parents=True)
    data_host.create(source=data_host.folder / "template")
    data_host.write("data/a", "first")
    assert data_host.manager.create_version("one").scope is DATA
    assert data_host.manager.create_snapshot("one").scope is DATA
    data_host.write("data/a", "second")
    data_host.manager.rollback("one", 1, keep_current=True)
    assert data_host.read("data/a") == "first"
    data_host.manager.rollback("one", 3)
    assert data_host.read("data/a") == "second"
    assert data_host.manager.pause("one").scope is DATA
    assert data_host.manager.commit("one").scope is DATA
    data_host.manager.resume("one")
    scopes = {each.record.scope for each in data_host.manager.list_snapshots("one") if each.record}
    assert scopes == {DATA}


def test_what_the_runtime_cannot_capture_is_refused_before_anything_is_stopped(data_host: Host) -> None:
    data_host.create()
    with data_host.catalog.transaction() as tx:
        tx.put_policy(Policy(scopes=ScopePolicy(FULL)))
    data_host.calls()
    for ask in (
        lambda: data_host.manager.create_snapshot("one", scope="Full"),
        lambda: data_host.manager.pause("one"),
        lambda: data_host.manager.commit("one"),
    ):
        with pytest.raises(FailedPrecondition, match=r"scope Full is possible, .* captures Data alone"):
            ask()
    assert data_host.calls() == []
    assert data_host.is_running()
    assert data_host.leftovers() == []


def test_a_change_is_recorded_with_what_was_changed(host: Host) -> None:
    host.create(owner="ann")
    host.manager.change_policy("gentle", {})
    changed = host.manager.change("one", owner="", policy="gentle", autostart_schedule="0 9 * * *")
    assert (changed.owner, changed.policy, changed.autostart_schedule) == ("", "gentle", "0 9 * * *")
    assert host.manager.workspace("one") == changed
    assert host.manager.change("one") == changed
    [event] = host.manager.events("one", types=["workspace_change"])
    assert event.payload["owner"] == ""
    assert event.payload["policy"] == "gentle"
    assert event.payload["autostart_schedule"] == "0 9 * * *"
    assert event.created_at == host.clock.now


def test_what_cannot_be_changed_leaves_all_as_it_was(host: Host) -> None:
    before = host.create()
    for error, changes in (
        (InvalidArgument, {"autostart_schedule": "soon", "owner": "ann"}),
        (NotFound, {"policy": "nothing", "owner": "ann"}),
    ):
        with pytest.raises(error):
            host.manager.change("one", **changes)
    assert host.manager.workspace("one") == before
    host.manager.delete("one")
    with pytest.raises(FailedPrecondition, match="was deleted"):
        host.manager.change("one", owner="ann")
