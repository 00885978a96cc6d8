"""What a snapshot is keyed by: the platform and environment of the task that runs in the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from snaploader.errors import InvalidArgument

MAX_TEXT_BYTES = 4096
"""Longest string that goes into a key, in UTF-8 bytes."""

MAX_PROPERTY_VALUE_BYTES = 64 << 10
"""Longest value of a platform property, in UTF-8 bytes."""

MAX_PROPERTIES = 10_000
"""Most platform properties, and most environment variables, of one task."""

Properties: TypeAlias = "Mapping[str, str] | Iterable[tuple[str, str]]"
"""Platform properties: a mapping, or pairs where a name is repeated (which REAPI allows)."""


def checked_text(value: str, what: str, limit: int = MAX_TEXT_BYTES) -> str:
    """`value`, if it can go into a key: InvalidArgument for a NUL, bad Unicode or more than `limit` bytes."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} {value[:80]!r} is not valid Unicode") from None
    if length > limit:
        raise InvalidArgument(f"{what} is {length} bytes long, {limit} are allowed: {value[:80]!r}…")
    if "\0" in value:
        raise InvalidArgument(f"{what} {value[:80]!r} contains a NUL character")
    return value


@dataclass(frozen=True, slots=True)
class SnapshotTask:
    """A task, as far as snapshots are concerned. Immutable, and thus safe to share between threads.

    Two tasks are equal when the same properties and variables were given, in whatever order.

    Raises:
        InvalidArgument: A string is too long, holds a NUL or is not valid Unicode; there are too many.
        TypeError: A name or value is not a string.
    """

    platform: tuple[tuple[str, str], ...] = ()
    """The effective platform properties, kept sorted by name, then by value (as REAPI's Platform is)."""
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The task's environment variables. A read-only copy of what was given."""
    instance_name: str = ""
    """The REAPI instance the task was sent to; snapshots of different instances never mix."""
    task_id: str = ""
    """Recorded with the snapshot; not part of any key."""
    invocation_id: str = ""
    """Recorded with the snapshot; not part of any key."""
    action_digest: str = ""
    """As `hash/size`. Recorded with the snapshot; not part of any key."""

    def __post_init__(self) -> None:
        platform = tuple(sorted((name, value) for name, value in self.platform))
        if len(platform) > MAX_PROPERTIES or len(self.environment) > MAX_PROPERTIES:
            raise InvalidArgument(
                f"a task of {len(platform)} platform properties and {len(self.environment)} environment "
                f"variables is refused: at most {MAX_PROPERTIES} of each are allowed"
            )
        for name, value in platform:
            checked_text(name, "the name of a platform property")
            checked_text(value, f"platform property {name!r}", MAX_PROPERTY_VALUE_BYTES)
        for name, value in self.environment.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"environment variable {name!r} must be a str and have a str as its value")
        for label in ("instance_name", "task_id", "invocation_id", "action_digest"):
            checked_text(getattr(self, label), label)
        object.__setattr__(self, "platform", platform)
        object.__setattr__(self, "environment", MappingProxyType(dict(self.environment)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled.
        ids = (self.instance_name, self.task_id, self.invocation_id, self.action_digest)
        return SnapshotTask, (self.platform, dict(self.environment), *ids)

    @classmethod
    def from_mapping(
        cls,
        platform: Properties = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        instance_name: str = "",
        task_id: str = "",
        invocation_id: str = "",
        action_digest: str = "",
    ) -> SnapshotTask:
        """A task from plain mappings; platform properties may also be pairs."""
        pairs = platform.items() if isinstance(platform, Mapping) else platform
        return cls(tuple(pairs), environment, instance_name, task_id, invocation_id, action_digest)

    @classmethod
    def from_messages(
        cls,
        action: object = None,
        command: object = None,
        execute_request: object = None,
        *,
        instance_name: str | None = None,
        task_id: str = "",
        invocation_id: str = "",
    ) -> SnapshotTask:
        """A task from Remote Execution API messages, of any generated stubs: only attributes are read.

        The action's platform wins over the command's, if it is set at all (REAPI, Action.platform);
        stubs from before it had one are fine. The environment is the command's. The instance name and
        action digest are the execute request's; an `instance_name` that is given wins.

        Raises:
            InvalidArgument: As the class does; also when a variable has two different values.
        """
        platform = _submessage(action, "platform")
        if platform is None:
            platform = _submessage(command, "platform")
        digest = _submessage(execute_request, "action_digest")
        if instance_name is None:
            instance_name = getattr(execute_request, "instance_name", "")
        return cls(
            tuple((item.name, item.value) for item in getattr(platform, "properties", ())),
            _environment(getattr(command, "environment_variables", ())),
            instance_name,
            task_id,
            invocation_id,
            f"{digest.hash}/{digest.size_bytes}" if digest is not None else "",
        )


def _submessage(message: object, name: str) -> Any:
    """A field that is a message, or None when it is not set or the stubs do not know it."""
    has_field = getattr(message, "HasField", None)
    if has_field is not None:
        try:
            if not has_field(name):
                return None
        except ValueError:
            return None
    return getattr(message, name, None)


def _environment(variables: Iterable[Any]) -> dict[str, str]:
    environment: dict[str, str] = {}
    for variable in variables:
        if environment.setdefault(variable.name, variable.value) != variable.value:
            # Which of them the task sees depends on its runtime, so no branch can be told from it.
            raise InvalidArgument(f"environment variable {variable.name!r} is set twice, to different values")
    return environment
