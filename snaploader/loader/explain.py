"""Why a key set gives the snapshot that it gives, or none: every manifest, and the rule that decided."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

from snaploader import keys
from snaploader.errors import DataLoss, NotFound, SnaploaderError
from snaploader.formats.manifest import Manifest
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader.find import SnapshotFinder, is_limited, manifest_order
from snaploader.loader.manifests import Damaged, Deleted, ManifestStore, Stores
from snaploader.loader.results import ManifestSource, vm_metadata_of
from snaploader.loader.versions import VersionStore
from snaploader.policy import ReadPolicy, ReadSources, completed_s, is_stale


class Rule(StrEnum):
    """What decided on a manifest."""

    WHOLE = "whole"
    """It can be used: nothing that it names is missing."""
    ABSENT = "absent"
    """There is none."""
    DELETED = "deleted"
    """The snapshot was deleted. Remotely, that ends the search for its key."""
    STALE = "stale"
    """It is of a fallback, and older than the limit, or does not tell its age."""
    INCOMPLETE = "incomplete"
    """Something that it names is in no cache that is read."""
    DAMAGED = "damaged"
    """It, or a tree that it names, cannot be understood."""
    FAILED = "failed"
    """It could not be looked at, as in an outage."""
    NOT_READ = "not-read"
    """The read policy, or a switch of the call or the loader, leaves this place out."""


@dataclass(frozen=True, slots=True)
class ManifestExplanation:
    """One manifest of a key: what was found, and what that means."""

    source: ManifestSource
    name: str
    """What it is kept under: a ref of the file cache, or the hash of a remote action digest."""
    rule: Rule
    reason: str = ""
    """More about the rule, for people."""
    snapshot_id: str = ""
    """What the manifest says of itself; empty where it says nothing."""
    age_s: float | None = None
    """Since the task ended that ran last, in seconds; None when the manifest does not say."""
    blobs: int = 0
    """How many it needs, as far as its trees could be read."""
    blob_bytes: int = 0
    missing_blobs: int = 0
    missing_bytes: int = 0
    missing_example: str = ""
    """The digest of one of them."""


@dataclass(frozen=True, slots=True)
class KeyExplanation:
    """One key of the set, in its order."""

    key: SnapshotKey
    manifests: tuple[ManifestExplanation, ...]
    """In the order in which they are looked at; those that are not read come last."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `get_snapshot` finds under each key of a set, and which snapshot it takes. Can be pickled.

    `str()` of it is for people, `to_dict()` for programs.
    """

    group_id: str
    read_policy: ReadPolicy
    sources: ReadSources
    """What may be read, when policy, call and loader are taken together."""
    max_stale_fallback_age_s: float
    keys: tuple[KeyExplanation, ...]
    version_name: str
    """What the version of the keys is kept under, here and remotely."""
    version_id: str
    """The version that the keys carry."""
    local_version: str
    """What this host last knew it to be; empty when it knows of none."""
    remote_version: str
    """What stands remotely; empty where nothing does, or `version_failure` says why it cannot be told."""
    version_failure: str
    chosen_key: SnapshotKey | None
    """The key whose snapshot would be taken; None when none would."""
    chosen: ManifestExplanation | None
    """Its manifest."""
    failure: str
    """What ends the search before it is through, such as an outage; empty when nothing does."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, strings and numbers."""
        found = asdict(self)
        found["keys"] = [
            {**one, "manifests": list(one["manifests"]), "is_chosen": key.key == self.chosen_key}
            for one, key in zip(found["keys"], self.keys, strict=True)
        ]
        return found

    def __str__(self) -> str:
        lines = [f"group {self.group_id!r}, read policy {self.read_policy}"]
        lines.append(f"version {self.version_id or '(none)'} under {self.version_name}: {self.version_state}")
        for one in self.keys:
            lines.append(f"key {one.key.debug_string(self.group_id)}")
            for manifest in one.manifests:
                mark = "*" if manifest is self.chosen else "-"
                lines.append(f"  {mark} {described(manifest)}")
        if self.chosen is not None:
            lines.append(f"chosen: the {self.chosen.source} manifest {self.chosen.name}")
        else:
            lines.append(f"chosen: none{f', since {self.failure}' if self.failure else ''}")
        return "\n".join(lines)

    @property
    def version_state(self) -> str:
        """Whether the version of the keys is current, for people."""
        if not self.version_id:
            return "these keys have none"
        if self.version_failure:
            return f"the remote cache cannot be asked ({self.version_failure})"
        stands = self.remote_version or self.local_version
        if stands == self.version_id:
            return "current"
        return f"not current, which is {stands}" if stands else "none stands"


def described(manifest: ManifestExplanation) -> str:
    """One line on a manifest."""
    parts = [f"{manifest.source} {manifest.name}: {manifest.rule}"]
    if manifest.reason:
        parts.append(f"({manifest.reason})")
    if manifest.snapshot_id:
        parts.append(f"snapshot {manifest.snapshot_id}")
    if manifest.age_s is not None:
        parts.append(f"{manifest.age_s:.0f} s old")
    if manifest.blobs:
        parts.append(f"{manifest.blobs} blobs of {manifest.blob_bytes} bytes")
    if manifest.missing_blobs:
        parts.append(
            f"missing {manifest.missing_blobs} of {manifest.missing_bytes} bytes, such as "
            f"{manifest.missing_example}"
        )
    return ", ".join(parts).replace(", (", " (", 1)


