"""The tables of the catalog as it is after it was opened, and what their columns and rows mean.

Types of columns make values the same on every database, and raise InvalidArgument for those that it cannot
keep; functions turn rows into the values of `snaploader.workspace.model` and back. docs/formats/catalog.md
describes the tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set as AbstractSet
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    and_,
    case,
)
from sqlalchemy.sql.functions import coalesce
from sqlalchemy.types import TypeEngine

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import (
    Event,
    Operation,
    OperationKind,
    OwnerStatus,
    Readiness,
    Resources,
    Run,
    RunStatus,
    RunTransition,
    Scope,
    SnapshotKind,
    SnapshotRecord,
    SnapshotSource,
    SnapshotStatus,
    Version,
    Volume,
    Workspace,
    WorkspaceSpec,
    WorkspaceState,
    check_ttl,
)
from snaploader.workspace.templates import TemplateVersion

MAX_WORD_LENGTH = 255
"""Longest name, id or key, in characters; databases limit what an index takes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

E = TypeVar("E", bound=StrEnum)


class Moment(TypeDecorator[datetime]):
    """A time as whole microseconds since 1970 in UTC: sorts, compares and rounds alike everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise InvalidArgument(f"time {value} has no time zone: use aware ones")
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + value * _MICROSECOND


class Prose(TypeDecorator[str]):
    """Any text that every database can hold: without a zero byte or half a surrogate pair."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"text is wanted, not {type(value).__name__}")
        if "\0" in value:
            raise InvalidArgument(f"text {value[:40]!r} has a zero byte, which no database holds")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"text {value[:40]!r} is no Unicode") from None
        return value


class Word(Prose):
    """A name, id or key of at most 255 characters. Sorts by code points, whatever a database's language."""

    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # PostgreSQL sorts text as people of the database's language do, unless told otherwise.
        return Text(collation="C") if dialect.name == "postgresql" else Text()

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        word = super().process_bind_param(value, dialect)
        if word is not None and len(word) > MAX_WORD_LENGTH:
            raise InvalidArgument(
                f"{word[:40]!r}… has {len(word)} characters: a name may have no more than {MAX_WORD_LENGTH}"
            )
        return word


class Source(Prose):
    """Why a snapshot was taken: a well-known value comes back as the `SnapshotSource` that it is."""

    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else SnapshotSource.parse(value)


class OptionalWord(Word):
    """A `Word` whose absence is NULL in the database and empty text outside, so that keys can refer to it."""

    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return super().process_bind_param(value or None, dialect)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str:
        return value or ""


