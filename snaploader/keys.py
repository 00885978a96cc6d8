"""Keys: under which names the snapshots of a task are looked for, and under which they are written.

A key says of which instance, platform, configuration and version a snapshot is, and of which branch
(`ref`). The platform and the branches are those of the task that runs in the machine. Branches fall back on
one another, so a task has a set of keys. What a cache stores a manifest under is a hash over a key; the
formats are described in docs/formats/keys.md and never change. Everything here is a pure function of its
arguments.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from snaploader._proto import remote_execution_pb2, snaploader_pb2
from snaploader.digest import Digest, DigestFunction, hash_strings
from snaploader.errors import InvalidArgument
from snaploader.policy import POLICY_PROPERTIES

log = logging.getLogger(__name__)

BRANCH_VARIABLE = "GIT_BRANCH"
BASE_BRANCH_VARIABLE = "GIT_BASE_BRANCH"
DEFAULT_BRANCH_VARIABLE = "GIT_REPO_DEFAULT_BRANCH"

MERGE_QUEUE_PREFIX = "gh-readonly-queue/"

UNIVERSAL_REF = "~universal"
"""The ref of the universal fallback. No branch can be called so: git forbids `~` in ref names."""

MAX_FALLBACK_KEYS = 64
"""Key sets that come from outside may have no more."""

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
        stubs from before it had one are fine. The environment is the command's; of a variable that is set
        twice the first counts. The instance name and
        action digest are the execute request's; an `instance_name` that is given wins.

        Raises:
            InvalidArgument: As the class does.
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


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """Names the place of a snapshot. Immutable, hashable; an empty string is a field not set.

    Raises InvalidArgument when a field is longer than 4096 bytes, holds a NUL or is not valid Unicode.
    """

    instance_name: str = ""
    platform_hash: str = ""
    """SHA-256 of the effective platform, in hexadecimal; see `platform_hash`."""
    configuration_hash: str = ""
    """Of everything else that the machine was configured with; the caller's."""
    runner_id: str = ""
    """Set where snapshots are not shared between runners; `ref` is empty then."""
    ref: str = ""
    """The branch."""
    snapshot_id: str = ""
    """Set where one saved snapshot is named, once and for all."""
    version_id: str = ""
    """Of all refs together; a new version leaves all earlier snapshots behind."""

    def __post_init__(self) -> None:
        for name in _KEY_FIELDS:
            checked_text(getattr(self, name), f"{name} of a snapshot key")

    def to_proto(self) -> snaploader_pb2.SnapshotKey:
        """The key as a message."""
        return snaploader_pb2.SnapshotKey(**{name: getattr(self, name) for name in _KEY_FIELDS})

    @classmethod
    def from_proto(cls, message: snaploader_pb2.SnapshotKey) -> SnapshotKey:
        """The key in a message; fields unknown here are dropped."""
        return cls(**{name: getattr(message, name) for name in _KEY_FIELDS})

    def serialize(self) -> bytes:
        """The message's deterministic bytes, from which hashes are made."""
        return self.to_proto().SerializeToString(deterministic=True)

    @classmethod
    def parse(cls, data: bytes) -> SnapshotKey:
        """The key in a serialised message. InvalidArgument when it is none."""
        try:
            return cls.from_proto(snaploader_pb2.SnapshotKey.FromString(data))
        except DecodeError as error:
            raise InvalidArgument(f"not a serialised snapshot key: {error}") from error

    def __str__(self) -> str:
        """Those fields that are set, for messages to people; hashes are shortened."""
        shown = {name: getattr(self, name) for name in _KEY_FIELDS if getattr(self, name)}
        for name in ("platform_hash", "configuration_hash"):
            if name in shown and len(shown[name]) > 12:
                shown[name] = shown[name][:12] + "…"
        return "{" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + "}"

    def debug_string(self, group_id: str = "") -> str:
        """The key in full, and what its manifests are kept under: for logs and for looking things up.

        Args:
            group_id: Of the file cache, on which the name of the local manifest depends.
        """
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _KEY_FIELDS if getattr(self, name))
        remote = hash_strings(*_manifest_parts(self))
        return (
            f"{{{shown}}}, local manifest {local_manifest_key(group_id, self)} of group {group_id!r}, "
            f"remote manifest {remote}/1"
        )


_KEY_FIELDS = tuple(field.name for field in fields(SnapshotKey))


