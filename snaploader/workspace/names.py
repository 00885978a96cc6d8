"""Ids and names: which are allowed, and new ones that are unique."""

from __future__ import annotations

import re
import uuid
from datetime import datetime

from snaploader.errors import InvalidArgument

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
