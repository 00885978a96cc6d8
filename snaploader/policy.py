"""When snapshots are read and saved: the policies, and the decisions that follow from them.

A task may bring its policy along as platform properties (names in any case), each at most once:

    snapshot-read-policy               newest, local-first, local-only or remote-only
    snapshot-save-policy               always, first-non-default-ref or none-available
    snapshot-max-stale-fallback-age    a duration, such as 24h
    snapshot-refresh-interval          a duration, such as 90m
    snapshot-sharing                   true or false
    snapshot-universal-fallback        true or false

A task may give up sharing; where the host does not share snapshots, it cannot ask for it.

They steer and describe nothing of the machine, so no key depends on them: changing a policy does not
start cold. A duration is a number of seconds, or a number followed by s, m, h or d.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from snaploader.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from snaploader._proto.snaploader_pb2 import VMMetadata
    from snaploader.keys import SnapshotKey

DEFAULT_MAX_STALE_FALLBACK_AGE_S = 24 * 3600.0
"""How old a local snapshot of another ref may be, in seconds, when nothing else is said."""

_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([smhd]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Policy(StrEnum):
    @classmethod
    def parse(cls, name: str) -> Self:
        """The policy called `name`, in any case, with hyphens or underscores. InvalidArgument for others."""
        known = ", ".join(cls)
        if not isinstance(name, str):
            raise InvalidArgument(f"no {cls.__name__} was given: use one of {known}")
        try:
            return cls(name.strip().lower().replace("_", "-"))
        except ValueError:
            raise InvalidArgument(f"unknown {cls.__name__} {name[:80]!r}: use one of {known}") from None


class ReadPolicy(_Policy):
    """Which manifest is taken when a key has one locally and one remotely."""

    NEWEST = "newest"
    """The remote one, which is not written to the local cache."""
    LOCAL_FIRST = "local-first"
    """The local one; else the remote one, which then becomes the local one."""
    LOCAL_ONLY = "local-only"
    """The local one. Only blobs that it names may come from the remote store."""
    REMOTE_ONLY = "remote-only"
    """The remote one, which is not written to the local cache. Blobs that it names may be here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSources:
    """What of a snapshot may be read where: four switches, each on its own. All are on by default.

    The read policy says which manifest comes first; a source that is off drops out of its order:

        policy          manifests, in order     a remote one is kept locally
        newest          remote, local           no
        local-first     local, remote           yes, unless local manifests are off
        local-only      local                   -
        remote-only     remote                  no

    A loader has sources too, which bound those of its calls.

    Raises:
        InvalidArgument: Both sources of manifests are off, or both of chunks.
    """

    local_manifests: bool = True
    """Manifests in the file cache."""
    remote_manifests: bool = True
    """Manifests in the remote cache."""
    local_chunks: bool = True
    """Chunks, and all else that a manifest names, in the file cache. When off, it all comes from the remote
    cache, past the file cache, in which nothing of it is kept; there is no readahead then."""
    remote_chunks: bool = True
    """The same in the remote cache, and in peers before it. When off, what is not here is missing."""

    def __post_init__(self) -> None:
        for what in ("manifests", "chunks"):
            if not (getattr(self, f"local_{what}") or getattr(self, f"remote_{what}")):
                raise InvalidArgument(f"no {what} could be read: leave local or remote {what} on")

    def within(self, bounds: ReadSources) -> ReadSources:
        """What both allow. FailedPrecondition when that leaves no manifests, or no chunks, to read."""
        both = {
            field.name: getattr(self, field.name) and getattr(bounds, field.name) for field in fields(self)
        }
        try:
            return ReadSources(**both)
        except InvalidArgument as error:
            raise FailedPrecondition(
                f"{error.message} (the call, its read policy and the loader leave {self._off(both)} off)"
            ) from error

    @staticmethod
    def _off(switches: Mapping[str, bool]) -> str:
        return " and ".join(name.replace("_", " ") for name, is_on in switches.items() if not is_on)


_SOURCES_OF = {
    ReadPolicy.LOCAL_ONLY: ReadSources(remote_manifests=False),
    ReadPolicy.REMOTE_ONLY: ReadSources(local_manifests=False),
}
EVERY_SOURCE = ReadSources()
"""All four are on."""


def allowed_sources(policy: ReadPolicy, *bounds: ReadSources) -> ReadSources:
    """What a read under this policy may use within all `bounds`. Errors as `ReadSources.within`."""
    sources = _SOURCES_OF.get(policy, EVERY_SOURCE)
    for bound in bounds:
        sources = sources.within(bound)
    return sources


class SavePolicy(_Policy):
    """Whether a snapshot is also saved remotely. The default branch always is."""

    ALWAYS = "always"
    FIRST_NON_DEFAULT_REF = "first-non-default-ref"
    """Unless the branch has a snapshot already."""
    NONE_AVAILABLE = "none-available"
    """Unless any key of the set has a snapshot."""