class Choice(TypeDecorator[E], Generic[E]):
    """One value of an enumeration, as its text."""

    impl = Text
    cache_ok = True

    def __init__(self, enumeration: type[E]) -> None:
        super().__init__()
        self.enumeration = enumeration

    def process_bind_param(self, value: E | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        try:
            return self.enumeration(value).value
        except ValueError:
            raise InvalidArgument(f"{value!r} is no {self.enumeration.__name__}") from None

    def process_result_value(self, value: str | None, dialect: Dialect) -> E | None:
        return None if value is None else self.enumeration(value)


class Document(TypeDecorator[Mapping[str, Any]]):
    """A JSON object, in ASCII: what is escaped can be any text, also what no database holds otherwise."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        try:
            return json.dumps(dict(value), separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"this cannot be written as JSON: {error}") from error

    def process_result_value(self, value: str | None, dialect: Dialect) -> Mapping[str, Any] | None:
        return None if value is None else json.loads(value)


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


def _choice(name: str, enumeration: type[StrEnum]) -> tuple[Column[Any], CheckConstraint]:
    """Return a column of one of these values, and what holds it to them."""
    values = ", ".join(f"'{each.value}'" for each in enumeration)
    constraint = CheckConstraint(f"{name} IN ({values})", name=f"{name}_is_known")
    return Column(name, Choice(enumeration), nullable=False), constraint


policies = Table(
    "policies", metadata, Column("name", Word, primary_key=True), Column("settings", Document, nullable=False)
)

owners = Table(
    "owners",
    metadata,
    Column("name", Word, primary_key=True),
    Column("status", Choice(OwnerStatus), nullable=False),
    CheckConstraint("status IN ('active', 'suspended')", name="status_is_known"),
)

hosts = Table(
    "hosts",
    metadata,
    Column("name", Word, primary_key=True),
    Column("state_id", Word, nullable=False, unique=True),
    Column("state_directory", Prose, nullable=False),
)

host_places = Table(
    "host_places",
    metadata,
    Column("host", Word, primary_key=True),
    Column("state_id", Word, nullable=False),
    Column("place", Document, nullable=False),
)

ticks = Table(
    "ticks",
    metadata,
    Column("host", Word, primary_key=True),
    Column("latest_at", Moment, nullable=False),
    Column("previous_at", Moment),
)

snapshot_sources = Table(
    "snapshot_sources",
    metadata,
    Column("name", Word, primary_key=True),
    Column("source", Source, nullable=False),
)

templates = Table(
    "templates",
    metadata,
    Column("name", Word, primary_key=True),
    Column("active_version", Integer, nullable=False),
    Column("last_version", Integer, nullable=False),
    Column("requires_active_version", Boolean, nullable=False),
)

template_versions = Table(
    "template_versions",
    metadata,
    Column("template", Word, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("spec", Document, nullable=False),
    Column("policy", Word, nullable=False),
    Column("message", Prose, nullable=False),
    Column("created_at", Moment, nullable=False),
)

dormant_owners = Table("dormant_owners", metadata, Column("name", Word, primary_key=True))

AUXILIARY = (host_places, ticks, snapshot_sources, dormant_owners, templates, template_versions)
"""Tables that no revision of the schema counts: a library that does not know them works without them."""

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", Word, primary_key=True),
    Column("host", Word, nullable=False),
    *_choice("state", WorkspaceState),
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
    Column("operation_snapshot", OptionalWord),
    Column("operation_version", Integer),
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
    *_choice("kind", SnapshotKind),
    *_choice("scope", Scope),
    *_choice("source", SnapshotSource),
    *_choice("status", SnapshotStatus),
    Column("display_name", Prose, nullable=False),
    Column("parent", Word, nullable=False),
    Column("manifest_ref", Word, nullable=False),
    Column("is_remote", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    CheckConstraint("size_bytes >= 0", name="size_is_a_number"),
    UniqueConstraint("runtime_name"),
    Index(None, "workspace_id", "created_at"),
    Index(None, "status"),
)

why = coalesce(snapshot_sources.c.source, snapshots.c.source)
"""Why a snapshot was taken, of rows of `explained_snapshots`."""

explained_snapshots = snapshots.outerjoin(snapshot_sources, snapshot_sources.c.name == snapshots.c.name)
"""Snapshots, each with the words that say why it was taken, where it has any."""

owner_status = case(
    (and_(owners.c.status == OwnerStatus.ACTIVE, dormant_owners.c.name.is_not(None)), OwnerStatus.DORMANT),
    else_=owners.c.status,
)
"""The status of rows of `known_owners`: a dormant owner is an active one to an earlier release."""

known_owners = owners.outerjoin(dormant_owners, dormant_owners.c.name == owners.c.name)
"""Owners, each with its row in `dormant_owners`, where it has one."""

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
    *_choice("transition", RunTransition),
    *_choice("status", RunStatus),
    Column("created_at", Moment, nullable=False),
    Column("completed_at", Moment),
    Column("deadline", Moment),
    Column("reason", Prose, nullable=False),
    Column("error", Prose, nullable=False),
    Index(None, "workspace_id", "id"),
    sqlite_autoincrement=True,
)


_RUN = tuple(Run.__dataclass_fields__)
_IN_SPEC = frozenset({"spec", "ttl", "template_version", "automatic_updates"})
"""Fields of a workspace in its column `spec`, where an earlier release leaves what it does not know."""
_WORKSPACE = tuple(Workspace.__dataclass_fields__.keys() - {*_IN_SPEC, "operation"})
_OPERATION = {
    "operation_kind": "kind",
    "operation_token": "token",
    "operation_host": "host",
    "operation_started_at": "started_at",
    "operation_snapshot": "snapshot_name",
    "operation_version": "version",
}
"""Columns of what is under way on a workspace, and the fields of `Operation` that they hold."""


def workspace_values(workspace: Workspace) -> dict[str, Any]:
    """Return the columns of a workspace but for `due_at`."""
    return {
        "id": workspace.id,
        **changed_values(workspace, {*_WORKSPACE, *_IN_SPEC}),
        **operation_values(workspace.operation),
    }


def changed_values(workspace: Workspace, names: AbstractSet[str]) -> dict[str, Any]:
    """Return the columns that hold fields of a workspace, all but `operation`."""
    values = {name: getattr(workspace, name) for name in names - _IN_SPEC}
    if names & _IN_SPEC:
        values["spec"] = {**spec_document(workspace.spec), **settings_document(workspace)}
    return values


def workspace_of(row: Row[Any]) -> Workspace:
    fields = row._mapping
    operation = None
    if row.operation_kind is not None:
        operation = Operation(**{name: fields[column] for column, name in _OPERATION.items()})
    values = {name: fields[name] for name in _WORKSPACE}
    return Workspace(spec=spec_of(row.id, row.spec), operation=operation, **settings_of(row.spec), **values)


def operation_values(operation: Operation | None) -> dict[str, Any]:
    """Return the columns of what is under way on a workspace; they are all None when nothing is."""
    return {column: getattr(operation, name, None) for column, name in _OPERATION.items()}


def settings_document(workspace: Workspace) -> dict[str, Any]:
    """Return what is set of a workspace's settings that an earlier release does not know."""
    settings = {
        **_ttl_document(workspace.ttl),
        "template_version": workspace.template_version,
        "automatic_updates": workspace.automatic_updates or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def settings_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a workspace that `settings_document` made plain values of."""
    return {
        "ttl": _ttl_of(document),
        "template_version": document.get("template_version"),
        "automatic_updates": document.get("automatic_updates", False),
    }


def _ttl_document(ttl: timedelta | None) -> dict[str, Any]:
    return {} if ttl is None else {"ttl_s": ttl.total_seconds()}


def _ttl_of(document: Mapping[str, Any]) -> timedelta | None:
    ttl_s = document.get("ttl_s")
    return None if ttl_s is None else check_ttl(timedelta(seconds=ttl_s))


def template_version_values(version: TemplateVersion) -> dict[str, Any]:
    """Return the columns of a version of a template."""
    names = ("template", "number", "policy", "message", "created_at")
    spec = {**spec_document(version.spec), **_ttl_document(version.ttl)}
    return {**{name: getattr(version, name) for name in names}, "spec": spec}


def template_version_of(row: Row[Any]) -> TemplateVersion:
    values = {name: value for name, value in row._mapping.items() if name != "spec"}
    return TemplateVersion(spec=spec_of("", row.spec), ttl=_ttl_of(row.spec), **values)


def spec_document(spec: WorkspaceSpec) -> dict[str, Any]:
    """Return a spec as plain values, without its id; what it may lack is left out where it does."""
    optional = {
        "image": spec.image,
        "devices": list(spec.devices),
        "resources": {name: value for name, value in asdict(spec.resources).items() if value is not None},
        "labels": dict(spec.labels),
    }
    return {
        "command": list(spec.command),
        "environment": dict(spec.environment),
        "volumes": [asdict(volume) for volume in spec.volumes],
        "readiness": asdict(spec.readiness),
        **{name: value for name, value in optional.items() if value},
    }


def spec_of(workspace_id: str, document: Mapping[str, Any]) -> WorkspaceSpec:
    """Return the spec that `spec_document` made plain values of."""
    return WorkspaceSpec(
        workspace_id=workspace_id,
        command=tuple(document["command"]),
        environment=document["environment"],
        volumes=tuple(Volume(**volume) for volume in document["volumes"]),
        readiness=Readiness(**document["readiness"]),
        image=document.get("image", ""),
        devices=tuple(document.get("devices", ())),
        resources=Resources(**document.get("resources", {})),
        labels=document.get("labels", {}),
    )


SNAPSHOT_COLUMNS = (*(each for each in snapshots.c if each.name != "source"), why.label("source"))
"""Of `explained_snapshots`: all that a `SnapshotRecord` has."""


def snapshot_of(row: Row[Any]) -> SnapshotRecord:
    """Return the snapshot of a row of `SNAPSHOT_COLUMNS`."""
    return SnapshotRecord(**row._mapping)


def version_of(row: Row[Any], runtime_name: str, source: str) -> Version:
    """Return the version of a row, whose snapshot has this runtime name and source."""
    return Version(
        id=row.id,
        workspace_id=row.workspace_id,
        number=row.number,
        snapshot_name=row.snapshot_name,
        runtime_name=runtime_name,
        display_name=row.display_name or f"Version {row.number}",
        source=source,
        created_at=row.created_at,
    )


def event_of(row: Row[Any]) -> Event:
    return Event(row.id, row.workspace_id, row.type, row.payload, row.created_at)


def run_of(row: Row[Any], prefix: str = "") -> Run:
    return Run(**{name: row._mapping[prefix + name] for name in _RUN})
