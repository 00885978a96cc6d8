"""Which durable directories a workspace may have. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from snaploader.errors import InvalidArgument
from snaploader.formats.manifest import check_name
from snaploader.workspace.model import Volume

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
        check_name(volume.name)
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
        check_name(part)
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
