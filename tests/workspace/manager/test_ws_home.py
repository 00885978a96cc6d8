"""One state directory for each host of a catalog: with another one nothing is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from manager_hosts import Host, HostFactory, open_host

from snaploader.errors import FailedPrecondition
from snaploader.workspace import WorkspaceState


def test_another_state_directory_of_the_same_host_is_refused_and_nothing_changes(
    host: Host, tmp_path: Path
) -> None:
    host.create()
    host.write("data/a", "precious")
    before = host.manager.events()
    with open_host(tmp_path / "elsewhere", host.catalog, None) as stranger:
        [problem] = stranger.manager.recover().problems
        for attempt in (
            lambda: stranger.manager.stop("one"),
            lambda: stranger.manager.pause("one"),
            lambda: stranger.manager.create_version("one"),
            lambda: stranger.manager.delete("one"),
            lambda: stranger.manager.create("two"),
        ):
            with pytest.raises(FailedPrecondition, match="recover with --rebind-state"):
                attempt()
        assert [each.id for each in stranger.manager.workspaces()] == ["one"]
        assert stranger.runtime.workspaces() == []
    assert str(host.folder) in problem.reason
    assert str(tmp_path / "elsewhere") in problem.reason
    assert host.manager.events() == before
    assert host.is_running()
    assert host.read("data/a") == "precious"
    assert host.findings() == []


def test_a_host_that_lost_its_state_directory_goes_on_with_another_when_told_to(
    host: Host, tmp_path: Path
) -> None:
    host.create()
    host.write("data/a", "kept")
    host.manager.create_version("one")
    host.runtime.stop("one")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(host.folder / "cache", elsewhere / "cache")
    with open_host(elsewhere, host.catalog, None) as after:
        assert after.manager.recover(rebind_state=True).problems == ()
        assert after.manager.workspace("one").state is WorkspaceState.RUNNING
        assert after.read("data/a") == "kept"
    with (
        open_host(host.folder, host.catalog, None, runtime=host.runtime) as late,
        pytest.raises(FailedPrecondition, match="elsewhere"),
    ):
        late.manager.stop("one")


def test_the_state_directory_of_another_host_is_refused(make_host: HostFactory) -> None:
    host = make_host()
    host.create()
    with (
        open_host(host.folder, host.catalog, None, host="other", runtime=host.runtime) as other,
        pytest.raises(FailedPrecondition, match="is that of host"),
    ):
        other.manager.create("two")
    assert host.findings() == []


def test_looking_claims_nothing(make_host: HostFactory) -> None:
    host = make_host()
    assert host.manager.workspaces() == []
    with host.catalog.reading() as reader:
        assert reader.host_state(host.manager.host) is None
    host.create()
    with host.catalog.reading() as reader:
        claimed = reader.host_state(host.manager.host)
    assert claimed is not None
    assert Path(claimed.state_directory, "state-id").read_text().strip() == claimed.state_id


def test_a_damaged_id_is_told_and_kept(host: Host) -> None:
    host.create()
    with host.catalog.reading() as reader:
        claimed = reader.host_state(host.manager.host)
    assert claimed is not None
    path = Path(claimed.state_directory, "state-id")
    path.write_text("?")
    with (
        open_host(host.folder, host.catalog, None, runtime=host.runtime) as again,
        pytest.raises(FailedPrecondition, match="is damaged"),
    ):
        again.manager.stop("one")
    assert path.read_text() == "?"