class SnapshotExplainer:
    """Does the explaining for a loader. Thread-safe."""

    def __init__(
        self, stores: Stores, finder: SnapshotFinder, manifests: ManifestStore, versions: VersionStore
    ) -> None:
        self._stores = stores
        self._finder = finder
        self._manifests = manifests
        self._versions = versions

    def explain(
        self,
        key_set: SnapshotKeySet,
        policy: ReadPolicy,
        sources: ReadSources,
        *,
        allow_degraded: bool,
        max_stale_fallback_age_s: float | None,
    ) -> Explanation:
        """See `SnapshotLoader.explain`."""
        max_age_s = self._finder.limit_s(max_stale_fallback_age_s)
        allowed = self._finder.allowed(policy, sources)
        order = manifest_order(policy, allowed)
        explained = []
        unreadable: set[str] = set()
        for position, key in enumerate(key_set):
            looked = [
                self._look(key, source, allowed, max_age_s, unreadable, is_fallback=position > 0)
                for source in order
            ]
            looked += [
                ManifestExplanation(source, self._name(key, source), Rule.NOT_READ, "policy or switches")
                for source in ManifestSource
                if source not in order
            ]
            explained.append(KeyExplanation(key, tuple(looked)))
        base, local_version, remote_version, failure = key_set.branch_key, "", "", ""
        try:
            if base.version_id:
                local_version, remote_version = self._versions.look(base)
        except SnaploaderError as error:
            failure = error.message
        chosen_key, chosen, ended = decide(explained, unreadable, allow_degraded=allow_degraded)
        return Explanation(
            group_id=self._stores.file_cache.group_id,
            read_policy=policy,
            sources=allowed,
            max_stale_fallback_age_s=max_age_s,
            keys=tuple(explained),
            version_name=keys.version_key(base),
            version_id=base.version_id,
            local_version=local_version,
            remote_version=remote_version,
            version_failure=failure,
            chosen_key=chosen_key,
            chosen=chosen,
            failure=ended,
        )

    def _name(self, key: SnapshotKey, source: ManifestSource) -> str:
        is_local = source is ManifestSource.LOCAL
        return self._manifests.local_ref(key) if is_local else self._manifests.remote_name(key)

    def _look(
        self,
        key: SnapshotKey,
        source: ManifestSource,
        sources: ReadSources,
        max_age_s: float,
        unreadable: set[str],
        *,
        is_fallback: bool,
    ) -> ManifestExplanation:
        told = partial(ManifestExplanation, source, self._name(key, source))
        try:
            if source is ManifestSource.LOCAL:
                manifest = self._manifests.look_local(key)
            else:
                manifest = self._manifests.read_remote(key)
        except SnaploaderError as error:
            if isinstance(error, Damaged):
                unreadable.add(self._name(key, source))
            return told(_rule(error, Rule.ABSENT), error.message)
        metadata = vm_metadata_of(manifest)
        completed, now_s = completed_s(metadata), self._stores.clock()
        told = partial(
            told,
            snapshot_id=key.snapshot_id or ("" if metadata is None else metadata.snapshot_id),
            age_s=None if completed is None else now_s - completed,
        )
        found = self._contents(key, manifest, source, sources, told)
        limited = is_limited(key, source, is_fallback=is_fallback)
        if limited and is_stale(metadata, now_s=now_s, max_age_s=max_age_s):
            # The finder looks at the age first, so whatever else is wrong with it does not matter.
            found = _stale(found, max_age_s)
        return found

    def _contents(
        self,
        key: SnapshotKey,
        manifest: Manifest,
        source: ManifestSource,
        sources: ReadSources,
        told: partial[ManifestExplanation],
    ) -> ManifestExplanation:
        counts: dict[str, Any] = {}
        try:
            read = partial(self._finder.read_tree, sources, keep=False)
            snapshot = self._finder.unchecked(key, manifest, source, sources, read)
            blobs = snapshot.digests()
            counts = {"blobs": len(blobs), "blob_bytes": int(blobs.sizes.sum())}
            gone = [parts[1] for parts in self._finder.absent(snapshot, use=False)]
        except SnaploaderError as error:
            return told(_rule(error, Rule.INCOMPLETE), error.message, **counts)
        missing = set().union(*gone)
        if not missing:
            return told(Rule.WHOLE, **counts)
        return told(
            Rule.INCOMPLETE,
            missing_blobs=len(missing),
            missing_bytes=sum(digest.size_bytes for digest in missing),
            missing_example=str(min(missing)),
            **counts,
        )


def _rule(error: SnaploaderError, not_found: Rule) -> Rule:
    if isinstance(error, Deleted):
        return Rule.DELETED
    if isinstance(error, Damaged):
        return Rule.DAMAGED
    if isinstance(error, NotFound):
        return not_found
    return Rule.DAMAGED if isinstance(error, DataLoss) else Rule.FAILED


def _stale(found: ManifestExplanation, max_age_s: float) -> ManifestExplanation:
    return replace(found, rule=Rule.STALE, reason=f"the limit is {max_age_s:g} s")


def decide(
    explained: Sequence[KeyExplanation], unreadable: Collection[str], *, allow_degraded: bool
) -> tuple[SnapshotKey | None, ManifestExplanation | None, str]:
    """The key and the manifest that `get_snapshot` takes; and what ends its search, if anything does.

    Args:
        unreadable: Names of the local manifests that cannot be understood: these end no search.
    """
    for one in explained:
        damage = ""
        for manifest in one.manifests:
            if manifest.rule is Rule.WHOLE:
                return one.key, manifest, ""
            if manifest.rule is Rule.DELETED and manifest.source is ManifestSource.REMOTE:
                break
            if manifest.rule is Rule.FAILED and not allow_degraded:
                return None, None, f"a manifest cannot be looked at: {manifest.reason}"
            if manifest.rule is Rule.DAMAGED and manifest.name not in unreadable:
                damage = damage or manifest.reason
        else:
            if damage and not allow_degraded:
                return None, None, f"a snapshot is damaged: {damage}"
    return None, None, ""
