"""Templates of a catalog, workspaces that are made from them, and starts that update."""

from __future__ import annotations

from datetime import timedelta

import pytest
from manager_hosts import DATA, Host, HostFactory

from snaploader.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snaploader.workspace.lifecycle import Hooks, LifecycleExecutor, Notification
from snaploader.workspace.model import MAX_LABELS, RunStatus, Scope, WorkspaceState
from snaploader.workspace.policy import Transition
from snaploader.workspace.templates import Template, TemplateUpdate

HOUR = timedelta(hours=1)


def add_versions(host: Host) -> None:
    """Two versions of template `web`, of which the first is active."""
    host.follow(name="gentle", autostop_after=3 * HOUR)
    add = host.manager.templates.add_version
    add("web", command=["first"], environment={"A": "1"}, volumes=[DATA], message="the first")
    add("web", command=["second"], environment={"A": "2"}, policy="gentle", activate=False)


def make(host: Host, **kwargs: object) -> None:
    add_versions(host)
    host.manager.create("one", template="web", **kwargs)  # type: ignore[arg-type]
    host.manager.stop("one")
    host.manager.templates.activate("web", 2)


def command(host: Host) -> tuple[tuple[str, ...], int | None]:
    workspace = host.manager.workspace("one")
    return workspace.spec.command, workspace.template_version


FIRST, SECOND = (("first",), 1), (("second",), 2)


def test_versions_are_numbered_and_the_first_or_the_newest_is_active(host: Host) -> None:
    add_versions(host)
    templates = host.manager.templates
    assert templates.all() == [Template("web", 1, 2)]
    first, second = templates.versions("web")
    assert (first.number, first.spec.command, first.message) == (1, ("first",), "the first")
    assert (first.spec.workspace_id, first.spec.volumes) == ("", (DATA,))
    assert (second.number, second.policy, second.created_at) == (2, "gentle", host.clock.now)
    third = templates.add_version("web", ttl=HOUR)
    assert (third.number, third.ttl) == (3, HOUR)
    assert templates.versions("web")[-1] == third
    assert templates.get("web") == Template("web", 3, 3)
    assert templates.activate("web", 1) == Template("web", 1, 3)


def test_what_is_not_there_is_not_found(host: Host) -> None:
    add_versions(host)
    templates = host.manager.templates
    for ask in (templates.get, templates.versions, templates.remove, templates.require_active_version):
        with pytest.raises(NotFound, match="no template 'mail'"):
            ask("mail")
    for number in (0, 3, 1 << 70):
        with pytest.raises(NotFound, match="of a template 'web'"):
            templates.activate("web", number)
    with pytest.raises(NotFound, match="policy 'none'"):
        templates.add_version("mail", policy="none")
    assert [each.name for each in templates.all()] == ["web"]
    with pytest.raises(NotFound, match="no template 'mail'"):
        host.manager.create("one", template="mail")
    with pytest.raises(NotFound, match="version 3"):
        host.manager.create("one", template="web", template_version=3)


def test_a_workspace_is_made_from_the_active_version_or_another_one_and_says_so(host: Host) -> None:
    add_versions(host)
    one = host.manager.create("one", template="web", environment={"B": "3"})
    assert (one.base, one.template_version, one.automatic_updates) == ("web", 1, False)
    assert (one.spec.command, one.spec.environment) == (("first",), {"A": "1", "B": "3"})
    two = host.manager.create("two", template="web", template_version=2, automatic_updates=True)
    assert (two.template_version, two.automatic_updates, two.policy) == (2, True, "gentle")
    three = host.manager.create(
        "three", template="web", template_version=2, policy="default", command=["own"]
    )
    assert (three.policy, three.spec.command) == ("default", ("own",))
    host.manager.commit("two")
    fork = host.manager.fork("two", "four")
    assert (fork.base, fork.template_version, fork.automatic_updates) == ("web", 2, True)


