"""Versions: one value that all keys of an instance, platform and configuration carry.

A new version drops every branch and fallback of a key together. The authority is the remote store,
where one is configured, so each key set asks it anew. No version there (never set, or expired) means
a clean start under a fresh one: expiry never brings an old snapshot back.

Action caches have no compare-and-swap. A loader that mints a version writes it, reads it back and adopts
what stands, after waiting for about two round trips, in which a rival that saw no version either will
have written its own. Should that rival be slower still, loaders that raced agree from the next read on;
a snapshot that the loser saved in between is a miss and nothing worse. Locally the file cache offers
create-if-absent, and the race does not exist.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from typing import TypeAlias

from google.protobuf.message import DecodeError

from cow import SingleFlight
from snaploader import keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader._proto.snaploader_pb2 import SnapshotVersionMetadata
from snaploader.context import current, own_errors
from snaploader.digest import Digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
)
from snaploader.formats.manifest import unpack_any
from snaploader.keys import SnapshotKey
from snaploader.loader.fetch import wait
from snaploader.loader.manifests import MAY_ONLY_READ, Stores, result_of, update_result

log = logging.getLogger(__name__)

MAX_VERSION_BYTES = 256

MAX_SETTLE_S = 1.0
"""The longest wait between writing a version and reading back which one stands."""

RECENTLY_S = 60.0
"""For how long a version that the remote store had is taken to stand there still."""

_MAX_SEEN = 1024

Looked: TypeAlias = "tuple[object, str]"
"""Who looked, and at which version key."""


class VersionStore:
    """Reads, mints and replaces versions. Thread-safe.

    Where nothing may be written remotely, a version that is missing there is this host's own, kept locally,
    so that it finds again what it saves. It ends when a version stands remotely: should that expire, the next
    one is fresh. Where nothing may be written locally either, it is made up for one call.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._file_cache = stores.file_cache
        self._minting: SingleFlight[Looked, str] = SingleFlight()
        self._seen_s: dict[Looked, float] = {}
        self._outlived_s: dict[Looked, float] = {}

    def current(self, key: SnapshotKey, *, allow_stale: bool = False) -> str:
        """The version that `key` is to carry (its own version_id does not matter).

        Args:
            allow_stale: When the remote store cannot be reached, take the version it had when this
                host last asked. An invalidation since then goes unnoticed, so this is off by default.
        """
        name = keys.version_key(key)
        if self._stores.remote is None:
            return self._current_local(name)
        try:
            version = self._current_remote(key)
        except SnaploaderError as error:
            if not (allow_stale and error.transient):
                raise
            last_known = self._read_local(name)
            if last_known is None:
                raise
            log.warning("using the last known snapshot version %s: %s", last_known, error)
            return last_known
        if not self._stores.readonly:
            self._remember(name, version)
        return version

    def look(self, key: SnapshotKey) -> tuple[str, str]:
        """The version that this host remembers, and the one that stands remotely; "" for none."""
        names = reversed(self.local_refs(key))
        here = next(filter(None, (self._read_local(name, use=False) for name in names)), "")
        return here, (self._read_remote(key) or "") if self._stores.remote is not None else ""

    def local_refs(self, key: SnapshotKey) -> list[str]:
        """The refs of the file cache that this host may know the version of `key` from."""
        return [keys.version_key(key), keys.own_version_key(key)]

    def stood(self, key: SnapshotKey) -> bool:
        """Whether the version that `key` carries stands remotely, or stood less than `RECENTLY_S` ago."""
        return self._stands(key, self._seen_s)

    def outlived_save(self, key: SnapshotKey) -> bool:
        """Whether that version stands after a save, or did after one less than `RECENTLY_S` ago."""
        return self._stands(key, self._outlived_s)

    def _stands(self, key: SnapshotKey, looks_s: dict[Looked, float]) -> bool:
        """Whether there is a result, whatever it says. A look that found one is noted in `looks_s`."""
        if time.monotonic() - looks_s.get(_looked(key), -math.inf) < RECENTLY_S:
            return True
        try:
            self._stores.server.get_action_result(self._remote_name(key))
        except NotFound:
            return False
        _note(looks_s, key)
        return True

    def renew(self, key: SnapshotKey) -> str:
        """Write a new version, and with it invalidate all snapshots of the key's kind of machine."""
        has_remote = self._stores.remote is not None
        self._stores.check_may_write("invalidate", remote=has_remote)
        name = keys.version_key(key)
        version = str(uuid.uuid4())
        if not has_remote:
            self._keep(name, version)
            return version
        return self._stores.pool.see_through(lambda: self._renew_remotely(key, version))

    def _renew_remotely(self, key: SnapshotKey, version: str) -> str:
        name = keys.version_key(key)
        before = self._read_remote(key, repair=True)
        try:
            self._write_remote(key, version, replaces=before is not None)
        except SnaploaderError as error:
            error.add_note("snapshots are not invalidated: the version that stood there stands")
            raise
        stands = self._read_remote(key)
        if stands is None or stands == before:
            raise FailedPrecondition(
                f"the remote cache accepted version {version} under {name} and does not have it: snapshots "
                "are not invalidated; check that these credentials may write to its action cache, and that "
                "it keeps what it is given"
            )
        self._remember(name, stands)
        return stands

    def _remember(self, name: str, version: str) -> None:
        """Keep a copy of what the authority said, where the file cache takes it."""
        try:
            self._keep(name, version)
        except SnaploaderError as error:
            log.warning("the snapshot version is not kept locally: %s", error)

    def _keep(self, name: str, version: str, *, overwrite: bool = True) -> None:
        self._file_cache.put_ref(name, _result(version).SerializeToString(), overwrite=overwrite)

    def _current_local(self, name: str) -> str:
        version = self._read_local(name)
        if version is not None:
            return version
        version = str(uuid.uuid4())
        if self._stores.readonly:
            return version
        self._keep(name, version, overwrite=False)
        return self._read_local(name) or version

    def _own(self, key: SnapshotKey) -> str:
        """This host's own version: of all its loaders and processes, as long as none stands remotely."""
        try:
            return self._current_local(keys.own_version_key(key))
        except (ResourceExhausted, PermissionDenied) as error:
            log.warning("a version of this host's own is not kept, and counts for one call: %s", error)
            return str(uuid.uuid4())

    def _current_remote(self, key: SnapshotKey) -> str:
        version = self._read_remote(key)
        if version is not None:
            own = keys.own_version_key(key)
            if not self._stores.readonly and self._read_local(own) is not None:
                self._file_cache.delete_ref(own)
            return version
        if self._stores.readonly or self._stores.remote_readonly:
            return self._own(key)

        def mint() -> str:
            with own_errors():
                # Another thread may have minted since this one looked.
                return self._read_remote(key) or self._mint_remotely(key)

        return self._minting.run(_looked(key), mint, wait)

    def _mint_remotely(self, key: SnapshotKey) -> str:
        version = str(uuid.uuid4())
        start = time.monotonic()
        try:
            self._write_remote(key, version, replaces=False)
        except (*MAY_ONLY_READ, Internal) as error:
            # A write-once action cache refuses the second to write.
            stands = self._read_remote(key)
            if stands is not None:
                return stands
            if not isinstance(error, MAY_ONLY_READ):
                raise
            # A host that may only read shares nothing it saves, so a version of its own is harmless.
            log.info("cannot store a snapshot version remotely, using one of this host's own: %s", error)
            return self._own(key)
        # A rival that saw no version either has written its own within about a round trip of ours.
        current().sleep(min(MAX_SETTLE_S, 2 * (time.monotonic() - start)))
        return self._read_remote(key) or version

    def _read_remote(self, key: SnapshotKey, *, repair: bool = False) -> str | None:
        """The version that stands remotely; None when there is none, or with `repair` when it is none."""
        try:
            digest = self._remote_name(key)
            version = _decode(self._stores.server.get_action_result(digest), digest.hash)
        except NotFound:
            return None
        except DataLoss:
            if not repair:
                raise
            return None
        _note(self._seen_s, key)
        return version

    def _write_remote(self, key: SnapshotKey, version: str, *, replaces: bool) -> None:
        what = f"the snapshot version of {key}"
        update_result(self._stores.server, self._remote_name(key), _result(version), what, replaces=replaces)

    def _remote_name(self, key: SnapshotKey) -> Digest:
        return keys.remote_version_digest(key, self._stores.server.digest_function)

    def _read_local(self, name: str, *, use: bool = True) -> str | None:
        """The version under a ref. Without `use` this changes nothing: a damaged one stays."""
        try:
            data = self._file_cache.get_ref(name, use=use)
        except (NotFound, DataLoss):
            return None
        try:
            return _decode(ActionResult.FromString(data), name)
        except (DecodeError, SnaploaderError) as error:
            log.warning("the local snapshot version is unreadable: %s", error)
            if use and not self._stores.readonly:
                self._file_cache.delete_ref(name)
            return None


def _looked(key: SnapshotKey) -> Looked:
    return current().caller, keys.version_key(key)


def _note(looks_s: dict[Looked, float], key: SnapshotKey) -> None:
    if len(looks_s) >= _MAX_SEEN:
        looks_s.clear()
    looks_s[_looked(key)] = time.monotonic()


def _result(version: str) -> ActionResult:
    return result_of(SnapshotVersionMetadata(version_id=version))


def _decode(result: ActionResult, name: str) -> str:
    for packed in result.execution_metadata.auxiliary_metadata:
        try:
            metadata = unpack_any(packed, SnapshotVersionMetadata)
        except InvalidArgument as error:
            raise DataLoss(f"the snapshot version under {name} cannot be parsed") from error
        if metadata is not None and 0 < len(metadata.version_id) <= MAX_VERSION_BYTES:
            return metadata.version_id
    raise DataLoss(
        f"what the cache holds under the version key {name} is no snapshot version: "
        "run `snaploader invalidate` to write a new one"
    )
