"""The file cache itself: one object that puts the parts together."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt

from snaploader import files
from snaploader._environment import HOST, HostEnvironment
from snaploader.blobstore import Sink, TransferStatistics, Upload
from snaploader.context import CallContext, current, in_context
from snaploader.digest import Buffer, Digest, DigestFunction
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, translate_os_errors
from snaploader.filecache import bulk
from snaploader.filecache.blobs import BlobSpace, BlobWriter, VerifiedMemo
from snaploader.filecache.bulk import UseLog
from snaploader.filecache.durability import Durability
from snaploader.filecache.evict import AHEAD_PART, EVICTS_AHEAD_FROM_BYTES, Evictor
from snaploader.filecache.layout import Layout, OpenFolder, Space, group_folder
from snaploader.filecache.refs import RefSpace
from snaploader.filecache.retention import Lease, Pin, PinSpace, PinTable
from snaploader.filecache.usage import CacheContext, CacheEntry, CacheStatistics, Ledger, VerifyReport
from snaploader.files import PRIVATE, Access
from snaploader.formats.digests import to_prefixes, to_words
from snaploader.telemetry import NOBODY, Observer

DEFAULT_MAX_BYTES = 10 << 30
MAX_PARTITIONS = 1024
"""Groups that an open cache remembers the listings of, besides the one it was made with."""
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Partition:
    """What is one group's own in an open cache. It holds no descriptors."""

    context: CacheContext
    blobs: BlobSpace
    refs: RefSpace
    pins: PinSpace