@dataclass(frozen=True, slots=True)
class SnapshotKeySet:
    """Where the snapshot of a task is looked for, in order, and where it is written. Immutable."""

    branch_key: SnapshotKey
    fallback_keys: tuple[SnapshotKey, ...]
    write_key: SnapshotKey
    """Where the task's snapshot is written: the branch key, but for merge queues."""

    def __post_init__(self) -> None:
        if len(self.fallback_keys) > MAX_FALLBACK_KEYS:
            raise InvalidArgument(
                f"a key set of {len(self.fallback_keys)} fallback keys is refused: "
                f"{MAX_FALLBACK_KEYS} are allowed"
            )

    def __iter__(self) -> Iterator[SnapshotKey]:
        """The keys to read from, best first."""
        yield self.branch_key
        yield from self.fallback_keys

    @property
    def write_keys(self) -> tuple[SnapshotKey, ...]:
        """All keys that a save updates: the write key, and the universal key where it is a fallback."""
        universal = (key for key in self.fallback_keys if is_universal(key))
        return (self.write_key, *(key for key in universal if key != self.write_key))

    def debug_string(self, group_id: str = "") -> str:
        """A line for each key, in the order they are read, then the write key; see that of `SnapshotKey`."""
        lines = [
            f"{'fallback' if n else 'branch'} key {key.debug_string(group_id)}" for n, key in enumerate(self)
        ]
        return "\n".join([*lines, f"write key {self.write_key.debug_string(group_id)}"])

    def to_proto(self) -> snaploader_pb2.SnapshotKeySet:
        """The key set as a message."""
        return snaploader_pb2.SnapshotKeySet(
            branch_key=self.branch_key.to_proto(),
            fallback_keys=[key.to_proto() for key in self.fallback_keys],
            write_key=self.write_key.to_proto(),
        )

    @classmethod
    def from_proto(cls, message: snaploader_pb2.SnapshotKeySet) -> SnapshotKeySet:
        """The key set in a message. InvalidArgument when it has no branch key or no write key."""
        if not (message.HasField("branch_key") and message.HasField("write_key")):
            raise InvalidArgument("a snapshot key set must have a branch key and a write key")
        return cls(
            SnapshotKey.from_proto(message.branch_key),
            tuple(SnapshotKey.from_proto(key) for key in message.fallback_keys),
            SnapshotKey.from_proto(message.write_key),
        )

    def serialize(self) -> bytes:
        """The message's deterministic bytes."""
        return self.to_proto().SerializeToString(deterministic=True)

    @classmethod
    def parse(cls, data: bytes) -> SnapshotKeySet:
        """The key set in a serialised message. InvalidArgument when it is none."""
        try:
            return cls.from_proto(snaploader_pb2.SnapshotKeySet.FromString(data))
        except DecodeError as error:
            raise InvalidArgument(f"not a serialised snapshot key set: {error}") from error


def platform_hash(properties: Iterable[tuple[str, str]]) -> str:
    """SHA-256, in hexadecimal, of the serialised Platform of `properties` in REAPI's order.

    Properties that only steer policy (`POLICY_PROPERTIES`, in any case) are left out.
    """
    platform = remote_execution_pb2.Platform()
    for name, value in sorted(properties):
        if name.lower() not in POLICY_PROPERTIES:
            platform.properties.add(name=name, value=value)
    return hashlib.sha256(platform.SerializeToString(deterministic=True)).hexdigest()


def base_key(task: SnapshotTask, configuration_hash: str) -> SnapshotKey:
    """What all keys of a task share; enough to look its version up."""
    return SnapshotKey(
        instance_name=task.instance_name,
        platform_hash=platform_hash(task.platform),
        configuration_hash=configuration_hash,
    )


def snapshot_key_set(
    task: SnapshotTask,
    configuration_hash: str,
    runner_id: str = "",
    version_id: str = "",
    *,
    share: bool = True,
    universal: bool = False,
) -> SnapshotKeySet:
    """The keys of a task.

    The branch is the variable GIT_BRANCH of the task. It falls back on GIT_BASE_BRANCH, then on
    GIT_REPO_DEFAULT_BRANCH, then on the universal ref where that is wanted. Without a branch there is
    no ref and no fallback at all. A task of a merge queue writes to the queue's base branch, so that
    the next pull request finds it. If runners do not share snapshots, the only key is the runner's own.
    InvalidArgument when a string is not fit for a key, or `runner_id` is missing then.
    """
    base = replace(base_key(task, configuration_hash), version_id=version_id)
    if not share:
        if not runner_id:
            raise InvalidArgument("runner_id is needed where snapshots are not shared between runners")
        own = replace(base, runner_id=runner_id)
        return SnapshotKeySet(own, (), own)
    branch = _branch(task, BRANCH_VARIABLE)
    refs = [_branch(task, BASE_BRANCH_VARIABLE), _branch(task, DEFAULT_BRANCH_VARIABLE)]
    if universal:
        refs.append(UNIVERSAL_REF)
    # A dict keeps the first of equal refs, in order.
    fallback_refs = dict.fromkeys(ref for ref in refs if branch and ref not in {"", branch})
    return SnapshotKeySet(
        branch_key=replace(base, ref=branch),
        fallback_keys=tuple(replace(base, ref=ref) for ref in fallback_refs),
        write_key=replace(base, ref=write_ref(branch)),
    )


