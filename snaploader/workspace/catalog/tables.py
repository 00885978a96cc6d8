"""The tables of the catalog, as the newest migration leaves them. docs/formats/catalog.md describes them."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    UniqueConstraint,
)

from snaploader.workspace.catalog.columns import Choice, Document, Moment, OptionalWord, Prose, Word
from snaploader.workspace.model import (
    OperationKind,
    OwnerStatus,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotSource,
    SnapshotStatus,
    WorkspaceState,
)

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_by_%(column_0_N_name)s",
        "uq": "%(table_name)s_have_one_%(column_0_N_name)s",
        "ck": "%(table_name)s_%(constraint_name)s",
        "fk": "%(table_name)s_%(column_0_name)s_is_known",
        "pk": "%(table_name)s_key",
    }
)

_SERIAL = BigInteger().with_variant(Integer, "sqlite")
"""Numbers that the database gives. SQLite does so for columns that are declared INTEGER only."""


def _one_of(column: str, enumeration: type[StrEnum]) -> CheckConstraint:
    values = ", ".join(f"'{each.value}'" for each in enumeration)
    return CheckConstraint(f"{column} IN ({values})", name=f"{column}_is_known")


policies = Table(
    "policies",
    metadata,
    Column("name", Word, primary_key=True),
    Column("settings", Document, nullable=False),
)

owners = Table(
    "owners",
    metadata,
    Column("name", Word, primary_key=True),
    Column("status", Choice(OwnerStatus), nullable=False),
    _one_of("status", OwnerStatus),
)

hosts = Table(
    "hosts",
    metadata,
    Column("name", Word, primary_key=True),
    Column("state_id", Word, nullable=False, unique=True),
    Column("state_directory", Prose, nullable=False),
    Column("state_place", Document),
)

ticks = Table(
    "ticks",
    metadata,
    Column("host", Word, primary_key=True),
    Column("latest_at", Moment, nullable=False),
    Column("previous_at", Moment),
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", Word, primary_key=True),
    Column("host", Word, nullable=False),
    Column("state", Choice(WorkspaceState), nullable=False),
    Column("owner", OptionalWord, ForeignKey("owners.name")),
    Column("base", Word, nullable=False),
    Column("policy", Word, ForeignKey("policies.name"), nullable=False),
    Column("autostart_schedule", Prose, nullable=False),
    Column("slot", BigInteger),
    Column("current_snapshot", Word, nullable=False),
    Column("base_snapshot", Word, nullable=False),
    Column("last_version", Integer, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("last_used_at", Moment, nullable=False),
    Column("paused_at", Moment),
    Column("dormant_at", Moment),
    Column("deleting_at", Moment),
    Column("due_at", Moment),
    Column("spec", Document, nullable=False),
    Column("operation_kind", Choice(OperationKind)),
    Column("operation_token", Word),
    Column("operation_host", Word),
    Column("operation_started_at", Moment),
    Column("operation_snapshot", Word),
    Column("operation_version", Integer),
    _one_of("state", WorkspaceState),
    CheckConstraint("last_version >= 0", name="last_version_is_a_number"),
    CheckConstraint(
        "(operation_kind IS NULL) = (operation_token IS NULL)"
        " AND (operation_kind IS NULL) = (operation_host IS NULL)"
        " AND (operation_kind IS NULL) = (operation_started_at IS NULL)",
        name="operation_is_whole",
    ),
    UniqueConstraint("host", "slot"),
    Index(None, "host", "due_at"),
    Index(None, "operation_host"),
    Index(None, "owner"),
    Index(None, "policy"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("name", Word, primary_key=True),
    Column("workspace_id", Word, ForeignKey("workspaces.id"), nullable=False),
    Column("runtime_name", Word, nullable=False),
    Column("kind", Choice(SnapshotKind), nullable=False),
    Column("scope", Choice(Scope), nullable=False),
    Column("source", Choice(SnapshotSource), nullable=False),
    Column("status", Choice(SnapshotStatus), nullable=False),
    Column("display_name", Prose, nullable=False),
    Column("parent", Word, nullable=False),
    Column("manifest_ref", Word, nullable=False),
    Column("is_remote", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    _one_of("kind", SnapshotKind),
    _one_of("scope", Scope),
    _one_of("source", SnapshotSource),
    _one_of("status", SnapshotStatus),
    CheckConstraint("size_bytes >= 0", name="size_is_a_number"),
    UniqueConstraint("runtime_name"),
    Index(None, "workspace_id", "created_at"),
    Index(None, "status"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("workspace_id", Word, ForeignKey("workspaces.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("snapshot_name", Word, ForeignKey("snapshots.name", ondelete="CASCADE"), nullable=False),
    Column("display_name", Prose, nullable=False),
    Column("created_at", Moment, nullable=False),
    CheckConstraint("number >= 1", name="number_begins_at_1"),
    UniqueConstraint("workspace_id", "number"),
    UniqueConstraint("snapshot_name"),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("workspace_id", Word, ForeignKey("workspaces.id"), nullable=False),
    Column("type", Word, nullable=False),
    Column("payload", Document, nullable=False),
    Column("created_at", Moment, nullable=False),
    Index(None, "workspace_id", "id"),
    sqlite_autoincrement=True,
)

runs = Table(
    "runs",
    metadata,
    Column("id", _SERIAL, primary_key=True),
    Column("workspace_id", Word, ForeignKey("workspaces.id"), nullable=False),
    Column("transition", Choice(RunTransition), nullable=False),
    Column("status", Choice(RunStatus), nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("completed_at", Moment),
    Column("deadline", Moment),
    Column("reason", Prose, nullable=False),
    Column("error", Prose, nullable=False),
    _one_of("transition", RunTransition),
    _one_of("status", RunStatus),
    Index(None, "workspace_id", "id"),
    sqlite_autoincrement=True,
)
