"""Policies: what pausing and committing hold, and when the lifecycle stops, starts, parks and deletes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from typing import Any

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Scope

DEFAULT_POLICY = "default"
"""The policy of workspaces that name none. It exists always; until it is changed it does nothing."""


class StopAction(StrEnum):
    """What an autostop does."""

    STOP = "stop"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class ScopePolicy:
    """What snapshots hold.

    Raises:
        InvalidArgument: a commit would hold what a pause does not.
    """

    on_pause: Scope = Scope.FULL
    on_commit: Scope | None = None
    """None: what `on_pause` is."""

    def __post_init__(self) -> None:
        if not self.on_pause.includes(self.commit_scope):
            raise InvalidArgument(
                f"onCommit is {self.commit_scope} and onPause is {self.on_pause}: a commit cannot hold more "
                "than a pause does. Set onPause to Full, or onCommit to Data"
            )

    @property
    def commit_scope(self) -> Scope:
        """What a commit holds."""
        return self.on_pause if self.on_commit is None else self.on_commit


@dataclass(frozen=True, slots=True)
class Policy:
    """A named policy. Durations must be above zero; None switches the rule off.

    Raises:
        InvalidArgument: a value is out of bounds.
    """

    name: str = DEFAULT_POLICY
    scopes: ScopePolicy = ScopePolicy()
    autostop_after: timedelta | None = None
    """A started workspace gets a deadline this much later."""
    autostop_action: StopAction = StopAction.STOP
    autostart_allowed: bool = True
    failure_ttl: timedelta | None = None
    """A workspace whose start failed is stopped this much later."""
    time_until_dormant: timedelta | None = None
    """A workspace that was not used for longer is stopped and marked dormant."""
    delete_after_dormant: timedelta | None = None
    """A dormant workspace is deleted this much after it was marked."""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 200:
            raise InvalidArgument("a policy needs a name of 1 to 200 characters")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, timedelta) and value <= timedelta(0):
                raise InvalidArgument(f"{_SPELLED[item.name]} of policy {self.name!r} must be above 0 s")

    @classmethod
    def from_mapping(cls, name: str, values: Mapping[str, Any]) -> Policy:
        """A policy from plain values as the user spells them, such as `{"onPause": "Full"}`.

        Raises:
            InvalidArgument: a field is unknown or its value is not one; the text names the field as given.
        """
        unknown = values.keys() - _FIELDS.keys()
        if unknown:
            raise InvalidArgument(
                f"policy {name!r} has unknown field {min(unknown)!r}: the fields are {', '.join(_FIELDS)}"
            )
        on_pause = _parse(values, "onPause", Scope.parse)
        scopes = ScopePolicy(on_pause or Scope.FULL, _parse(values, "onCommit", Scope.parse))
        changes = {
            field: value
            for spelled, field in _FIELDS.items()
            if field not in {"on_pause", "on_commit"}
            and (value := _parse(values, spelled, _READERS[spelled])) is not None
        }
        return cls(name, scopes, **changes)

    def to_mapping(self) -> dict[str, Any]:
        """The values that `from_mapping` takes; rules that are off are left out."""
        on_commit = self.scopes.on_commit
        values: dict[str, Any] = {
            "onPause": self.scopes.on_pause.value,
            "onCommit": None if on_commit is None else on_commit.value,
        }
        for spelled, field in _FIELDS.items():
            if spelled in values:
                continue
            value = getattr(self, field)
            if isinstance(value, timedelta):
                value = value.total_seconds()
            values[spelled] = value.value if isinstance(value, StopAction) else value
        return {spelled: value for spelled, value in values.items() if value is not None}


def _duration(value: Any) -> timedelta:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e10:
        raise InvalidArgument(f"{value!r} is no number of seconds above 0")
    return timedelta(seconds=value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{value!r} is neither true nor false")
    return value


def _action(value: Any) -> StopAction:
    try:
        return StopAction(value)
    except ValueError:
        raise InvalidArgument(f"{value!r} is neither stop nor pause") from None


def _parse(values: Mapping[str, Any], spelled: str, read: Any) -> Any:
    value = values.get(spelled)
    if value is None:
        return None
    try:
        return read(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{spelled}: {error.message}") from error


_FIELDS = {
    "onPause": "on_pause",
    "onCommit": "on_commit",
    "autostopAfterSeconds": "autostop_after",
    "autostopAction": "autostop_action",
    "autostartAllowed": "autostart_allowed",
    "failureTtlSeconds": "failure_ttl",
    "timeUntilDormantSeconds": "time_until_dormant",
    "deleteAfterDormantSeconds": "delete_after_dormant",
}
_SPELLED = {field: spelled for spelled, field in _FIELDS.items()}
_READERS = {
    "autostopAfterSeconds": _duration,
    "autostopAction": _action,
    "autostartAllowed": _flag,
    "failureTtlSeconds": _duration,
    "timeUntilDormantSeconds": _duration,
    "deleteAfterDormantSeconds": _duration,
}
