"""Ids, names and durable directories: which are allowed, and new ones that are unique."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from datetime import datetime

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Volume

MAX_ID_LENGTH = 64
"""Longest workspace id: with a suffix it must stay a file name, and a pin's name."""

MAX_DISPLAY_NAME_LENGTH = 200
"""Longest name that a snapshot is shown under."""

_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


def check_workspace_id(workspace_id: str) -> str:
    """`workspace_id`, if it is one: 1 to 64 lower-case letters, digits and inner hyphens."""
    if not isinstance(workspace_id, str) or not _ID.fullmatch(workspace_id):
        raise InvalidArgument(
            f"{str(workspace_id)[:80]!r} is no workspace id: use 1 to {MAX_ID_LENGTH} lower-case letters, "
            "digits and hyphens, beginning and ending with a letter or digit"
        )
    return workspace_id


def new_workspace_id() -> str:
    """A workspace id that no one else has."""
    return f"ws-{uuid.uuid4().hex[:20]}"


def new_snapshot_name(workspace_id: str, now: datetime) -> str:
    """A name for a snapshot: sorts by time, and is unique even within one tick of the clock."""
    return f"{workspace_id}.{now:%Y%m%dT%H%M%S}.{uuid.uuid4().hex[:16]}"


def runtime_name(workspace_id: str, snapshot_name: str) -> str:
    """What the loader calls a workspace's snapshot: its snapshot id."""
    return f"workspaces/{workspace_id}/{snapshot_name}"


def check_display_name(name: str) -> str:
    """`name` if a snapshot can be shown under it, which an empty one leaves to others."""
    if not isinstance(name, str) or len(name) > MAX_DISPLAY_NAME_LENGTH or not name.isprintable():
        raise InvalidArgument(
            f"{str(name)[:80]!r} is no name for a snapshot: use up to {MAX_DISPLAY_NAME_LENGTH} printable "
            "characters"
        )
    return name


def pin_name(snapshot_name: str) -> str:
    """Name of the pin that keeps a workspace's snapshot in the local file cache."""
    return f"workspace.{snapshot_name}"


MAX_VOLUMES = 100
"""Most durable directories of one workspace."""

MAX_PATH_BYTES = 4095
"""Longest path of one, in UTF-8 bytes; Linux takes no longer ones."""


def check_volumes(volumes: Iterable[Volume]) -> tuple[Volume, ...]:
    """The volumes, with their paths in normal form, if a workspace can have them together.

    Raises:
        InvalidArgument: a name or a path is repeated, a path is not absolute, has a component `..`, is
            the root, or lies within another.
    """
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