@pytest.mark.parametrize(
    "arguments",
    [{"template": "web", "base": "debian"}, {"template_version": 1}, {"automatic_updates": True}],
)
def test_what_does_not_go_with_a_template_is_refused(host: Host, arguments: dict[str, object]) -> None:
    add_versions(host)
    with pytest.raises(InvalidArgument):
        host.manager.create("one", **arguments)  # type: ignore[arg-type]


def test_the_next_start_takes_the_active_version_with_its_policy_and_an_event(host: Host) -> None:
    make(host, automatic_updates=True)
    assert command(host) == FIRST
    started = host.manager.start("one")
    assert command(host) == SECOND
    assert (started.policy, started.spec.environment, started.spec.volumes) == ("gentle", {"A": "2"}, (DATA,))
    assert host.runtime.calls[-1].method == "start"
    with host.catalog.reading() as reader:
        assert reader.situation("one").deadline == host.clock.now + 3 * HOUR
    [event] = host.manager.events(types=["workspace_update"])
    assert (event.payload["base"], event.payload["template"]) == ("web", "web")
    assert (event.payload["from_version"], event.payload["to_version"]) == (1, 2)
    host.manager.stop("one")
    host.manager.start("one")
    assert host.events().count("workspace_update") == 1
    assert host.findings() == []


def test_without_automatic_updates_a_start_updates_when_it_is_asked_to(host: Host) -> None:
    make(host)
    host.manager.start("one")
    assert command(host) == FIRST
    host.manager.stop("one")
    host.manager.start("one", update=True)
    assert command(host) == SECOND


def test_a_template_may_require_its_active_version(host: Host) -> None:
    make(host)
    host.manager.templates.require_active_version("web")
    host.manager.start("one")
    assert command(host) == SECOND
    host.manager.stop("one")
    host.manager.templates.activate("web", 1)
    host.manager.templates.require_active_version("web", False)
    host.manager.start("one")
    assert command(host) == SECOND


def test_automatic_updates_are_switched_on_and_off(host: Host) -> None:
    make(host)
    assert host.manager.change("one", automatic_updates=True).automatic_updates
    assert not host.manager.change("one", automatic_updates=False).automatic_updates
    assert host.manager.workspace("one").automatic_updates is False
    assert host.manager.change("one", automatic_updates=True).automatic_updates
    host.manager.start("one")
    assert command(host) == SECOND
    host.create("two", start=False, base="web")  # which is no more than a name
    with pytest.raises(FailedPrecondition, match="was not made from a template"):
        host.manager.change("two", automatic_updates=True)
    with pytest.raises(FailedPrecondition, match="was not made from a template"):
        host.manager.start("two", update=True)


def test_an_update_that_is_refused_is_no_start_that_failed(host: Host) -> None:
    host.create("one", start=False)
    with pytest.raises(FailedPrecondition, match="was not made from a template"):
        host.manager.start("one", update=True)
    with host.catalog.reading() as reader:
        assert reader.latest_run("one") is None
    assert host.events() == ["workspace_create"]


