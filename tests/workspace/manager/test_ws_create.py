"""New workspaces on a host that has something of their id which the catalog has lost, or never knew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from manager_hosts import Host, HostFactory

from snaploader.errors import FailedPrecondition, Unavailable
from snaploader.workspace.manager.operation import Work
from snaploader.workspace.model import Workspace, WorkspaceState
from snaploader.workspace.runtime import ProcessRuntime

Make = Callable[[Host], Workspace]


def create(host: Host) -> Workspace:
    return host.create("one")


def create_with_content(host: Host) -> Workspace:
    (host.folder / "template").mkdir(exist_ok=True)
    return host.create("one", source=host.folder / "template")


def fork(host: Host) -> Workspace:
    return host.manager.fork("origin", "one")


EVERY_WAY = pytest.mark.parametrize("make", [create, create_with_content, fork])


def with_origin(host: Host) -> None:
    host.create("origin")
    host.write("data/a", "origin", "origin")
    host.manager.commit("origin")


def lose(host: Host) -> None:
    with host.catalog.transaction() as tx:
        tx.forget_workspace("one")


def on_disk(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry of a folder: which it is, when it was changed, and what it holds."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_ino, status.st_mtime_ns, content)
    return found


def everything(host: Host) -> list[object]:
    return [
        on_disk(host.folder / "runtime"),
        on_disk(host.folder / "state"),
        host.manager.slots.owners(),
        host.manager.workspaces(include_deleted=True),
        host.manager.events(),
        host.cache.refs(),
        host.cache.pins(),
    ]


def is_refused(host: Host, make: Make, what: str) -> None:
    """It says so, and nothing is changed."""
    before = everything(host)
    with pytest.raises(FailedPrecondition, match=f"'one' cannot be made: this host has {what}") as caught:
        make(host)
    assert "Use the catalog that does" in caught.value.message
    assert getattr(caught.value, "__notes__", []) == []
    for now, then in zip(everything(host), before, strict=True):
        assert now == then


@EVERY_WAY
@pytest.mark.parametrize("state", [WorkspaceState.RUNNING, WorkspaceState.STOPPED])
def test_files_that_the_catalog_does_not_know_are_left_alone(
    host: Host, make: Make, state: WorkspaceState
) -> None:
    with_origin(host)
    host.create("one", start=state is WorkspaceState.RUNNING)
    host.write("data/a", "precious")
    lose(host)
    is_refused(host, make, "files of it")
    assert host.read("data/a") == "precious"
    assert host.is_running() is (state is WorkspaceState.RUNNING)


@EVERY_WAY
def test_a_paused_workspace_that_the_catalog_lost_can_still_be_taken_back(host: Host, make: Make) -> None:
    with_origin(host)
    host.create("one")
    host.write("data/a", "precious")
    host.manager.pause("one")
    lose(host)
    is_refused(host, make, "a record of it as paused")
    assert host.manager.recover().restored == ("one",)
    host.manager.resume("one")
    assert host.read("data/a") == "precious"


@EVERY_WAY
def test_a_record_that_cannot_be_read_is_in_the_way_too(host: Host, make: Make) -> None:
    with_origin(host)
    (Path(host.manager.records.folder) / "one").mkdir()
    before = on_disk(host.folder / "state" / "paused")
    with pytest.raises(FailedPrecondition, match="let `recover` take the workspace back"):
        make(host)
    assert on_disk(host.folder / "state" / "paused") == before
    assert host.manager.slots.owners() == {0: "origin"}
    host.manager.recover()
    assert make(host).state is WorkspaceState.RUNNING


def test_what_the_catalog_knows_is_an_id_that_was_used(host: Host) -> None:
    host.create("one")
    before = everything(host)
    with pytest.raises(FailedPrecondition, match="used before"):
        host.create("one")
    assert everything(host)[0] == before[0]
    assert host.is_running()


def test_a_creation_whose_process_died_is_not_in_its_own_way(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Work, "__exit__", lambda *_: None)
        host.runtime.fail_next("start", Unavailable("killed"), after_effect=True)
        with pytest.raises(Unavailable):
            host.create("one")
    assert host.is_running()
    with pytest.raises(FailedPrecondition, match="used before"):
        host.create("one")
    assert host.is_running()
    assert host.manager.recover().problems == ()
    assert host.runtime.workspaces() == []
    assert host.manager.slots.owners() == {}
    assert host.create("one").state is WorkspaceState.RUNNING


@pytest.mark.parametrize("make", [create, fork])
def test_a_process_that_the_catalog_does_not_know_runs_on(
    make_host: HostFactory, tmp_path: Path, make: Make
) -> None:
    with ProcessRuntime(tmp_path / "processes", index_placed=False) as runtime:
        host = make_host(runtime=runtime)
        with_origin(host)
        host.create("one", command=["sleep", "1000"])
        host.write("data/a", "precious")
        try:
            before = runtime.status("one")
            lose(host)
            is_refused(host, make, "files of it")
            assert runtime.status("one") == before
            assert before.pid is not None
            os.kill(before.pid, 0)
            assert host.read("data/a") == "precious"
        finally:
            runtime.stop("one")