class FileCache:
    """Blobs and refs in a folder of this host, shared by threads and processes.

    A `snaploader.blobstore.BlobStore`. See the package's docstring for the promises.
    Thread-safe. Not to be used in a forked child: make another one there, on the same folder.

    Args:
        root: The folder; made if absent. All on one file system that knows hard links.
        max_bytes: Bound of what all entries of all groups take, in bytes of disk blocks. Each process goes by
            its own; default 10 GiB.
        evict_ahead_bytes: How much of that is kept free, by a thread that evicts before an addition needs the
            room. 0: there is no such thread, and each addition makes its own room. Default: a sixteenth of a
            cache of 1 GiB or more, and 0 for a smaller one.
        cache_mode: Permission bits of the folders, whatever the umask says; files get those of them that
            files have. Default 0o700: this user alone. 0o2770 lets a group of users share the cache, 0o777
            all of them: each must trust the others, and give the same mode. See docs/operating.md.
        group_id: The partition to work in, where the context of a call names no other: nothing of one group
            is visible to another. Up to 128 letters, digits and . _ @ + - or empty, which is a partition too.
        context: What each call goes by where its own `context` leaves something open; see
            `snaploader.CallContext`. Its group counts before `group_id`. Every method ends within a tenth of
            a second when its call is over, but for one step of the operating system (link, rename, fsync,
            a clone of a file's blocks) and `sync`, which is one.
        observer: Reads the counts of this cache; see docs/monitoring.md.

    Raises:
        InvalidArgument: The group id or the mode is malformed, `max_bytes` is not positive, or
            `evict_ahead_bytes` is negative or more than that.
        FailedPrecondition: The folder, or one in it, is a symbolic link.
        PermissionDenied: It cannot be made or written, belongs to somebody unexpected, or others may write
            to it.
        ResourceExhausted: The disk is full.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        evict_ahead_bytes: int | None = None,
        cache_mode: int = PRIVATE,
        group_id: str = "",
        context: CallContext | None = None,
        observer: Observer | None = None,
        _environment: HostEnvironment = HOST,
    ) -> None:
        if max_bytes <= 0:
            raise InvalidArgument(f"max_bytes is {max_bytes}: a file cache needs room")
        if evict_ahead_bytes is None:
            evict_ahead_bytes = max_bytes // AHEAD_PART if max_bytes >= EVICTS_AHEAD_FROM_BYTES else 0
        if not 0 <= evict_ahead_bytes <= max_bytes:
            raise InvalidArgument(
                f"evict_ahead_bytes is {evict_ahead_bytes}: 0 to {max_bytes} can be kept free"
            )
        self._group_id = group_id
        if context is not None and context.group_id is not None:
            self._group_id = context.group_id
        layout = Layout(os.path.abspath(os.fspath(root)), group_folder(self._group_id))
        self._root = layout.root
        self._default_context = context
        self._closed = False
        self._pid = os.getpid()
        used_before = os.path.isdir(layout.groups)
        access = Access(cache_mode, "cache_mode")
        with translate_os_errors(f"cannot open the file cache {layout.root!r}"), ExitStack() as undo:
            own = OpenFolder(layout, access)
            undo.callback(own.close)
            ledger = Ledger(own, max_bytes)
            undo.callback(ledger.lock.close)
            uses = UseLog(own)
            undo.callback(uses.close)
            self._durability = Durability(own, ledger, _environment.boot_id(), used_before=used_before)
            undo.callback(self._durability.close)
            self._context = CacheContext(layout, own, ledger, _environment)
            self._pin_table = PinTable(layout)
            self._evictor = Evictor(self._context, self._durability, uses, self._pin_table, evict_ahead_bytes)
            undo.callback(self._evictor.close)
            self._uses = uses
            self._memo = VerifiedMemo()
            self._lock = threading.Lock()
            self._own_partition = self._partition_of(self._context)
            self._partitions: OrderedDict[str, Partition] = OrderedDict()
            own.sweep()
            self._close = undo.pop_all().close
        self._stop_watching = (observer or NOBODY).watch(self)

    @property
    def root(self) -> str:
        """The folder, absolute."""
        return self._root

    @property
    def group_id(self) -> str:
        """The partition worked in: that of the call that runs, else the one that the cache was made with.

        So within a call of the loader it is that call's.
        """
        group_id = current().group_id
        return self._group_id if group_id is None else group_id

    @property
    def max_bytes(self) -> int:
        """The bound, in bytes of disk blocks."""
        return self._context.ledger.max_bytes

    # Blobs: the BlobStore interface

    @in_context
    def find_missing(
        self, digests: Collection[Digest], *, use: bool = True, context: CallContext | None = None
    ) -> set[Digest]:
        """Return those of `digests` that are not here. With `use` this counts as a use of those that are.

        Exact, even when files were removed behind the cache's back. Costs a look at each file for a few
        digests, and one at each of 256 folders for many (then a wrong size in a digest of a known hash is
        only noticed when it is opened). What is here may be evicted at any time unless it is leased.
        """
        return self._partition.blobs.find_missing(digests, use=use)

    @in_context
    def read(self, digest: Digest, *, context: CallContext | None = None) -> bytes:
        """Return the bytes of a blob. Errors as `open`."""
        return self._partition.blobs.read(digest)

    @in_context
    def read_to(
        self, digest: Digest, write: Callable[[Buffer], object], *, context: CallContext | None = None
    ) -> None:
        """Hand a blob, of any size, to `write` piece by piece. Errors as `open`."""
        with translate_os_errors(f"cannot read blob {digest}"), open(self.open(digest), "rb") as file:
            count = 0
            while piece := file.read(_PIECE_BYTES):
                current().check()
                count += len(piece)
                write(piece)
            if count != digest.size_bytes:
                raise DataLoss(f"blob {digest} was cut to {count} bytes while it was read; try again")

    @in_context
    def read_many(self, digests: Iterable[Digest], sink: Sink, *, context: CallContext | None = None) -> None:
        """Hand each blob to `sink`, in order, on this thread. The first error ends it and is raised."""
        for digest in digests:
            current().check()
            sink(digest, self.read(digest))

    @in_context
    def write(
        self, digest: Digest, source: Buffer | str | os.PathLike[str], *, context: CallContext | None = None
    ) -> None:
        """Add a blob from bytes or from a copy of a file. DataLoss when they do not have this digest."""
        self._add(digest, source)

    @in_context
    def write_many(
        self, uploads: Iterable[Upload], *, context: CallContext | None = None
    ) -> TransferStatistics:
        """Add many blobs, in order, on this thread. The first error ends it and is raised."""
        blobs = content_bytes = present = 0
        for upload in uploads:
            current().check()
            if self._add(upload.digest, upload.source, verify=not upload.verified):
                blobs += 1
                content_bytes += upload.digest.size_bytes
            else:
                present += 1
        return TransferStatistics(blobs, content_bytes, 0, present)

    def _add(self, digest: Digest, source: Buffer | str | os.PathLike[str], *, verify: bool = True) -> bool:
        if isinstance(source, str | os.PathLike):
            return self.put_file(digest, source, verify=verify)
        if verify and (found := files.hash_bytes(source, digest.function)) != digest.hash:
            raise DataLoss(f"the bytes for blob {digest} have the hash {found}")
        return self.put_verified(digest, source)

    # Blobs: files in and out

    @in_context
    def open(self, digest: Digest, *, context: CallContext | None = None) -> int:
        """Return a read-only descriptor of a blob's file, for the caller to close. This counts as a use.

        The file is hashed at its first use in this process. What stays open stays whole, even when the
        blob is evicted.

        Raises:
            NotFound: The blob is not here.
            DataLoss: The file had wrong bytes; it is in quarantine now, and NotFound from now on. Or
                the cache has this hash with another size, so the digest is wrong.
        """
        return self._partition.blobs.open(digest)

    @in_context
    def path(self, digest: Digest, *, context: CallContext | None = None) -> str:
        """Return the path of a verified blob, which may be evicted unless it is leased. Errors as `open`."""
        os.close(self.open(digest))
        return self._partition.blobs.path(digest)

    @in_context
    def put_verified(self, digest: Digest, data: Buffer, *, context: CallContext | None = None) -> bool:
        """Add bytes that the caller has just hashed, on trust; return False when the blob was here."""
        self._check()
        size = len(memoryview(data).cast("B"))
        if size != digest.size_bytes:
            raise DataLoss(f"blob {digest}: {size} bytes were given for it")
        return self._partition.blobs.put_bytes(digest, data)

    @in_context
    def put_file(
        self,
        digest: Digest,
        path: str | os.PathLike[str],
        *,
        move: bool = False,
        link: bool = False,
        verify: bool = True,
        context: CallContext | None = None,
    ) -> bool:
        """Add a file, verified before it is visible; return False when the blob was here.

        Args:
            move: Take the file away from its old place, without copying where that can be done.
            link: Share the file instead of copying it, where that can be done. The caller promises that its
                bytes never change again; it gets the mode of cached blobs (0400, unless `cache_mode` says
                otherwise) and its time of last write is now.
            verify: Hash the file. False when the caller has hashed these very bytes.

        Raises:
            DataLoss: The file does not have this digest.
            ResourceExhausted: The disk is full, or the cache is full of leased blobs.
        """
        return self._partition.blobs.put_file(digest, os.fspath(path), move=move, link=link, verify=verify)

    @in_context
    def put_private(
        self,
        digest: Digest,
        path: str | os.PathLike[str],
        *,
        link: bool = False,
        context: CallContext | None = None,
    ) -> bool:
        """Add a file under a hash that is not of its bytes; return False when there was one already.

        For what no other machine will ever ask for, so that a hash of its bytes is not worth reading them. It
        is looked up like a blob, by this very digest. Nothing but its size is ever verified: after a power
        failure it counts as lost where it may be damaged. The caller gives each content a hash of its own.

        Args:
            digest: Its hash is the name, its size that of the file.
            link: As for `put_file`.

        Raises:
            DataLoss: The file has another size.
            ResourceExhausted: The disk is full, or the cache is full of leased blobs.
        """
        return self._partition.blobs.put_private(digest, os.fspath(path), link=link)

    @in_context
    def find_private(self, digests: Iterable[Digest], *, context: CallContext | None = None) -> set[Digest]:
        """Return those of `digests` that are here as private files."""
        return self._partition.blobs.find_private(digests)

    @in_context
    def add_file(
        self,
        path: str | os.PathLike[str],
        function: DigestFunction = DigestFunction.SHA256,
        *,
        context: CallContext | None = None,
    ) -> tuple[Digest, bool]:
        """Add a copy of a file, which is read once; return its digest, and whether it was new here."""
        return self._partition.blobs.add_file(os.fspath(path), function)

    @in_context
    def writer(
        self, digest: Digest, *, verify: bool = True, context: CallContext | None = None
    ) -> BlobWriter:
        """Return a writer of a blob in pieces. Without `verify`, commit only what you hashed yourself."""
        return BlobWriter(self._partition.blobs, digest, verify=verify)

    @in_context
    def materialize(
        self,
        digest: Digest,
        destination: str | os.PathLike[str],
        *,
        writable: bool = False,
        mode: int | None = None,
        context: CallContext | None = None,
    ) -> None:
        """Make a blob appear as a file, whole or not at all. Errors as `open`.

        Not writable: a hard link where that can be done, which the consumer must not change. It has the mode
        of cached blobs, 0400 unless `cache_mode` says otherwise. Writable, or of another mode: a copy of its
        own, which shares disk blocks where the file system can.

        Args:
            mode: Permission bits of the file. By default those of cached blobs, or 0600 if it is writable.

        Raises:
            FailedPrecondition: The destination exists; nothing is overwritten.
        """
        self._partition.blobs.materialize(digest, os.fspath(destination), writable=writable, mode=mode)

    @in_context
    def remove(self, digest: Digest, *, context: CallContext | None = None) -> bool:
        """Remove a blob, leased, pinned or neither; return whether it was here.

        Open files and links keep their bytes.
        """
        return self._partition.blobs.remove(digest)

    @in_context
    def lease(
        self,
        digests: Iterable[Digest],
        *,
        hashes: Iterable[npt.NDArray[np.uint8]] = (),
        context: CallContext | None = None,
    ) -> Lease:
        """Keep these blobs from eviction by any process until the lease is released or this process ends.

        Args:
            hashes: More of them, as arrays of shape (n, 32); for many that is a hundred times faster.
        """
        shared = self._partition.context
        with translate_os_errors("cannot lease blobs"):
            first = to_words([digest.hash for digest in digests])[:, 0]
            prefixes = np.concatenate([first, *map(to_prefixes, hashes)])
            return Lease(shared, prefixes)

    # Refs

    @in_context
    def get_ref(self, key: str, *, use: bool = True, context: CallContext | None = None) -> bytes:
        """Return the value of a ref. NotFound when there is none, or it was damaged, and so was removed.

        A key is 64 lower-case hexadecimal digits, as `snaploader.digest.hash_strings` makes them.

        Args:
            use: Whether this counts as a use. If not, nothing is changed: a damaged ref stays, as DataLoss.
        """
        return self._partition.refs.get(key, use=use, mend=use)

    @in_context
    def put_ref(
        self, key: str, data: bytes, *, overwrite: bool = True, context: CallContext | None = None
    ) -> bool:
        """Set a ref in one step; return whether it was set. Without `overwrite` a ref that stands stays."""
        return self._partition.refs.put(key, data, overwrite=overwrite)

    @in_context
    def delete_ref(self, key: str, *, context: CallContext | None = None) -> bool:
        """Remove a ref; return whether there was one."""
        return self._partition.refs.delete(key)

    @in_context
    def refs(self, *, context: CallContext | None = None) -> list[str]:
        """Return the keys of all refs of this group, sorted."""
        self._check()
        layout = self._partition.context.layout
        with translate_os_errors("cannot list refs"):
            return sorted(found.hash for found in bulk.entries(layout, layout.group, spaces=[Space.REFS]))

    # Pins

    @in_context
    def pin(
        self,
        name: str,
        digests: Iterable[Digest] = (),
        *,
        hashes: Iterable[npt.NDArray[np.uint8]] = (),
        refs: Iterable[str] = (),
        context: CallContext | None = None,
    ) -> None:
        """Keep blobs and refs of this group from eviction by any process until the name is unpinned.

        A pin outlives this cache, this process and this boot of the machine: it is on disk when the call
        returns. Pinning again under a name replaces what it kept in one step. What is not here yet is kept
        once it is added. It keeps nothing from `remove`, `delete_ref` or quarantine; and the bytes of the
        blobs themselves are on disk for certain only after `sync`.

        Args:
            name: 1 to 200 letters, digits or any of . _ @ - that do not begin with a dot.
            digests: The blobs. Their sizes are kept too.
            hashes: More of them, as arrays of shape (n, 32) and type uint8, whose sizes stay unknown.
            refs: Keys of refs.

        Raises:
            InvalidArgument: The name, a hash or a key is malformed, or a hash comes with two sizes.
            ResourceExhausted: The disk is full; what was pinned under the name before stays pinned.
        """
        self._partition.pins.pin(name, digests, hashes, refs)

    @in_context
    def unpin(self, name: str, *, context: CallContext | None = None) -> bool:
        """Let go what a name keeps, even when its pin is damaged; return whether there was one."""
        return self._partition.pins.unpin(name)

    @in_context
    def pins(self, prefix: str = "", *, context: CallContext | None = None) -> list[str]:
        """Return the names of this group's pins that begin with `prefix`, sorted, damaged ones too."""
        return self._partition.pins.names(prefix)

    @in_context
    def pinned(self, name: str, *, context: CallContext | None = None) -> Pin:
        """Return what a name keeps from eviction.

        Raises:
            NotFound: There is no such pin.
            DataLoss: The pin is damaged: nothing of the group is evicted until it is mended or unpinned.
        """
        return self._partition.pins.get(name)

    # Upkeep

    @in_context
    def entries(self, *, context: CallContext | None = None) -> list[CacheEntry]:
        """List all entries of this group, the longest unused first."""
        self._check()
        with translate_os_errors("cannot list the file cache"):
            found = sorted(self._found(), key=lambda one: one.used_ns)
            return [self._entry(*one) for one in zip(found, self._pinned(found), strict=True)]

    @in_context
    def statistics(self, *, context: CallContext | None = None) -> CacheStatistics:
        """Return the counts of this moment. Pins that are new since the last call or eviction are read."""
        self._check()
        with translate_os_errors("cannot read the statistics of the file cache"):
            with self._context.ledger.section() as section:
                total_bytes, generation = section.total_bytes, section.pin_generation
            self._pin_table.refresh(generation)
        return self._context.counters.snapshot(total_bytes, self.max_bytes, self._pin_table.totals())

    @in_context
    def prune(self, target_bytes: int = 0, *, context: CallContext | None = None) -> int:
        """Evict, of all groups, down to `target_bytes` of disk blocks; return the size then.

        What is leased or pinned stays.
        """
        self._check()
        return self._evictor.prune(target_bytes)

    @in_context
    def prune_plan(self, target_bytes: int = 0, *, context: CallContext | None = None) -> list[CacheEntry]:
        """List what `prune` would evict now, of all groups, in that order. Nothing is evicted."""
        self._check()
        return [self._entry(found, False, group) for group, found in self._evictor.plan(target_bytes)]

    @in_context
    def verify(self, *, context: CallContext | None = None) -> VerifyReport:
        """Hash all blobs and read all refs and pins of this group. Bad blobs and refs go, bad pins stay."""
        self._check()
        blobs = size = refs = 0
        bad: list[Digest] = []
        bad_refs: list[str] = []
        odd: list[str] = []
        for found in self._found(odd.append):
            if found.space is Space.REFS:
                refs += 1
                try:
                    self._partition.refs.get(found.hash, use=False)
                except NotFound:
                    bad_refs.append(found.hash)
            elif found.space.function is not None:
                checked = self._partition.blobs.check(found.hash, found.space.function)
                if checked is not None:
                    digest, is_right = checked
                    blobs, size = blobs + 1, size + digest.size_bytes
                    if not is_right:
                        bad.append(digest)
        with translate_os_errors("cannot set aside what is no entry of the file cache"):
            for path in odd:
                self._context.set_aside_odd(path)
        pins, bad_pins = self._partition.pins.verify()
        return VerifyReport(blobs, size, tuple(bad), refs, tuple(bad_refs), pins, tuple(bad_pins))

    @in_context
    def sync(self, *, context: CallContext | None = None) -> None:
        """Flush all added so far to disk, so that a power failure leaves no suspects. May take seconds."""
        self._check()
        with translate_os_errors("cannot flush the file cache to disk"):
            self._durability.sync()

    def close(self) -> None:
        """Give up descriptors, leases and background work. Again is fine; any other use is an error then."""
        if not self._closed:
            self._stop_watching()
            self._closed = True
            self._close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a FileCache cannot be pickled or copied, as it has locks and descriptors: make one on the same "
            "folder in each process"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _partition(self) -> Partition:
        """The partition of the call that runs. Raises when the cache cannot be used."""
        self._check()
        group_id = current().group_id
        if group_id is None or group_id == self._group_id:
            return self._own_partition
        with self._lock:
            partition = self._partitions.get(group_id)
            if partition is None:
                layout = Layout(self._root, group_folder(group_id))
                self._context.folder.add_group(layout)
                partition = self._partition_of(replace(self._context, layout=layout))
                self._partitions[group_id] = partition
                if len(self._partitions) > MAX_PARTITIONS:
                    self._partitions.popitem(last=False)
            else:
                self._partitions.move_to_end(group_id)
        return partition

    def _partition_of(self, context: CacheContext) -> Partition:
        blobs = BlobSpace(context, self._durability, self._uses, self._memo)
        return Partition(context, blobs, RefSpace(context), PinSpace(context))

    def _check(self) -> None:
        if self._closed:
            raise FailedPrecondition(f"the file cache {self._root!r} is closed")
        if os.getpid() != self._pid:
            raise FailedPrecondition(
                f"the file cache {self._root!r} was opened before a fork: open another one in the child"
            )

    def _found(self, odd: Callable[[str], None] = lambda _: None) -> Iterator[bulk.FoundEntry]:
        """All entries of this group; see `bulk.entries`."""
        layout = self._partition.context.layout
        return bulk.entries(layout, layout.group, odd)

    def _pinned(self, found: list[bulk.FoundEntry]) -> list[bool]:
        """Tell for each entry whether a pin names it."""
        self._pin_table.refresh(self._context.ledger.pin_generation())
        group = self._partition.context.layout.group
        keys = bulk.use_keys(group, to_words([one.hash for one in found])[:, 0])
        spaces = np.array([one.space for one in found], dtype=np.uint8)
        pinned: list[bool] = self._pin_table.named(spaces, keys).tolist()
        return pinned

    def _entry(self, found: bulk.FoundEntry, pinned: bool, group: str | None = None) -> CacheEntry:
        current().check()
        digest = None
        if found.space is not Space.REFS:
            with suppress(FileNotFoundError):
                size = os.stat(self._partition.context.layout.entry(found.space, found.hash, group)).st_size
                digest = Digest(found.hash, size, found.space.function or DigestFunction.SHA256)
        kind = {Space.REFS: "ref", Space.PRIVATE: "private"}.get(found.space, "blob")
        return CacheEntry(kind, found.hash, digest, found.disk_bytes, found.used_ns / 1e9, pinned)