def test_no_update_makes_what_could_not_be_created(host: Host) -> None:
    def labels(prefix: str) -> dict[str, str]:
        return {f"{prefix}{number}": "" for number in range(MAX_LABELS // 2)}

    host.manager.templates.add_version("web", labels=labels("old"))
    host.manager.create("one", template="web", labels=labels("own"), automatic_updates=True, start=False)
    host.manager.templates.add_version("web", labels=labels("new") | {"more": ""})
    with pytest.raises(InvalidArgument, match="no more than 64 labels"):
        host.manager.start("one")
    assert host.manager.workspace("one").template_version == 1
    host.manager.pause("one")
    assert host.manager.records.read("one").workspace.spec.labels.keys() == {*labels("old"), *labels("own")}


def test_a_start_that_fails_leaves_the_version_as_it_was(host: Host) -> None:
    make(host, automatic_updates=True)
    host.runtime.fail_next("start", Unavailable("broken"))
    with pytest.raises(Unavailable):
        host.manager.start("one")
    assert command(host) == FIRST
    assert host.manager.workspace("one").policy == "default"
    assert "workspace_update" not in host.events()
    host.manager.start("one")
    assert command(host) == SECOND


def test_what_the_runtime_is_started_with_is_what_the_version_says(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(host, automatic_updates=True)
    started = []
    start = host.runtime.start
    monkeypatch.setattr(host.runtime, "start", lambda spec: (started.append(spec.command), start(spec)))
    host.manager.start("one")
    assert started == [("second",)]


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("keeps_memory", [False, True])
def test_a_resume_updates_where_the_process_starts_afresh(
    make_host: HostFactory, scope: Scope, keeps_memory: bool
) -> None:
    host = make_host()
    host.runtime.keeps_memory = keeps_memory
    make(host, automatic_updates=True)
    host.follow(scope)
    host.manager.pause("one")
    host.manager.resume("one")
    assert command(host) == (FIRST if keeps_memory and scope is Scope.FULL else SECOND)


def test_the_lifecycle_updates_at_an_autostart_and_tells_the_owner(host: Host) -> None:
    make(host, automatic_updates=True, owner="ann", autostart_schedule="0 13 * * *")
    told: list[Notification] = []
    with LifecycleExecutor(host.manager, hooks=Hooks(notify=(told.append,)), clock=host.clock) as lifecycle:
        stats = lifecycle.run_once(host.clock.advance(hours=2))
        assert dict(stats.transitions) == {"one": Transition.AUTOSTART}
        host.manager.stop("one")
        lifecycle.run_once(host.clock.advance(days=1))
    assert command(host) == SECOND
    assert [(each.owner, each.template_update) for each in told] == [
        ("ann", TemplateUpdate("web", 1, 2)),
        ("ann", None),
    ]
    [event] = host.manager.events(types=["workspace_update"])
    assert event.payload["reason"] == "autostart"


def test_an_autostart_whose_update_fails_is_a_failed_run(host: Host) -> None:
    make(host, automatic_updates=True, autostart_schedule="0 13 * * *")
    host.runtime.fail_next("start", Unavailable("broken"))
    with LifecycleExecutor(host.manager, clock=host.clock) as lifecycle:
        assert lifecycle.run_once(host.clock.advance(hours=2)).errors.keys() == {"one"}
    with host.catalog.reading() as reader:
        run = reader.latest_run("one")
    assert run is not None
    assert run.status is RunStatus.FAILED
    assert command(host) == FIRST


def test_what_is_used_is_not_removed(host: Host) -> None:
    make(host)
    with pytest.raises(FailedPrecondition, match="'one' was made from template 'web'"):
        host.manager.templates.remove("web")
    with host.catalog.transaction() as tx, pytest.raises(FailedPrecondition, match="template 'web'"):
        tx.remove_policy("gentle")
    host.manager.delete("one")
    host.manager.templates.remove("web")
    assert host.manager.templates.all() == []
    with host.catalog.transaction() as tx:
        tx.remove_policy("gentle")
    assert host.manager.templates.add_version("web").number == 1


def test_a_paused_workspace_keeps_its_version_while_a_catalog_knows_it(host: Host) -> None:
    make(host, automatic_updates=True)
    host.manager.pause("one")
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    assert host.manager.recover().adopted == ("one",)
    assert (host.manager.workspace("one").automatic_updates, command(host)) == (True, FIRST)
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    host.manager.templates.remove("web")
    assert host.manager.recover().adopted == ("one",)
    workspace = host.manager.workspace("one")
    assert (workspace.base, workspace.template_version, workspace.automatic_updates) == ("web", None, False)
    assert host.manager.resume("one").state is WorkspaceState.RUNNING


def test_a_newer_version_of_the_same_number_is_not_what_a_paused_workspace_was_made_from(host: Host) -> None:
    make(host, automatic_updates=True)
    host.manager.pause("one")
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")
    host.manager.templates.remove("web")
    host.clock.advance(hours=1)
    host.manager.templates.add_version("web", command=["stranger"])
    assert host.manager.recover().adopted == ("one",)
    workspace = host.manager.workspace("one")
    assert (workspace.template_version, workspace.automatic_updates) == (None, False)
