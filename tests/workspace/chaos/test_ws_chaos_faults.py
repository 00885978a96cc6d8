"""Two things that go wrong at once: what the catalog says and what runs agree all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from chaos_faults import FaultyCatalog
from chaos_world import DATA, Place, World, fill, opened

from snaploader.errors import SnaploaderError, Unavailable
from snaploader.testing import EmbeddedServer, Fault
from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.testing import FakeRuntime


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A remote cache."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, catalog_url: str, server: EmbeddedServer) -> Iterator[World]:
    """A world with a workspace that runs and has a version."""
    place = Place(str(tmp_path), catalog_url, server.url, is_fake=True)
    with opened(place, wrap=FaultyCatalog, workers=2) as world:
        world.manager.create("one", volumes=[DATA])
        fill(world.root("one"), "word")
        world.manager.create_version("one")
        yield world


def faulty(world: World) -> FaultyCatalog:
    return cast(FaultyCatalog, world.manager.catalog)


def fake(world: World) -> FakeRuntime:
    return cast(FakeRuntime, world.runtime)


def is_running(world: World) -> tuple[bool, bool]:
    """As the catalog says, and in truth."""
    state = world.manager.workspace("one").state
    return state is WorkspaceState.RUNNING, world.runtime.status("one").is_running


def test_a_commit_that_cannot_start_again_nor_be_withdrawn_leaves_the_workspace_as_recorded(
    world: World, server: EmbeddedServer
) -> None:
    fake(world).fail_next("start", Unavailable("no process"), times=2)
    server.faults.add(Fault(status="UNAVAILABLE", times=None))
    with pytest.raises(Unavailable):
        world.manager.commit("one")
    assert is_running(world) == (False, False)
    server.faults.clear()
    world.manager.recover()
    assert world.findings() == []


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("create_version", ["one"]), ("commit", ["one"]), ("stop", ["one"]), ("rollback", ["one", 1])],
)
def test_what_runs_although_starting_it_failed_is_recorded_as_running(
    world: World, method: str, arguments: list[Any]
) -> None:
    fake(world).fail_next("start", Unavailable("no answer"), times=9, after_effect=True)
    if method == "stop":
        fake(world).fail_next("stop", Unavailable("no answer"), after_effect=True)
    with suppress(Unavailable):
        getattr(world.manager, method)(*arguments)
    assert is_running(world) == (True, True)
    assert world.findings() == []


def test_what_a_recovery_started_although_that_failed_is_recorded_as_running(world: World) -> None:
    fake(world).end("one")
    fake(world).fail_next("start", Unavailable("no answer"), after_effect=True)
    world.manager.recover()
    assert is_running(world) == (True, True)
    assert world.findings() == []


@pytest.mark.parametrize("method", ["stop", "pause", "delete"])
def test_what_may_have_been_stopped_is_not_started_again(world: World, method: str) -> None:
    catalog = faulty(world)
    catalog.lose_answer(2, then_failing=5)
    with pytest.raises(Unavailable):
        getattr(world.manager, method)("one")
    catalog.disarm()
    assert is_running(world) == (False, False)
    world.manager.recover()
    assert world.findings() == []


@pytest.mark.parametrize(
    ("method", "blocks"), [("stop", 3), ("pause", 4), ("delete", 4), ("create_version", 3), ("commit", 3)]
)
def test_what_failed_before_it_was_recorded_runs_again_also_without_the_catalog(
    world: World, method: str, blocks: int
) -> None:
    catalog = faulty(world)
    fake(world).fail_next("stop", Unavailable("no answer"), after_effect=True)
    # What passes: the workspace is looked at, and the operation begins.
    catalog.arm(blocks, 20, is_after=False)
    with pytest.raises(Unavailable):
        getattr(world.manager, method)("one")
    catalog.disarm()
    assert is_running(world) == (True, True)
    world.manager.create_version("one")
    assert world.findings() == []


def test_creations_go_on_while_the_outcome_of_one_is_unknown(world: World) -> None:
    catalog = faulty(world)
    catalog.lose_answer(1)
    with pytest.raises(SnaploaderError):
        world.manager.create("two", volumes=[DATA])
    catalog.disarm()
    world.manager.create("three", volumes=[DATA])
    world.manager.recover()
    assert world.findings() == []
    assert [each.id for each in world.manager.workspaces()] == ["one", "three"]


def test_a_creation_that_surely_was_not_recorded_gives_its_slot_back(world: World) -> None:
    catalog = faulty(world)
    catalog.arm(0, 1, is_after=False)
    with pytest.raises(Unavailable):
        world.manager.create("two", volumes=[DATA])
    catalog.disarm()
    assert set(world.manager.slots.owners().values()) == {"one"}
