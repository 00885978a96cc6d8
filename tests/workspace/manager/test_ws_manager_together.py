"""Several managers at once: of one host in several processes, and with the lifecycle executor."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from manager_hosts import START, Host, HostFactory

from snaploader.errors import DeadlineExceeded
from snaploader.workspace.lifecycle import LifecycleExecutor
from snaploader.workspace.manager import HeldWorkspace, WorkspaceManager
from snaploader.workspace.model import OwnerStatus, WorkspaceState
from snaploader.workspace.policy import StopAction


def test_managers_of_one_host_wait_for_each_other(make_host: HostFactory) -> None:
    hosts = [make_host(), make_host()]
    hosts[0].create()
    numbers: list[int | None] = []

    def work(host: Host) -> None:
        for _ in range(3):
            numbers.append(host.manager.create_version("one").version)

    threads = [threading.Thread(target=work, args=(host,)) for host in hosts for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers, key=lambda number: number or 0) == list(range(1, 13))
    assert hosts[0].findings() == []


def test_an_operation_gives_up_waiting_for_a_lock_that_another_manager_holds(make_host: HostFactory) -> None:
    first, second = make_host(), make_host(lock_timeout_s=0.02)
    first.create()
    with first.manager.hold("one"), pytest.raises(DeadlineExceeded, match="'one'"):
        second.manager.create_version("one")


def test_what_one_manager_paused_another_resumes(make_host: HostFactory) -> None:
    first, second = make_host(), make_host()
    first.create()
    first.write("data/a", "content")
    first.manager.pause("one")
    second.manager.resume("one")
    assert first.read("data/a") == "content"
    assert first.is_running()


def executor(host: Host) -> LifecycleExecutor:
    return LifecycleExecutor(host.manager, clock=host.clock)


@pytest.mark.parametrize("action", list(StopAction))
def test_the_lifecycle_stops_pauses_and_starts_workspaces(host: Host, action: StopAction) -> None:
    host.follow(autostop_after=timedelta(hours=1), autostop_action=action)
    host.create("one", autostart_schedule="CRON_TZ=UTC 0 9 * * *")
    host.write("data/a", "content")
    host.clock.advance(hours=2)
    with executor(host) as lifecycle:
        assert dict(lifecycle.run_once().errors) == {}
        parked = {StopAction.STOP: WorkspaceState.STOPPED, StopAction.PAUSE: WorkspaceState.PAUSED}
        assert host.manager.workspace("one").state is parked[action]
        assert host.findings() == []
        host.clock.now = START.replace(hour=9) + timedelta(days=1)
        assert dict(lifecycle.run_once().errors) == {}
    assert host.is_running()
    assert host.read("data/a") == "content"
    assert host.findings() == []


def test_the_lifecycle_parks_and_deletes_what_nobody_uses(host: Host) -> None:
    host.follow(time_until_dormant=timedelta(days=1), delete_after_dormant=timedelta(days=2))
    host.create()
    host.manager.commit("one")
    with executor(host) as lifecycle:
        host.clock.advance(days=1, minutes=1)
        lifecycle.run_once()
        assert host.manager.workspace("one").state is WorkspaceState.STOPPED
        assert host.manager.workspace("one").dormant_at is not None
        host.clock.advance(days=2, minutes=1)
        lifecycle.run_once()  # after such a jump a second tick must confirm the time
        assert host.manager.workspace("one").state is WorkspaceState.STOPPED
        host.clock.advance(minutes=1)
        lifecycle.run_once()
    assert host.manager.workspace("one").state is WorkspaceState.DELETED
    assert host.cache.pins() == []
    assert host.findings() == []


def test_a_workspace_of_a_suspended_owner_is_stopped(host: Host) -> None:
    host.create(owner="ann")
    with host.catalog.transaction() as tx:
        tx.set_owner_status("ann", OwnerStatus.SUSPENDED)
    with executor(host) as lifecycle:
        lifecycle.run_once()
    assert not host.is_running()


def test_a_workspace_that_somebody_works_on_is_skipped(host: Host) -> None:
    host.follow(autostop_after=timedelta(hours=1))
    host.create()
    host.clock.advance(hours=2)
    with executor(host) as lifecycle:
        with host.manager.hold("one"):
            assert dict(lifecycle.run_once().transitions) == {}
        assert list(lifecycle.run_once().transitions) == ["one"]


def test_every_public_method_says_what_it_does() -> None:
    for owner in (WorkspaceManager, HeldWorkspace):
        for name in dir(owner):
            if not name.startswith("_"):
                assert getattr(owner, name).__doc__, f"{owner.__name__}.{name}"
