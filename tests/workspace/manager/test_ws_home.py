"""One state directory for each host of a catalog: with another one nothing is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from manager_hosts import Host, HostFactory, open_host

from snaploader.errors import FailedPrecondition
from snaploader.workspace import WorkspaceState
from snaploader.workspace.host import is_same_place


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


def test_a_copy_of_the_state_directory_is_refused_until_it_is_said_to_be_the_one(
    host: Host, tmp_path: Path
) -> None:
    host.create()
    host.write("data/a", "kept")
    host.manager.create_version("one")
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copytree(host.folder / "state", copied / "state", symlinks=True)
    shutil.copytree(host.folder / "cache", copied / "cache")
    before = host.manager.events()
    with open_host(copied, host.catalog, None) as copy:
        [problem] = copy.manager.recover().problems
        with pytest.raises(FailedPrecondition, match=r"is a copy of that of host 'host-a'.*--rebind-state"):
            copy.manager.stop("one")
    assert str(host.folder) in problem.reason
    assert str(copied) in problem.reason
    assert host.manager.events() == before
    assert (host.is_running(), host.findings()) == (True, [])
    host.runtime.stop("one")
    with open_host(copied, host.catalog, None) as copy:  # brought back from a backup
        assert copy.manager.recover(rebind_state=True).problems == ()
        assert copy.read("data/a") == "kept"
        copy.manager.stop("one")
    with (
        open_host(host.folder, host.catalog, None, runtime=host.runtime) as late,
        pytest.raises(FailedPrecondition, match="is a copy"),
    ):
        late.manager.start("one")


def test_a_state_directory_that_was_renamed_is_the_same(make_host: HostFactory, tmp_path: Path) -> None:
    host = make_host()
    host.create()
    (host.folder / "state").rename(tmp_path / "state")
    shutil.copytree(host.folder / "cache", tmp_path / "cache")
    with open_host(tmp_path, host.catalog, None, runtime=host.runtime) as moved:
        assert moved.manager.stop("one").state is WorkspaceState.STOPPED


def test_a_host_of_an_earlier_release_is_known_from_its_next_operation_on(
    host: Host, make_host: HostFactory
) -> None:
    host.create()
    with host.catalog.transaction() as tx:
        state = tx.host_state("host-a")
        assert state is not None
        tx.claim_host(state._replace(place=None))
    make_host().manager.stop("one")
    with host.catalog.reading() as reader:
        assert reader.host_state("host-a") == state


HERE = {"machine": "m", "boot": "b", "device": 1, "inode": 7}


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        pytest.param({}, True, id="the same"),
        pytest.param({"inode": 8}, False, id="copied within a file system"),
        pytest.param({"device": 2}, False, id="copied to another file system, which gave it that inode"),
        pytest.param({"boot": "c", "device": 2}, True, id="after a reboot, devices numbered anew"),
        pytest.param({"boot": "c", "inode": 8}, False, id="copied, after a reboot"),
        pytest.param({"boot": "c", "machine": "n"}, False, id="image of the disk on another machine"),
        pytest.param({"boot": "c", "machine": ""}, True, id="after a reboot, where machines have no id"),
        pytest.param({"machine": "n"}, True, id="another container of the machine"),
    ],
)
def test_a_copy_is_told_by_where_it_lies(changes: dict[str, Any], is_same: bool) -> None:
    assert is_same_place(HERE, HERE | changes) is is_same
    assert is_same_place(HERE | changes, HERE) is is_same
