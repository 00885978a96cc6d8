"""The blobs of one group: looking them up, opening them verified, publishing them."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from operator import itemgetter

import numpy as np

from snaploader import files
from snaploader.digest import Digest, DigestFunction, empty_digest
from snaploader.errors import DataLoss, NotFound, ResourceExhausted, translate_os_errors
from snaploader.filecache import recency
from snaploader.filecache.durability import Durability
from snaploader.filecache.evict import Evictor
from snaploader.filecache.layout import space_of
from snaploader.filecache.recency import UseLog
from snaploader.filecache.scan import ShardListings, disk_bytes, entry_name, set_aside_odd
from snaploader.filecache.usage import CacheContext, Section
from snaploader.files import NamelessFile, OddEntry, open_regular
from snaploader.formats.digests import DigestArray, to_rows, to_words

SLOTS = 1 << 19


class VerifiedMemo:
    """Remembers verified files by inode, size and time of last write. Thread-safe.

    A table of fixed size (4 MiB) with two places per entry; the older makes room. A forgotten entry costs
    one more hash. Fingerprints have 64 bits under Python's per-process random hash seed, so that an
    entry is not mistaken for another by chance or by design.
    """

    def __init__(self) -> None:
        # Zeros that take neither memory nor time before they are touched. A memoryview hands out plain ints.
        self._table = np.zeros(SLOTS, np.uint64).data

    def knows(self, digest: Digest, status: os.stat_result) -> bool:
        """Tell whether this very file was found to have this digest, and was not written to since."""
        print_, slot = _fingerprint(digest, status)
        return print_ in (self._table[slot], self._table[slot + 1])

    def add(self, digest: Digest, status: os.stat_result) -> None:
        """Remember that the file has this digest."""
        print_, slot = _fingerprint(digest, status)
        if self._table[slot] != print_:
            self._table[slot + 1] = self._table[slot]
            self._table[slot] = print_


def _fingerprint(digest: Digest, status: os.stat_result) -> tuple[int, int]:
    key = (digest.hash, digest.size_bytes, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    # Zero marks a free place, hence the lowest bit. The slot comes from other bits than those compared
    # would miss: all 64 are compared.
    value = hash(key) & 0xFFFF_FFFF_FFFF_FFFF | 1
    return value, (value >> 20) % (SLOTS // 2) * 2


BULK_DIGESTS = 1024
"""From this many digests on, folders are listed instead of each file being looked at."""
PRESENT_TRIES = 2
"""Looks at a blob that is to be added and is there: one that finds it unverified, one afterwards."""

_HASH_OF = itemgetter(Digest._fields.index("hash"))
_FUNCTION_OF = itemgetter(Digest._fields.index("function"))

_logger = logging.getLogger(__name__)


class BlobSpace:
    """The blobs of one group. Thread-safe, process-safe."""

    def __init__(
        self,
        context: CacheContext,
        durability: Durability,
        uses: UseLog,
        evictor: Evictor,
    ) -> None:
        self._context = context
        self._durability = durability
        self._uses = uses
        self._evictor = evictor
        self._memo = VerifiedMemo()
        self._listings = ShardListings(context.layout, durability)

    @property
    def mode(self) -> int:
        """The permission bits of the files."""
        return self._context.folder.access.readonly_mode

    def path(self, digest: Digest) -> str:
        """Tell where the file of a blob is, or would be."""
        return self._context.layout.blob(digest)

    def step_done(self, step: str) -> None:
        """Tell that a step was done; see `HostEnvironment.after_step`."""
        self._context.host.after_step(step)

    # Looking up

    def find_missing(self, digests: Collection[Digest]) -> set[Digest]:
        """See `FileCache.find_missing`."""
        with translate_os_errors("cannot look up blobs in the file cache"):
            if len(digests) < BULK_DIGESTS:
                return {digest for digest in digests if not _is_empty_blob(digest) and not self.touch(digest)}
            if isinstance(digests, DigestArray):
                return self._find_missing_of(digests.function, digests)
            return self._find_missing_bulk(list(digests))

    def _find_missing_bulk(self, digests: list[Digest]) -> set[Digest]:
        functions = set(map(_FUNCTION_OF, digests))
        if len(functions) == 1:
            return self._find_missing_of(functions.pop(), digests)
        missing: set[Digest] = set()
        for function in functions:
            missing |= self._find_missing_of(function, [one for one in digests if one.function is function])
        return missing

    def _find_missing_of(self, function: DigestFunction, digests: list[Digest] | DigestArray) -> set[Digest]:
        if isinstance(digests, DigestArray):
            words = to_rows(digests.hashes)
        else:
            words = to_words(list(map(_HASH_OF, digests)))
        present = self._listings.contains(space_of(function), words)
        if isinstance(digests, DigestArray):
            missing = set(digests.take(~present))
        else:
            missing = {digests[row] for row in np.flatnonzero(~present).tolist()}
        missing.discard(empty_digest(function))
        if self._durability.any_suspects:
            # Listings leave suspects out, so that each is looked at here.
            missing = {digest for digest in missing if not self.touch(digest)}
        if present.any():
            self._uses.append(self._context.layout.group, words[present, 0], self._context.host.now_ns())
        return missing

    def touch(self, digest: Digest) -> bool:
        """Tell whether a blob is here, which counts as a use. Suspects of a power failure are read."""
        path = self._context.layout.blob(digest)
        try:
            status = os.stat(path, follow_symlinks=False)
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_size == digest.size_bytes
                and not self._durability.is_suspect(status)
            ):
                recency.touch(path, status, self._context.host.now_ns())
            else:
                os.close(self._open(digest))
        except (FileNotFoundError, NotADirectoryError, NotFound, DataLoss):
            return False
        return True

    # Reading

    def open(self, digest: Digest) -> int:
        """See `FileCache.open`."""
        try:
            fd = self._open(digest)
        except NotFound:
            self._context.counters.add(misses=1)
            raise
        self._context.counters.add(hits=1)
        return fd

    def _open(self, digest: Digest) -> int:
        path = self._context.layout.blob(digest)
        with translate_os_errors(f"cannot open blob {digest}"):
            try:
                fd, status = open_regular(path)
            except (FileNotFoundError, NotADirectoryError):
                if _is_empty_blob(digest):
                    return self._open_new_empty(digest)
                raise NotFound(f"blob {digest} is not in the file cache") from None
            except OddEntry as error:
                set_aside_odd(self._context, path)
                raise NotFound(f"blob {digest} is not in the file cache: {error}") from error
            try:
                if not self._memo.knows(digest, status):
                    status = self._verify(digest, fd, status)
                recency.touch(fd, status, self._context.host.now_ns())
            except BaseException:
                os.close(fd)
                raise
        return fd

    def read(self, digest: Digest) -> bytes:
        """See `FileCache.read`."""
        fd = self.open(digest)
        try:
            with translate_os_errors(f"cannot read blob {digest}"):
                data = files.read_file(fd, digest.size_bytes)
        finally:
            os.close(fd)
        if len(data) != digest.size_bytes:
            raise DataLoss(f"blob {digest} was changed to {len(data)} bytes while it was read: ask again")
        return data

    def _verify(self, digest: Digest, fd: int, status: os.stat_result) -> os.stat_result:
        """Hash an open file; return its status, which changes if it was suspect. DataLoss when it is bad."""
        if status.st_size == digest.size_bytes:
            found, size = files.hash_file(fd, digest.function)
        else:
            found, size = "", status.st_size
        self._context.counters.add(verified_blobs=1)
        if found == digest.hash and size == digest.size_bytes:
            if self._durability.is_suspect(status):
                # It proved right: it is written anew, as it were, outside the window of suspicion.
                with suppress(PermissionError):
                    os.utime(fd, ns=(status.st_atime_ns, self._context.host.now_ns()))
                status = os.fstat(fd)
            self._memo.add(digest, status)
            return status
        if not found and not self._is_hollow(status) and self._is_other_size(digest, fd, status):
            raise DataLoss(
                f"blob {digest}: the cache has this hash with a size of {status.st_size} bytes, "
                "so the digest is wrong"
            )
        self.quarantine(digest, status)
        raise DataLoss(
            f"blob {digest} in the file cache had wrong bytes and is in quarantine now: fetch it again"
        )

    def _is_hollow(self, status: os.stat_result) -> bool:
        """Tell whether a file is larger than the cache and mostly a hole, so that reading it takes hours."""
        return status.st_size > max(self._context.max_bytes, disk_bytes(status))

    def _is_other_size(self, digest: Digest, fd: int, status: os.stat_result) -> bool:
        """Tell whether the file is right and the size in the digest is wrong."""
        real = Digest(digest.hash, status.st_size, digest.function)
        if self._memo.knows(real, status):
            return True
        right = files.hash_file(fd, digest.function) == (digest.hash, status.st_size)
        if right:
            self._memo.add(real, status)
        return right

    def _open_new_empty(self, digest: Digest) -> int:
        with self.stage(digest) as staged:
            self.publish(digest, staged.fd, staged.link)
        return self._open(digest)

    # Writing

    def stage(self, digest: Digest | None = None) -> NamelessFile:
        """Make an empty file that is to become a blob, near its place if the digest is known already."""
        layout = self._context.layout
        folder = layout.group_path() if digest is None else os.path.dirname(layout.blob(digest))
        return self._context.folder.nameless_file(folder)

    def check_fits(self, size: int) -> None:
        """Raise ResourceExhausted for a blob that can never fit."""
        if size > self._context.max_bytes:
            raise ResourceExhausted(
                f"a blob of {size} bytes does not fit into a file cache of {self._context.max_bytes}: "
                "raise its max_bytes"
            )

    def present(self, digest: Digest) -> bool:
        """Tell whether a blob that is to be added is here already and verified, which counts as a use.

        What is there is verified, or else good bytes at hand would be dropped in favour of bad ones.
        """
        path = self._context.layout.blob(digest)
        # Cheap for what is not there, which is the common case.
        if not os.path.exists(path):
            return False
        for _ in range(PRESENT_TRIES):
            # Evictions happen in sections too: none takes the file between the look at it and its use.
            with self._context.ledger.section():
                try:
                    status = os.stat(path, follow_symlinks=False)
                except (FileNotFoundError, NotADirectoryError):
                    return False
                is_known = self._memo.knows(digest, status)
                if is_known:
                    recency.touch(path, status, self._context.host.now_ns())
            if is_known:
                self._context.counters.add(present_blobs=1)
                return True
            try:
                # Takes long for a big blob, so that it is not done in a section; and then it is known.
                os.close(self._open(digest))
            except (NotFound, DataLoss):
                return False
        # It is replaced all the time. `publish` copes with one that is there.
        return False

    def publish(self, digest: Digest, fd: int, link: Callable[[str], None]) -> bool:
        """Make a whole, verified file the blob; return False when there was one already.

        It appears under its name in one step, by link(2), which never replaces what is there.

        Args:
            fd: Of the file.
            link: Gives the file a name.
        """
        os.fchmod(fd, self.mode)
        status = os.fstat(fd)
        # The kernel's time may be a tick old, and so older than an earlier use of another blob.
        recency.set_used(fd, status, self._context.host.now_ns())
        size = disk_bytes(status)
        added = self._evictor.add(size, lambda section: self._link(section, digest, size, link))
        if added:
            self._memo.add(digest, status)
            self._context.counters.add(added_blobs=1, added_bytes=digest.size_bytes)
        else:
            self._context.counters.add(present_blobs=1)
        return added

    def _link(self, section: Section, digest: Digest, size: int, link: Callable[[str], None]) -> bool:
        target = self._context.layout.blob(digest)
        name = self._name(digest)
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(target, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                recency.touch(target, status, self._context.host.now_ns())
                return False
            self._context.folder.set_aside(target)
        section.change(name, 0, size)
        try:
            self._context.host.after_step("blob.counted")
            try:
                link(target)
            except (FileNotFoundError, NotADirectoryError):
                self._context.folder.make_folder(os.path.dirname(target))
                link(target)
        except BaseException:
            section.change(name, size, 0)
            raise
        self._context.host.after_step("blob.linked")
        return True

    def check(self, hash_: str, function: DigestFunction) -> tuple[Digest, bool] | None:
        """Hash the blob of this name whatever is known of it; return whether it is right, None if gone."""
        path = self._context.layout.entry(space_of(function), hash_)
        with translate_os_errors(f"cannot verify blob {hash_}"):
            try:
                fd, status = open_regular(path)
            except (FileNotFoundError, OddEntry):
                return None
            try:
                digest = Digest(hash_, status.st_size, function)
                if self._is_hollow(status):
                    self.quarantine(digest, status)
                    return digest, False
                self._verify(digest, fd, status)
                # Reading may have set the time of last access, and this was no use.
                recency.set_used(fd, os.fstat(fd), status.st_atime_ns)
            except DataLoss:
                return digest, False
            finally:
                os.close(fd)
        return digest, True

    # Taking away

    def remove(self, digest: Digest) -> bool:
        """See `FileCache.remove`."""
        path = self._context.layout.blob(digest)
        with translate_os_errors(f"cannot remove blob {digest}"), self._context.ledger.section() as section:
            try:
                status = os.stat(path, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    self._context.folder.set_aside(path)
                    return True
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            section.change(self._name(digest), disk_bytes(status), 0)
        return True

    def quarantine(self, digest: Digest, status: os.stat_result) -> None:
        """Take a bad file out of use, unless another stands in its place by now."""
        path = self._context.layout.blob(digest)
        with self._context.ledger.section() as section:
            now = self._context.folder.set_aside(path, known=status)
            if now is None:
                return
            section.change(self._name(digest), disk_bytes(now), 0)
        self._context.counters.add(quarantined_blobs=1)
        _logger.warning(
            "blob %s had wrong bytes and was moved to %s", digest, self._context.layout.quarantine
        )

    def _name(self, digest: Digest) -> str:
        return entry_name(self._context.layout.group, space_of(digest.function), digest.hash)


def _is_empty_blob(digest: Digest) -> bool:
    return digest.size_bytes == 0 and digest.hash == digest.function.hash(b"")
