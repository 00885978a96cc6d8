"""What a workspace is made of: the values that the catalog keeps and the manager returns, and their names.

All are immutable. Times are aware datetimes in UTC; what the catalog keeps of them is whole microseconds.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urlsplit

from snaploader.errors import InvalidArgument

MAX_TTL = timedelta(days=366)
"""Longest time that a workspace may be given to run."""

MAX_VERSION = 2**31 - 1
"""Largest version number."""

MAX_ID_LENGTH = 64
"""Longest workspace id: with a suffix it must stay a file name, and a pin's name."""

MAX_DISPLAY_NAME_LENGTH = 200
"""Longest name that a snapshot is shown under."""

MAX_SOURCE_LENGTH = 200
"""Longest text that says why a snapshot was taken."""

MAX_VOLUMES = 100
"""Most durable directories of one workspace."""

MAX_LABELS = 64
"""Most labels of one workspace."""

MAX_LABEL_LENGTH = 63
"""Longest name of a label; its value may have `MAX_TEXT_LENGTH` characters."""

MAX_DEVICES = 100
"""Most devices of one workspace."""

MAX_TEXT_LENGTH = 255
"""Longest name of an image or a device, and longest value of a label."""

MAX_PATH_BYTES = 4095
"""Longest path of one, in UTF-8 bytes; Linux takes no longer ones."""

_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?")
_MAX_PORT = 65535

NO_CHECK = "none"
"""Kind of the readiness check of a workspace that is ready as soon as it runs."""


class Scope(StrEnum):
    """What a snapshot of a workspace holds."""

    FULL = "Full"
    """Memory and the whole file system, durable directories included."""
    DATA = "Data"
    """The durable directories alone; the process starts fresh on resume."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scope of that name, in any case. InvalidArgument when there is none."""
        for scope in cls:
            if isinstance(text, str) and scope.value.lower() == text.lower():
                return scope
        raise InvalidArgument(f"there is no scope {text!r}: use Full or Data")

    def includes(self, other: Scope) -> bool:
        """Whether a snapshot of this scope holds all that one of the other does."""
        return self is Scope.FULL or other is Scope.DATA


class SnapshotSource(StrEnum):
    """Why a snapshot was taken: the well-known reasons, beside which any printable text is one."""

    MANUAL = "manual"
    PRE_EXEC = "pre_exec"
    """Before something was executed in the workspace."""
    ROLLBACK = "rollback"
    """To keep the state that a rollback left behind."""

    @classmethod
    def parse(cls, text: str) -> str:
        """Return the well-known source of that name, or the text itself, without white space around it.

        Empty means `manual`. InvalidArgument when it is longer than 200 characters, or not printable.
        """
        words = check_printable(text, "source of a snapshot", MAX_SOURCE_LENGTH) or cls.MANUAL
        return next((source for source in cls if source == words), words)


class SnapshotKind(StrEnum):
    """What a snapshot is to its workspace."""

    VERSION = "version"
    """A numbered point to roll back to."""
    PAUSE = "pause"
    """The state of a paused workspace. Local and temporary: the next capture takes its place."""
    COMMIT = "commit"
    """Durable, in the remote cache; workspaces can be forked from it."""
    BASE = "base"
    """What a workspace began as: the content it was created from, or the commit it was forked from."""


class SnapshotStatus(StrEnum):
    """How far a snapshot has come. Only complete ones are shown."""

    PENDING = "pending"
    """Being taken. Left so by a crash, recovery removes it."""
    COMPLETE = "complete"
    ORPHANED = "orphaned"
    """A commit that failed: its blobs may be in the remote cache, for the next try to find."""
    DELETING = "deleting"
    """On its way out. Left so by a crash, recovery finishes it."""


class WorkspaceState(StrEnum):
    """Where a workspace is between its operations."""

    RUNNING = "running"
    STOPPED = "stopped"
    """No process; its files stay on the host."""
    PAUSED = "paused"
    """Parked: no process and no files on the host but its snapshot; it holds its slot."""
    DELETED = "deleted"
    """Gone but for its events. Its id is never used again."""


