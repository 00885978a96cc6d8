"""`due_at`: right after every kind of change, and one indexed query to read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import pytest
from catalog_data import HOST, NOON, add, later, workspace
from hypothesis import given, settings, strategies as st
from sqlalchemy import event, insert, select, text

from snaploader.errors import FailedPrecondition, NotFound
from snaploader.workspace.catalog import Catalog, DueWorkspace, Transaction, tables
from snaploader.workspace.catalog.tables import workspace_values
from snaploader.workspace.model import OwnerStatus, RunStatus, RunTransition, Workspace, WorkspaceState
from snaploader.workspace.policy import DEFAULT_POLICY, Policy
from snaploader.workspace.schedule import Weekday

IDS = ["a", "b"]
OWNERS = ["", "eve", "mallory"]
POLICIES = [DEFAULT_POLICY, "strict"]
EVER_AFTER = later(days=100_000)

moments = st.integers(0, 10**6).map(lambda seconds: later(seconds=seconds))
durations = st.one_of(st.none(), st.integers(1, 10**6).map(lambda seconds: timedelta(seconds=seconds)))
schedules = st.sampled_from(["", "30 9 * * 1-5", "CRON_TZ=Europe/Berlin 0 3 * * *", "no schedule"])
ids = st.sampled_from(IDS)
states = st.sampled_from([WorkspaceState.RUNNING, *WorkspaceState])
new_workspaces = st.builds(
    workspace,
    ids,
    state=states,
    owner=st.sampled_from(OWNERS),
    policy=st.sampled_from(POLICIES),
    autostart_schedule=schedules,
    last_used_at=moments,
    dormant_at=st.none() | moments,
    deleting_at=st.none() | moments,
)
updates = st.fixed_dictionaries(
    {},
    optional={
        "state": states,
        "owner": st.sampled_from(OWNERS),
        "policy": st.sampled_from(POLICIES),
        "autostart_schedule": schedules,
        "last_used_at": moments,
        "dormant_at": st.none() | moments,
        "deleting_at": st.none() | moments,
    },
)
policies = st.builds(
    Policy,
    st.sampled_from(POLICIES),
    autostart_allowed=st.booleans(),
    autostart_weekdays=st.none() | st.just(frozenset({Weekday.TUE})),
    failure_ttl=durations,
    time_until_dormant=durations,
)
beginnings = st.tuples(
    st.builds(Policy, st.just("strict"), failure_ttl=durations, time_until_dormant=durations),
    st.lists(new_workspaces, min_size=1, max_size=3, unique_by=lambda each: each.id),
)
changes = st.one_of(
    st.tuples(st.just("add_workspace"), new_workspaces),
    st.tuples(st.just("update_workspace"), ids, updates),
    st.tuples(st.just("add_run"), ids, st.sampled_from(RunTransition), moments, st.none() | moments),
    st.tuples(st.just("finish_run"), ids, st.sampled_from([RunStatus.SUCCEEDED, RunStatus.FAILED]), moments),
    st.tuples(st.just("put_policy"), policies),
    st.tuples(st.just("set_owner_status"), st.sampled_from(OWNERS[1:]), st.sampled_from(OwnerStatus)),
    st.tuples(st.just("forget_workspace"), ids),
    st.tuples(st.just("remove_policy"), st.just("strict")),
)


def _apply(transaction: Transaction, change: tuple[Any, ...]) -> None:
    """Make a change, if it is possible just now."""
    kind, *arguments = change
    if kind in {"put_policy", "set_owner_status"}:
        getattr(transaction, kind)(*arguments)
    else:
        with contextlib.suppress(NotFound, FailedPrecondition):
            _CHANGES[kind](transaction, *arguments)


def _update(transaction: Transaction, workspace_id: str, changes: dict[str, Any]) -> None:
    if changes.get("policy") == "strict":
        transaction.put_policy(Policy("strict", failure_ttl=timedelta(hours=1)))
    transaction.update_workspace(workspace_id, **changes)


def _add_run(
    transaction: Transaction,
    workspace_id: str,
    transition: RunTransition,
    created_at: datetime,
    deadline: datetime | None,
) -> None:
    transaction.add_run(workspace_id, transition, created_at, "user", deadline)


def _finish_run(
    transaction: Transaction, workspace_id: str, status: RunStatus, completed_at: datetime
) -> None:
    if (run := transaction.latest_run(workspace_id)) is not None:
        transaction.finish_run(run.id, status, completed_at)


_CHANGES: dict[str, Callable[..., None]] = {
    "add_workspace": Transaction.add_workspace,
    "update_workspace": _update,
    "add_run": _add_run,
    "finish_run": _finish_run,
    "forget_workspace": Transaction.forget_workspace,
    "remove_policy": Transaction.remove_policy,
}


def _kept(catalog: Catalog) -> dict[str, datetime | None]:
    with catalog._engine.connect() as connection:
        return dict(connection.execute(select(tables.workspaces.c.id, tables.workspaces.c.due_at)).all())  # type: ignore[arg-type]


def _recomputed(catalog: Catalog) -> dict[str, datetime | None]:
    with catalog.reading() as reader:
        return {
            each.id: reader.situation(each.id).earliest_due()
            for each in reader.workspaces(include_deleted=True)
        }


def _empty(catalog: Catalog) -> None:
    with catalog._engine.connect() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(table.delete())
        connection.execute(
            insert(tables.policies), {"name": DEFAULT_POLICY, "settings": Policy().to_mapping()}
        )
        connection.commit()


@pytest.fixture(scope="module")
def shared(
    database: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Catalog]:
    """One catalog for all examples: each empties it, which is faster than a new one."""
    server = request.getfixturevalue("_idle_postgresql")
    name = server.lend_catalog() if database == "postgresql" else ""
    url = server.url(name) if name else f"sqlite:///{tmp_path_factory.mktemp('due')}/catalog.db"
    with Catalog.open(url) as catalog:
        yield catalog
    if name:
        server.take_back(name)


@pytest.mark.slow
@settings(max_examples=60)
@given(beginnings, st.lists(st.lists(changes, min_size=1, max_size=2), min_size=2, max_size=8))
def test_it_is_right_after_every_change(
    shared: Catalog, beginning: tuple[Policy, list[Workspace]], history: list[list[tuple[Any, ...]]]
) -> None:
    _empty(shared)
    policy, workspaces = beginning
    with shared.transaction() as transaction:
        transaction.put_policy(policy)
        for each in workspaces:
            transaction.add_workspace(each)
    assert _kept(shared) == _recomputed(shared)
    for block in history:
        with shared.transaction() as transaction:
            for change in block:
                _apply(transaction, change)
        assert _kept(shared) == _recomputed(shared)


class Statement(NamedTuple):
    text: str
    parameters: Any


@contextmanager
def _statements(catalog: Catalog) -> Iterator[list[Statement]]:
    """What is asked of the database in the block."""
    seen: list[Statement] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        seen.append(Statement(statement, parameters))

    event.listen(catalog._engine, "before_cursor_execute", note)
    yield seen
    event.remove(catalog._engine, "before_cursor_execute", note)


STRICT = Policy("strict", time_until_dormant=timedelta(hours=1))


@pytest.fixture
def followed(catalog: Catalog) -> Catalog:
    """A catalog with workspaces that a policy and an owner have in common, and some that have neither."""
    with catalog.transaction() as transaction:
        transaction.put_policy(STRICT)
    add(
        catalog,
        workspace("policy", policy="strict"),
        workspace("owner", owner="eve"),
        workspace("both", policy="strict", owner="eve"),
        workspace("neither"),
        workspace("deleted", policy="strict", owner="eve", state=WorkspaceState.DELETED),
    )
    return catalog


def _due(catalog: Catalog, tick: datetime, **arguments: Any) -> list[str]:
    with catalog.reading() as reader:
        return sorted(each.id for each in reader.due(tick, host=HOST, **arguments))


def test_a_workspace_is_due_from_its_moment_on(followed: Catalog) -> None:
    assert _due(followed, later(hours=1)) == []
    assert _due(followed, later(hours=1, microseconds=1)) == ["both", "policy"]
    assert _due(followed, EVER_AFTER) == ["both", "policy"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tx: tx.add_workspace(workspace("new", policy="strict")),
        lambda tx: tx.update_workspace("neither", policy="strict"),
        lambda tx: tx.update_workspace(
            "neither", state=WorkspaceState.STOPPED, autostart_schedule="0 3 * * *"
        ),
        lambda tx: (
            tx.put_policy(Policy("deletes", delete_after_dormant=timedelta(days=1))),
            tx.update_workspace("neither", policy="deletes", dormant_at=NOON, deleting_at=NOON),
        ),
        lambda tx: tx.add_run("neither", RunTransition.START, NOON, "user", deadline=NOON),
    ],
)
def test_a_change_makes_a_workspace_due(followed: Catalog, change: Callable[[Transaction], object]) -> None:
    with followed.transaction() as transaction:
        change(transaction)
    assert len(_due(followed, EVER_AFTER)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda tx: tx.update_workspace("policy", policy=DEFAULT_POLICY),
        lambda tx: tx.update_workspace("policy", state=WorkspaceState.DELETED),
        lambda tx: tx.update_workspace("policy", host="host-b"),
        lambda tx: tx.forget_workspace("policy"),
    ],
)
def test_a_change_makes_a_workspace_not_due(
    followed: Catalog, change: Callable[[Transaction], object]
) -> None:
    with followed.transaction() as transaction:
        change(transaction)
    assert _due(followed, EVER_AFTER) == ["both"]


def test_the_end_of_a_run_counts(followed: Catalog) -> None:
    with followed.transaction() as transaction:
        run = transaction.add_run("neither", RunTransition.START, NOON, "user", deadline=NOON)
    with followed.transaction() as transaction:
        transaction.finish_run(run.id, RunStatus.FAILED, NOON)
    assert _due(followed, EVER_AFTER) == ["both", "policy"]


def test_a_changed_policy_concerns_all_that_follow_it(followed: Catalog) -> None:
    with followed.transaction() as transaction:
        transaction.put_policy(Policy("strict", time_until_dormant=timedelta(hours=2)))
    assert _due(followed, later(hours=2)) == []
    assert _due(followed, later(hours=2, microseconds=1)) == ["both", "policy"]
    with followed.transaction() as transaction:
        transaction.put_policy(Policy("strict"))
    assert _due(followed, EVER_AFTER) == []


def test_a_suspended_owner_concerns_all_workspaces_of_theirs(followed: Catalog) -> None:
    with followed.transaction() as transaction:
        transaction.set_owner_status("eve", OwnerStatus.SUSPENDED)
    assert _due(followed, NOON) == ["both", "owner"]
    with followed.transaction() as transaction:
        transaction.set_owner_status("eve", OwnerStatus.ACTIVE)
    assert _due(followed, NOON) == []


def test_those_of_another_host_are_not_due_here(followed: Catalog) -> None:
    add(followed, workspace("far", policy="strict", host="host-b"))
    assert _due(followed, EVER_AFTER) == ["both", "policy"]
    with followed.reading() as reader:
        assert reader.due(EVER_AFTER, host="host-b") == [DueWorkspace("far", "")]


def test_the_longest_due_come_first_and_limited(followed: Catalog) -> None:
    add(followed, workspace("early", policy="strict", base="debian", last_used_at=later(hours=-1)))
    with followed.reading() as reader:
        assert reader.due(EVER_AFTER, host=HOST, limit=1) == [DueWorkspace("early", "debian")]


def test_a_policy_of_many_workspaces_settles_them_in_few_statements(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snaploader.workspace.catalog.reader._BATCH", 40)
    with catalog.transaction() as transaction:
        transaction.put_policy(Policy("strict"))
    with catalog._engine.begin() as connection:
        values = [workspace_values(workspace(f"w{number:03}", policy="strict")) for number in range(100)]
        connection.execute(insert(tables.workspaces), values)
    with _statements(catalog) as statements, catalog.transaction() as transaction:
        transaction.put_policy(STRICT)
    assert len(_due(catalog, EVER_AFTER)) == 100
    assert len(statements) < 20


def test_asking_for_the_due_is_one_statement(followed: Catalog) -> None:
    with followed.reading() as reader, _statements(followed) as statements:
        reader.due(EVER_AFTER, host=HOST)
    assert len(statements) == 1


def test_asking_for_the_due_uses_the_index(catalog: Catalog) -> None:
    with catalog._engine.begin() as connection:
        values = [
            {**workspace_values(workspace(f"w{number:04}")), "due_at": later(hours=number)}
            for number in range(2000)
        ]
        connection.execute(insert(tables.workspaces), values)
        connection.execute(text("ANALYZE"))
    with catalog.reading() as reader, _statements(catalog) as statements:
        assert len(reader.due(later(hours=19), host=HOST)) == 20
    explain = "EXPLAIN QUERY PLAN" if catalog.dialect == "sqlite" else "EXPLAIN"
    with catalog._engine.connect() as connection:
        (query,) = statements
        rows = connection.exec_driver_sql(f"{explain} {query.text}", query.parameters).all()
    plan = "\n".join(map(str, rows))
    assert "workspaces_by_host_due_at" in plan
    assert not any(word in plan for word in ("Seq Scan", "SCAN", "TEMP B-TREE", "Sort"))