def write_ref(ref: str) -> str:
    """The ref that a task of `ref` writes to: itself, or the base branch of a merge queue.

    A merge queue's ref is `gh-readonly-queue/<base>/<pr>`, where the base may hold slashes. One that is
    malformed is logged and stands for itself.
    """
    if not ref.startswith(MERGE_QUEUE_PREFIX):
        return ref
    base, _, pull_request = ref.removeprefix(MERGE_QUEUE_PREFIX).rpartition("/")
    if not pull_request or not all(base.split("/")) or base == UNIVERSAL_REF:
        log.warning("merge queue ref %r names no base branch: its snapshots are kept under its own name", ref)
        return ref
    return base


def is_universal(key: SnapshotKey) -> bool:
    """Whether `key` is the universal fallback, to which the age limit always applies."""
    return key.ref == UNIVERSAL_REF


def snapshot_id_key(key: SnapshotKey) -> SnapshotKey:
    """The key of exactly the snapshot that `key.snapshot_id` names. It is never overwritten."""
    if not key.snapshot_id:
        raise InvalidArgument(f"the key {key} has no snapshot_id")
    return SnapshotKey(instance_name=key.instance_name, snapshot_id=key.snapshot_id)


def local_manifest_key(group_id: str, key: SnapshotKey) -> str:
    """The ref, 64 hexadecimal digits, that a group's file cache keeps the manifest of `key` under."""
    return hash_strings(group_id, *_manifest_parts(key))


def private_file_hash(group_id: str, key: SnapshotKey, snapshot_id: str, name: str) -> str:
    """The name, 64 hexadecimal digits, of a file of a snapshot that only its runner will ever read.

    It stands for a hash of the file's bytes, which nobody needs to read then. Each snapshot has names of its
    own: a later one never changes what an earlier one holds.
    """
    parts = (key.instance_name, key.platform_hash, key.configuration_hash, key.runner_id)
    return hash_strings(group_id, *parts, snapshot_id, name, ".private")


def remote_manifest_digest(key: SnapshotKey, function: DigestFunction) -> Digest:
    """The digest that a remote action cache keeps the manifest of `key` under, labelled with `function`.

    No blob has it. It has size 1 because some servers refuse a key of size 0.
    """
    return Digest(hash_strings(*_manifest_parts(key)), 1, function)


def version_key(key: SnapshotKey) -> str:
    """The name, 64 hexadecimal digits, of the version that all refs of `key` share."""
    return hash_strings(key.instance_name, key.platform_hash, key.configuration_hash, ".version")


def own_version_key(key: SnapshotKey) -> str:
    """Where a host that may not write versions remotely keeps its own, while none stands there."""
    return hash_strings(version_key(key), ".own")


def remote_version_digest(key: SnapshotKey, function: DigestFunction) -> Digest:
    """The digest that a remote action cache keeps the version of `key` under, labelled with `function`."""
    return Digest(version_key(key), 1, function)


def _manifest_parts(key: SnapshotKey) -> tuple[str, str, str, str]:
    return hashlib.sha256(key.serialize()).hexdigest(), key.snapshot_id, key.version_id, ".manifest"


def _branch(task: SnapshotTask, variable: str) -> str:
    ref = checked_text(task.environment.get(variable, ""), f"environment variable {variable}")
    if ref == UNIVERSAL_REF:
        raise InvalidArgument(f"environment variable {variable} is {ref!r}, which is no branch")
    return ref


def _submessage(message: object, name: str) -> Any:
    """A field that is a message, or None when it is not set or the stubs do not know it."""
    has_field = getattr(message, "HasField", None)
    try:
        is_set = has_field is None or has_field(name)
    except ValueError:
        return None
    return getattr(message, name, None) if is_set else None


def _environment(variables: Iterable[Any]) -> dict[str, str]:
    environment: dict[str, str] = {}
    for variable in variables:
        environment.setdefault(variable.name, variable.value)
    return environment