STOP_EVENT = "workspace_stop"
"""Type of the event of a workspace that was stopped, or whose stop failed."""


class OperationKind(StrEnum):
    """What can be under way on a workspace."""

    CREATE = "create"
    SNAPSHOT = "snapshot"
    ROLLBACK = "rollback"
    PAUSE = "pause"
    RESUME = "resume"
    COMMIT = "commit"
    FORK = "fork"
    START = "start"
    STOP = "stop"
    DELETE = "delete"


class RunTransition(StrEnum):
    """What a run did to a workspace."""

    START = "start"
    STOP = "stop"
    DELETE = "delete"


class RunStatus(StrEnum):
    """How a run ended, or that it has not."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class OwnerStatus(StrEnum):
    """Whether a workspace's owner may use it."""

    ACTIVE = "active"
    DORMANT = "dormant"
    """Was not seen for long: no schedule starts its workspaces, and what runs goes on until its deadline."""
    SUSPENDED = "suspended"
    """May not use workspaces: those that run are stopped, and none is started."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A durable directory. `check_volumes` checks several together."""

    name: str
    durable_dir: str
    """Where it is mounted: an absolute path as the workspace sees it."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """How to tell that a started workspace is ready.

    Raises:
        InvalidArgument: the target does not fit the kind, or a time is not above 0 s. Whether there is a
            check of that kind is for the runtime to say.
    """

    kind: str = NO_CHECK
    """`none`, `tcp`, `http` or `command`, or the name of a check that the runtime was given."""
    target: str = ""
    """tcp: "host:port", with a port of 1 to 65535; http: a URL, ready at a status of 200 to 399; command: a
    shell command that runs in the workspace, ready when it exits with 0."""
    interval_s: float = 0.1
    """Pause between two tries."""
    timeout_s: float = 60.0
    """How long to try."""

    def __post_init__(self) -> None:
        if not self.target and self.kind in {"tcp", "http", "command"}:
            raise InvalidArgument(f"a readiness check of kind {self.kind!r} needs a target")
        if self.kind == "tcp":
            parse_address(self.target)
        if self.kind == "http":
            parse_url(self.target)
        if not self.interval_s > 0 or not self.timeout_s > 0:
            raise InvalidArgument("the interval and the timeout of a readiness check must be above 0 s")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a workspace gets of its host. None: what the runtime gives by default.

    Raises:
        InvalidArgument: a number is not a whole one above 0.
    """

    vcpus: int | None = None
    """Virtual processors."""
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("vcpus", "memory_bytes"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
                raise InvalidArgument(f"{name} of a workspace is {value!r}: use a whole number above 0")


@dataclass(frozen=True, slots=True)
class WorkspaceSpec:
    """What a runtime needs to run a workspace. Set at creation; only an update of its template changes it.

    `check_spec` says what it may hold.
    """

    workspace_id: str
    command: tuple[str, ...] = ()
    """What runs in it. Empty: nothing runs, and the workspace counts as started."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to what the runtime sets."""
    volumes: tuple[Volume, ...] = ()
    readiness: Readiness = field(default_factory=Readiness)
    image: str = ""
    """What the runtime makes it of, in the runtime's own terms, such as `debian:12`; empty: its default."""
    devices: tuple[str, ...] = ()
    """Devices of the host that it gets, named likewise, such as `/dev/kvm` or `vendor.com/gpu=0`."""
    resources: Resources = field(default_factory=Resources)
    labels: Mapping[str, str] = field(default_factory=dict)
    """For people and programs to find it by. They mean nothing to the runtime."""

    def __post_init__(self) -> None:
        for name in ("environment", "labels"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, slots=True)
class Operation:
    """What is under way on a workspace; kept until it is done, so that recovery can finish or undo it."""

    kind: OperationKind
    token: str
    """Unique. Whoever ends the operation must still find it."""
    host: str
    started_at: datetime
    snapshot_name: str = ""
    """Name of the snapshot that it takes or goes back to."""
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace as the catalog knows it."""

    spec: WorkspaceSpec
    host: str
    state: WorkspaceState
    created_at: datetime
    last_used_at: datetime
    owner: str = ""
    base: str = ""
    """The template it was made from, or the like; neighbours of one base share chunks."""
    policy: str = "default"
    """Name of its policy."""
    autostart_schedule: str = ""
    """Cron expression with a time zone (see `Schedule`); empty: no autostart."""
    ttl: timedelta | None = None
    """How long it runs after a start, until its deadline; None: as its policy says."""
    template_version: int | None = None
    """The version of the template `base` that it was made from, or updated to; None: of none."""
    automatic_updates: bool = False
    """Whether its next start takes the active version of its template."""
    slot: int | None = None
    """Scarce resource of its host that it holds, such as a network index."""
    current_snapshot: str = ""
    """Name of the snapshot that its state goes on from; empty: none yet."""
    base_snapshot: str = ""
    """Name of its own snapshot, of kind `base`, that it began as; empty: it began empty."""
    last_version: int = 0
    paused_at: datetime | None = None
    dormant_at: datetime | None = None
    deleting_at: datetime | None = None
    """When a dormant one is to be deleted."""
    operation: Operation | None = None

    @property
    def id(self) -> str:
        return self.spec.workspace_id


def check_ttl(ttl: timedelta | None) -> timedelta | None:
    """Return it. InvalidArgument when it is not above zero, or is longer than a year."""
    if ttl is not None and not timedelta(0) < ttl <= MAX_TTL:
        raise InvalidArgument(f"a TTL must be above 0 s, and at most {MAX_TTL.days} days: it is {ttl}")
    return ttl


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot as the catalog knows it."""

    name: str
    """Unique in the catalog."""
    workspace_id: str
    runtime_name: str
    """Under which the loader finds it: its snapshot id."""
    kind: SnapshotKind
    scope: Scope
    source: str
    """Why it was taken: a `SnapshotSource`, or words of somebody's own."""
    created_at: datetime
    status: SnapshotStatus = SnapshotStatus.COMPLETE
    display_name: str = ""
    parent: str = ""
    """Name of the snapshot that the workspace's state went on from when this one was taken."""
    manifest_ref: str = ""
    """Key of its manifest in the local file cache, 64 hexadecimal digits; empty: not here."""
    is_remote: bool = False
    """Whether it is in the remote cache."""
    size_bytes: int = 0
    """Content of all its files, holes left out."""


@dataclass(frozen=True, slots=True)
class Version:
    """A numbered snapshot. Numbers begin at 1 and have no gaps, unless the content of versions was lost."""

    id: int
    workspace_id: str
    number: int
    snapshot_name: str
    runtime_name: str
    display_name: str
    """As given, or "Version N"."""
    source: str
    """As in `SnapshotRecord`."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a workspace. Written with the change itself, in one transaction."""

    id: int
    """Rising, in the order of writing."""
    workspace_id: str
    type: str
    payload: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """One start, stop or delete of a workspace, for the lifecycle to decide by."""

    id: int
    workspace_id: str
    transition: RunTransition
    status: RunStatus
    created_at: datetime
    completed_at: datetime | None = None
    deadline: datetime | None = None
    """When a started one is to be stopped; None: never."""
    reason: str = ""
    """Who wanted it: "user", "recovery", or a lifecycle transition."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """What taking a snapshot returns."""

    workspace_id: str
    snapshot_name: str
    runtime_name: str
    display_name: str
    version: int | None
    """None for what is no version: a pause or a commit."""
    created_at: datetime
    scope: Scope
    read_bytes: int = 0
    """Content that was read for it."""
    stored_bytes: int = 0
    """Content that was new to the local cache."""
    uploaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot of a workspace in a listing; one that the catalog does not manage has no record."""

    runtime_name: str
    """What the loader calls it: its snapshot id."""
    is_managed: bool
    """Whether the catalog knows it."""
    is_local: bool
    """Whether its manifest is in the local file cache."""
    record: SnapshotRecord | None = None
    version: int | None = None
    display_name: str = ""
    """As given, or "Version N"."""
    is_in_runtime: bool = False
    """Whether the runtime itself keeps it (see `Runtime.snapshots`)."""
    told: SnapshotRecord | None = None
    """What one that the catalog does not manage says of itself: what the manager wrote into its manifest."""


@dataclass(frozen=True, slots=True)
class HTTPTarget:
    """A URL to get."""

    is_encrypted: bool
    host: str
    port: int | None
    """None: the default port of its scheme."""
    path: str
    """The path with the query."""


def parse_address(target: str) -> tuple[str, int]:
    """Host and port of "host:port". No host means this machine; that of IPv6 may be in square brackets."""
    host, colon, port = target.rpartition(":")
    is_number = port.isascii() and port.isdecimal() and len(port) <= len(str(_MAX_PORT))
    if not colon or not is_number or not 0 < int(port) <= _MAX_PORT:
        raise InvalidArgument(
            f"{target!r} is no address to connect to: use host:port, with a port of 1 to {_MAX_PORT}"
        )
    return host.removeprefix("[").removesuffix("]") or "localhost", int(port)


def parse_url(target: str) -> HTTPTarget:
    """The parts of an HTTP URL. InvalidArgument when it is something else, or has no host."""
    try:
        parts = urlsplit(target)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"{target!r} is no URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not host:
        raise InvalidArgument(f"{target!r} is no URL to get: begin it with http:// or https:// and a host")
    path = parts.path or "/"
    return HTTPTarget(parts.scheme == "https", host, port, f"{path}?{parts.query}" if parts.query else path)


def check_workspace_id(workspace_id: str) -> str:
    """Return `workspace_id` if it is one (see `is_workspace_id`). InvalidArgument when it is none."""
    if not is_workspace_id(workspace_id):
        raise InvalidArgument(
            f"{str(workspace_id)[:80]!r} is no workspace id: use 1 to {MAX_ID_LENGTH} lower-case letters, "
            "digits and hyphens, beginning and ending with a letter or digit"
        )
    return workspace_id


def is_workspace_id(text: object) -> bool:
    """Whether this can be a workspace's id: 1 to 64 lower-case letters, digits and inner hyphens."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def new_workspace_id() -> str:
    return f"ws-{uuid.uuid4().hex[:20]}"


def new_snapshot_name(workspace_id: str, now: datetime) -> str:
    """A name for a snapshot: sorts by time, and is unique even within one tick of the clock."""
    return f"{workspace_id}.{now:%Y%m%dT%H%M%S}.{uuid.uuid4().hex[:16]}"


def runtime_name(workspace_id: str, snapshot_name: str) -> str:
    """The snapshot id by which the loader knows a workspace's snapshot."""
    return f"workspaces/{workspace_id}/{snapshot_name}"


def check_display_name(name: str) -> str:
    """Return `name` without white space around it, if a snapshot can be shown under it, or if it is empty.

    InvalidArgument when it is longer than 200 characters, or not printable.
    """
    return check_printable(name, "name for a snapshot", MAX_DISPLAY_NAME_LENGTH)


def check_printable(text: str, what: str, max_length: int = MAX_DISPLAY_NAME_LENGTH) -> str:
    """Return `text` without white space around it. InvalidArgument when it is too long, or not printable."""
    words = text.strip() if isinstance(text, str) else ""
    if not isinstance(text, str) or len(words) > max_length or not words.isprintable():
        raise InvalidArgument(f"{str(text)[:80]!r} is no {what}: use up to {max_length} printable characters")
    return words


def pin_name(snapshot_name: str) -> str:
    """Name of the pin that keeps a workspace's snapshot in the local file cache."""
    return f"workspace.{snapshot_name}"


def check_spec(spec: WorkspaceSpec) -> WorkspaceSpec:
    """Return the spec with its volumes in normal form, if a workspace can have it.

    InvalidArgument for what is malformed or too much, TypeError for what is no text.
    """
    for what, texts in (
        ("command", spec.command),
        ("environment", [*spec.environment, *spec.environment.values()]),
        ("labels", [*spec.labels, *spec.labels.values()]),
        ("devices", spec.devices),
        ("image", [spec.image]),
    ):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"the {what} of a workspace must be of str: it holds {text!r}")
    check_workspace_id(spec.workspace_id)
    check_labels(spec.labels)
    for what, texts in (("image", [spec.image] if spec.image else []), ("device", spec.devices)):
        for text in texts:
            if not text or len(text) > MAX_TEXT_LENGTH or not text.isprintable() or " " in text:
                raise InvalidArgument(
                    f"{text[:80]!r} is no {what}: use 1 to {MAX_TEXT_LENGTH} printable characters, no spaces"
                )
    if len(spec.devices) > MAX_DEVICES:
        raise InvalidArgument(f"a workspace may have no more than {MAX_DEVICES} devices")
    if len(set(spec.devices)) < len(spec.devices):
        raise InvalidArgument("a device of a workspace is named twice")
    return replace(spec, volumes=check_volumes(spec.volumes))


