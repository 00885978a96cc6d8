"""The page on workspaces says what there is: states, operations, events, policies, lifecycle, recovery."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from snaploader.workspace.events import EVENT_TYPES
from snaploader.workspace.lifecycle import Metrics
from snaploader.workspace.manager import RecoverySummary, WorkspaceManager
from snaploader.workspace.model import OperationKind, WorkspaceState
from snaploader.workspace.policy import Policy, Transition

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs/workspaces.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading, with the sections in it."""
    level = re.search(rf"^(#+) {title}$", PAGE, re.MULTILINE)
    assert level is not None, title
    rest = PAGE[level.end() :]
    return re.split(rf"^#{{1,{len(level[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """What each row of a table, or entry of a list, begins with, without code marks."""
    rows = re.findall(r"^(?:\| *([^|]+?) *\||(?:- |(\d+\. ))\*\*(.+?)\*\*)", text, re.MULTILINE)
    return ["".join(row).replace("`", "") for row in rows]


def test_the_diagram_and_the_table_of_states_name_every_state() -> None:
    text = section("States")
    diagram = text.split("```")[1]
    for state in WorkspaceState:
        assert state.name in diagram
        assert state.value in first_cells(text)
    for operation in ("create", "fork", "start", "stop", "pause", "resume", "delete"):
        assert operation in diagram


def test_every_operation_of_the_manager_has_its_row() -> None:
    operations = {each.partition("(")[0] for each in first_cells(section("Operations"))}
    listed = {"list_snapshots", "list_versions", "version_snapshot_name", "workspaces", "events", "sizes"}
    kinds = {"create_snapshot" if kind is OperationKind.SNAPSHOT else kind.value for kind in OperationKind}
    assert kinds | {"create_version", "touch"} <= operations
    assert all(f"`{name}`" in section("Operations") for name in listed)
    assert all(hasattr(WorkspaceManager, name) for name in kinds | listed)


def test_every_type_of_event_is_named_and_no_other() -> None:
    source = "".join(path.read_text() for path in (CHECKOUT / "snaploader").rglob("*.py"))
    types = set(re.findall(r"^- \*\*`([a-z]+_[a-z]+)`\*\*: ", section("Events"), re.MULTILINE))
    assert len(types) >= 15
    assert all(f'"{each}"' in source for each in types)
    kinds = "workspace|snapshot|version|dormancy|operation|remote"
    written = set(re.findall(rf'^[A-Z_]+ = "((?:{kinds})_[a-z]+)"$', source, re.MULTILINE))
    assert len(written) >= 12
    assert written <= types == set(EVENT_TYPES)


def test_the_table_of_policies_has_every_field_as_users_spell_it() -> None:
    fields = [each for each in first_cells(section("Policies")) if re.fullmatch("[a-z]+[A-Z][A-Za-z]+", each)]
    with pytest.raises(Exception, match="the fields are") as refused:
        Policy.from_mapping("p", {"nothing": 1})
    known = str(refused.value).split("the fields are ")[1].split(", ")
    assert fields == known


def test_the_table_of_the_lifecycle_has_every_transition_in_order() -> None:
    rows = first_cells(section("Lifecycle"))[-len(Transition) :]
    assert rows == [f"{n}. {each.value.replace('_', ' ')}" for n, each in enumerate(Transition, start=1)]


def test_every_metric_is_named() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    text = section("Lifecycle")
    for metric in registry.collect():
        assert f"`{metric.name}" in text


def test_the_rules_of_recovery_name_what_is_set_aside_and_what_a_crash_leaves() -> None:
    text = section("Recovery")
    for word in (
        ".staging-",
        ".trash-",
        "newest",
        "slot",
        "unreadable|cannot be read",
        "bad id",
        "never raises",
    ):
        assert re.search(word, text), word
    killed = first_cells(section("What a crash leaves"))
    for kind in OperationKind:
        assert any(str(kind) in row for row in killed), kind
    for field in ("restored", "repaired", "pruned", "trashed"):
        assert field in RecoverySummary.__dataclass_fields__
        assert field in text
