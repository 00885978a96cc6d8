"""What a workspace is made with: labels, image, devices and resources are bounded, and stay."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import DATA, Host

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Resources, WorkspaceSpec, check_spec

MADE_WITH: dict[str, Any] = {
    "image": "registry.example:5000/debian@sha256:ab",
    "devices": ("/dev/kvm", "vendor.com/gpu=0"),
    "resources": Resources(vcpus=4, memory_bytes=2 << 30),
    "labels": {"team": "web", "example.com/tier": "Größe 1"},
}


def made_with(spec: WorkspaceSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in MADE_WITH}


def kept(host: Host, workspace_id: str = "one") -> dict[str, Any]:
    return made_with(host.manager.workspace(workspace_id).spec)


def test_what_a_workspace_is_made_with_stays_over_all_that_is_done_to_it(host: Host) -> None:
    assert made_with(host.create(**MADE_WITH).spec) == MADE_WITH
    host.manager.create_version("one")
    host.manager.rollback("one", 1)
    assert kept(host) == MADE_WITH
    host.manager.pause("one")
    host.manager.resume("one")
    host.manager.stop("one")
    host.manager.start("one")
    assert kept(host) == MADE_WITH
    host.manager.recover()
    assert kept(host) == MADE_WITH


def test_a_workspace_that_the_catalog_lost_comes_back_as_it_was_made(host: Host) -> None:
    host.create(**MADE_WITH, ttl=timedelta(hours=8))
    host.manager.pause("one")
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    assert host.manager.recover().adopted == ("one",)
    assert kept(host) == MADE_WITH
    assert host.manager.resume("one").ttl == timedelta(hours=8)
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert run.deadline == host.clock.now + timedelta(hours=8)


def test_a_record_of_an_earlier_release_has_none_of_it_and_is_restored(host: Host) -> None:
    host.create(**MADE_WITH)
    host.manager.pause("one")
    path = Path(host.manager.records.path("one"), "record.json")
    record = json.loads(path.read_text())
    for name in MADE_WITH:
        del record["workspace"][name]
    path.write_text(json.dumps(record))
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    assert host.manager.recover().restored == ("one",)
    assert kept(host) == made_with(WorkspaceSpec("one"))


@pytest.mark.parametrize(
    "wrong",
    [{"labels": {"a b": "1"}}, {"resources": {"vcpus": 0}}, {"devices": ["a", "a"]}, {"image": "a b"}],
)
def test_a_record_with_what_no_workspace_can_have_is_moved_aside(host: Host, wrong: dict[str, Any]) -> None:
    host.create()
    host.manager.pause("one")
    path = Path(host.manager.records.path("one"), "record.json")
    record = json.loads(path.read_text())
    record["workspace"] |= wrong
    path.write_text(json.dumps(record))
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    assert [note.name for note in host.manager.recover().trashed] == ["one"]


def test_a_fork_is_made_of_what_its_origin_was_and_may_change_labels(host: Host) -> None:
    host.create(**MADE_WITH)
    host.manager.commit("one")
    assert made_with(host.manager.fork("one", "two").spec) == MADE_WITH
    changed = host.manager.fork("one", "three", labels={"team": "db", "new": "yes"})
    labels = {"team": "db", "example.com/tier": "Größe 1", "new": "yes"}
    assert made_with(changed.spec) == {**MADE_WITH, "labels": labels}
    assert [each.id for each in host.manager.workspaces(labels={"team": "web"})] == ["one", "two"]


def test_the_runtime_is_given_what_a_workspace_is_made_with(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[WorkspaceSpec] = []
    monkeypatch.setattr(host.runtime, "start", seen.append)
    host.create(**MADE_WITH)
    assert [made_with(spec) for spec in seen] == [MADE_WITH]


@pytest.mark.parametrize("name", ["a", "A1", "example.com/a_b-c", "x" * 63])
def test_names_of_labels(name: str) -> None:
    check_spec(WorkspaceSpec("one", labels={name: ""}))


@pytest.mark.parametrize("name", ["", "-a", "a-", "a b", "ä", "a=b", "x" * 64, "a\n"])
def test_what_is_no_name_of_a_label_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no name of a label"):
        check_spec(WorkspaceSpec("one", labels={name: ""}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"labels": {"a": "x" * 256}}, "label 'a' cannot be"),
        ({"labels": {"a": "two\nlines"}}, "label 'a' cannot be"),
        ({"labels": {f"l{number}": "" for number in range(65)}}, "no more than 64 labels"),
        ({"image": "two words"}, "'two words' is no image"),
        ({"image": "x" * 256}, "is no image"),
        ({"devices": ("",)}, "'' is no device"),
        ({"devices": ("/dev/kvm", "/dev/kvm")}, "named twice"),
        ({"devices": tuple(map(str, range(101)))}, "no more than 100 devices"),
    ],
)
def test_what_is_malformed_or_too_much_is_refused_and_nothing_is_made(
    host: Host, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        host.create(**values)
    assert (host.calls(), host.manager.workspaces(), host.manager.slots.owners()) == ([], [], {})


@pytest.mark.parametrize(
    "values", [{"labels": {"a": 1}}, {"devices": [1]}, {"image": 1}, {"devices": "/dev/kvm"}]
)
def test_what_is_no_text_is_an_error_of_the_program(host: Host, values: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        host.create(volumes=[DATA], **values)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", 2**63])
@pytest.mark.parametrize("name", ["vcpus", "memory_bytes"])
def test_resources_are_whole_numbers_above_zero(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} of a workspace is"):
        Resources(**{name: value})


def test_recovery_starts_what_should_run_with_its_resources(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.create(**MADE_WITH)
    host.runtime.end("one")
    seen: list[WorkspaceSpec] = []
    monkeypatch.setattr(host.runtime, "start", seen.append)
    assert [note.reason for note in host.manager.recover().repaired] == ["it did not run, and was started"]
    assert [made_with(spec) for spec in seen] == [MADE_WITH]