@dataclass(frozen=True, slots=True)
class PolicyOverrides:
    """What a task's platform properties say about policy; None where they say nothing."""

    read_policy: ReadPolicy | None = None
    save_policy: SavePolicy | None = None
    max_stale_fallback_age_s: float | None = None
    refresh_interval_s: float | None = None
    share: bool | None = None
    universal: bool | None = None

    @classmethod
    def from_platform(cls, properties: Iterable[tuple[str, str]]) -> PolicyOverrides:
        """Read the policy properties among `properties`.

        Raises:
            InvalidArgument: A policy property has a value it cannot have, or two different ones.
        """
        found: dict[str, str] = {}
        for name, value in properties:
            lowered = name.lower()
            if lowered in POLICY_PROPERTIES and found.setdefault(lowered, value) != value:
                raise InvalidArgument(f"platform property {lowered!r} is set twice, to different values")
        wishes: dict[str, Any] = {}
        for name, value in found.items():
            field, parse = _PROPERTIES[name]
            try:
                wishes[field] = parse(value)
            except InvalidArgument as error:
                raise InvalidArgument(f"platform property {name!r}: {error.message}") from error
        return cls(**wishes)


def parse_duration_s(text: str) -> float:
    """Seconds, from a number with an optional unit of s, m, h or d. InvalidArgument for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidArgument(f"{text[:80]!r} is no duration: write a number of seconds, or as in 90m or 24h")
    return float(match[1]) * _UNIT_S[match[2]]


def _parse_boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.strip().lower()]
    except KeyError:
        raise InvalidArgument(f"{text[:80]!r} is no truth value: write true or false") from None


_PROPERTIES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "snapshot-read-policy": ("read_policy", ReadPolicy.parse),
    "snapshot-save-policy": ("save_policy", SavePolicy.parse),
    "snapshot-max-stale-fallback-age": ("max_stale_fallback_age_s", parse_duration_s),
    "snapshot-refresh-interval": ("refresh_interval_s", parse_duration_s),
    "snapshot-sharing": ("share", _parse_boolean),
    "snapshot-universal-fallback": ("universal", _parse_boolean),
}
"""Which of `PolicyOverrides` a platform property sets, and how its value is read."""

POLICY_PROPERTIES = frozenset(_PROPERTIES)
"""Platform properties, in lower case, that steer policy and are left out of the platform hash."""


def should_save_remotely(
    policy: SavePolicy,
    key: SnapshotKey,
    *,
    default_ref: str = "",
    branch_exists: bool = False,
    any_exists: bool = False,
    last_save_s: float | None = None,
    refresh_interval_s: float = 0.0,
    now_s: float = 0.0,
) -> bool:
    """Whether a snapshot of `key` is to be saved remotely. Times are in seconds since the epoch.

    What exists is in the remote store: a snapshot of this very key, or of any key of the set. The default
    branch, where it is known, is saved at most once in a refresh interval.
    """
    # A key without a ref has only one line of history, its own, which counts as the default branch.
    if not key.ref or key.ref == default_ref:
        if last_save_s is None:
            return True
        # A save from the future tells of a wrong clock, and must not hold off saves until then.
        return not 0 <= now_s - last_save_s < refresh_interval_s
    if policy is SavePolicy.FIRST_NON_DEFAULT_REF:
        return not branch_exists
    if policy is SavePolicy.NONE_AVAILABLE:
        return not (branch_exists or any_exists)
    return True


def is_stale(vm_metadata: VMMetadata | None, *, now_s: float, max_age_s: float) -> bool:
    """Whether a local fallback snapshot is too old to be used. Without limit, `max_age_s` is math.inf.

    Its age is that of the last task it ran. Without a timestamp it is stale; so it is when the
    timestamp lies further than `max_age_s` in the future, where only a wrong clock can have put it.
    """
    completed = completed_s(vm_metadata)
    return completed is None or math.fabs(now_s - completed) > max_age_s


def completed_s(vm_metadata: VMMetadata | None) -> float | None:
    """When the last task ended, in seconds since the epoch; None when the metadata does not say."""
    if vm_metadata is None or not vm_metadata.last_executed_task.HasField("completed_timestamp"):
        return None
    completed = vm_metadata.last_executed_task.completed_timestamp
    return float(completed.seconds) + completed.nanos / 1e9


def checked_seconds(value: float, name: str) -> float:
    """A time that an option gives. InvalidArgument unless it is a number of seconds, 0 or more."""
    if not isinstance(value, int | float) or not value >= 0:
        raise InvalidArgument(f"{name} is {value!r}: give seconds, 0 or more")
    return value