def check_labels(labels: Mapping[str, str]) -> None:
    """InvalidArgument unless a workspace can have these labels.

    A name is 1 to 63 letters, digits and inner `.`, `_`, `-`, `/`; a value up to 255 printable characters.
    """
    if len(labels) > MAX_LABELS:
        raise InvalidArgument(f"a workspace may have no more than {MAX_LABELS} labels")
    for name, value in labels.items():
        if len(name) > MAX_LABEL_LENGTH or not _LABEL.fullmatch(name):
            raise InvalidArgument(
                f"{name[:80]!r} is no name of a label: use 1 to {MAX_LABEL_LENGTH} letters, digits and inner "
                "'.', '_', '-' and '/'"
            )
        if len(value) > MAX_TEXT_LENGTH or not value.isprintable():
            raise InvalidArgument(
                f"label {name!r} cannot be {value[:80]!r}: use up to {MAX_TEXT_LENGTH} printable characters"
            )


def check_volumes(volumes: Iterable[Volume]) -> tuple[Volume, ...]:
    """Return the volumes with their paths in normal form, if a workspace can have them together."""
    checked: list[Volume] = []
    for volume in volumes:
        _check_name(volume.name)
        path = _normal(volume)
        for other in checked:
            _check_apart(Volume(volume.name, path), other)
        checked.append(Volume(volume.name, path))
        if len(checked) > MAX_VOLUMES:
            raise InvalidArgument(f"a workspace may have no more than {MAX_VOLUMES} durable directories")
    return tuple(checked)


def _normal(volume: Volume) -> str:
    """The path without empty components and `.`; components such as `..config` and `x..y` are names."""
    path = volume.durable_dir
    if not isinstance(path, str):
        raise TypeError(f"the durable directory of volume {volume.name!r} must be a str")
    if "\0" in path or len(path.encode(errors="surrogateescape")) > MAX_PATH_BYTES:
        raise InvalidArgument(f"durable directory {path[:80]!r} of volume {volume.name!r} is no path")
    if not path.startswith("/"):
        raise InvalidArgument(
            f"durable directory {path!r} of volume {volume.name!r} is not absolute: begin it with '/'"
        )
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise InvalidArgument(
            f"durable directory {path!r} of volume {volume.name!r} has a component '..': write it without"
        )
    if not parts:
        raise InvalidArgument(
            f"durable directory {path!r} of volume {volume.name!r} is the root itself: name a folder in it"
        )
    for part in parts:
        _check_name(part)
    return "/" + "/".join(parts)


def _check_apart(volume: Volume, other: Volume) -> None:
    if volume.name == other.name:
        raise InvalidArgument(f"two volumes are named {volume.name!r}")
    if volume.durable_dir == other.durable_dir:
        raise InvalidArgument(
            f"volumes {other.name!r} and {volume.name!r} have one durable directory, {volume.durable_dir!r}"
        )
    inner, outer = sorted((volume, other), key=lambda each: len(each.durable_dir), reverse=True)
    if inner.durable_dir.startswith(outer.durable_dir + "/"):
        raise InvalidArgument(
            f"durable directory {inner.durable_dir!r} of volume {inner.name!r} lies within "
            f"{outer.durable_dir!r} of volume {outer.name!r}: durable directories may not overlap"
        )


def _check_name(name: str) -> None:
    from snaploader.formats.manifest import check_name  # protobuf, which a listing should not wait for

    check_name(name)
