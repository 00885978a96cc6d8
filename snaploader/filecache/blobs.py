"""The blobs of one group: looking them up, opening them verified, adding them, putting them elsewhere.

Files share their bytes with the cache where that is safe.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import filterfalse, islice
from operator import itemgetter
from typing import Self

import numpy as np

from snaploader import files
from snaploader.context import CallContext, current, in_context
from snaploader.digest import Buffer, Digest, DigestFunction, empty_digest
from snaploader.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    translate_os_errors,
)
from snaploader.filecache.bulk import ShardListings, UseLog
from snaploader.filecache.durability import Durability
from snaploader.filecache.layout import SPACE_OF, Space, check_hash, disk_bytes, set_used, touch
from snaploader.filecache.usage import CacheContext, Section
from snaploader.files import NamelessFile, closing_fd
from snaploader.formats.digests import DigestArray, to_rows

SLOTS = 1 << 19
BULK_DIGESTS = 1024
"""From this many digests on, folders are listed instead of each file being looked at."""
PRESENT_TRIES = 2
"""Looks at a blob that is to be added and is there: one that finds it unverified, one afterwards."""
WRITABLE_MODE = 0o600

_FUNCTION_OF = itemgetter(Digest._fields.index("function"))
_NO_LINK = frozenset({errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EACCES})
"""Why a link may be refused where a copy works; see link(2)."""

_logger = logging.getLogger(__name__)


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


class BlobSpace:
    """The blobs of one group. Thread-safe, process-safe. What `FileCache` has too is described there."""

    def __init__(
        self, context: CacheContext, durability: Durability, uses: UseLog, memo: VerifiedMemo
    ) -> None:
        self._context = context
        self._layout = context.layout
        self._count = context.counters.add
        self._now_ns = context.host.now_ns
        self._durability = durability
        self._uses = uses
        self._memo = memo
        self._listings = ShardListings(context.layout, durability)
        self.mode = context.folder.access.readonly_mode
        """The permission bits of the files."""

    # Looking up

    def find_missing(self, digests: Collection[Digest], *, use: bool = True) -> set[Digest]:
        with translate_os_errors("cannot look up blobs in the file cache"):
            if len(digests) < BULK_DIGESTS:
                return {digest for digest in digests if not self._is_here(digest, use=use)}
            missing: set[Digest] = set()
            if isinstance(digests, DigestArray):
                self._add_missing(digests, missing, use=use)
            else:
                for function in set(map(_FUNCTION_OF, digests)):
                    self._add_missing(_array_of(digests, function), missing, use=use)
            return missing

    def _add_missing(self, digests: DigestArray, missing: set[Digest], *, use: bool) -> None:
        words = to_rows(digests.hashes)
        present = self._listings.contains(SPACE_OF[digests.function], words)
        if self._has_private_files():
            present |= self._listings.contains(Space.PRIVATE, words)
        absent = np.flatnonzero(~present)
        for start in range(0, len(absent), BULK_DIGESTS):
            current().check()
            some = digests.take(absent[start : start + BULK_DIGESTS])
            # Listings leave suspects out, so that each is looked at here.
            is_here = partial(self._is_here, use=use)
            missing.update(filterfalse(is_here, some) if self._durability.windows else some)
        missing.discard(empty_digest(digests.function))
        if use and present.any():
            self._uses.append(self._layout.group, words[present, 0], self._now_ns())

    def _is_here(self, digest: Digest, *, use: bool = True) -> bool:
        """Tell whether a blob is here; with `use` that counts as one. Suspects are read."""
        if _is_empty_blob(digest):
            return True
        path = self._layout.blob(digest)
        try:
            status = os.stat(path, follow_symlinks=False)
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_size == digest.size_bytes
                and not (self._durability.windows and self._durability.is_suspect(status))
            ):
                if use:
                    touch(path, status, self._now_ns())
            else:
                os.close(self._open(digest))
        except (FileNotFoundError, NotADirectoryError):
            return self._is_private(digest, use=use)
        except (NotFound, DataLoss):
            return False
        return True

    # Reading

    def open(self, digest: Digest) -> int:
        try:
            fd = self._open(digest)
        except NotFound:
            self._count(misses=1)
            raise
        self._count(hits=1)
        return fd

    def _open(self, digest: Digest) -> int:
        path = self._layout.blob(digest)
        with translate_os_errors(f"cannot open blob {digest}"):
            try:
                fd, status = self._context.open_entry(path, f"blob {digest}")
            except NotFound:
                if not _is_empty_blob(digest):
                    with suppress(NotFound):
                        return self._open_private(digest)
                    raise
                with self.stage(digest) as staged:
                    self._publish(digest, staged.fd, staged.link)
                return self._open(digest)
            try:
                if not self._memo.knows(digest, status):
                    status = self._verify(digest, fd, status)
                touch(fd, status, self._now_ns())
            except BaseException:
                os.close(fd)
                raise
        return fd

    def read(self, digest: Digest) -> bytes:
        with closing_fd(self.open(digest)) as fd, translate_os_errors(f"cannot read blob {digest}"):
            data = files.read_file(fd, digest.size_bytes)
        if len(data) != digest.size_bytes:
            raise DataLoss(f"blob {digest} was changed to {len(data)} bytes while it was read: ask again")
        return data

    def check(self, hash_: str, function: DigestFunction) -> tuple[Digest, bool] | None:
        """Hash the blob of this name whatever is known of it; return whether it is right, None if gone."""
        path = self._layout.entry(SPACE_OF[function], hash_)
        with translate_os_errors(f"cannot verify blob {hash_}"):
            try:
                fd, status = self._context.open_entry(path, f"blob {hash_}")
            except NotFound:
                return None
            try:
                digest = Digest(hash_, status.st_size, function)
                if self._is_hollow(status):
                    self._quarantine(digest, status)
                    return digest, False
                self._verify(digest, fd, status)
                # Reading may have set the time of last access, and this was no use.
                set_used(fd, os.fstat(fd), status.st_atime_ns)
            except DataLoss:
                return digest, False
            finally:
                os.close(fd)
        return digest, True

    def _verify(self, digest: Digest, fd: int, status: os.stat_result) -> os.stat_result:
        """Hash an open file; return its status, which changes if it was suspect. DataLoss when it is bad."""
        if status.st_size == digest.size_bytes:
            found, size = files.hash_file(fd, digest.function)
        else:
            found, size = "", status.st_size
        self._count(verified_blobs=1)
        if found == digest.hash and size == digest.size_bytes:
            if self._durability.windows and self._durability.is_suspect(status):
                # It proved right: it is written anew, as it were, outside the window of suspicion.
                with suppress(PermissionError):
                    os.utime(fd, ns=(status.st_atime_ns, self._now_ns()))
                status = os.fstat(fd)
            self._memo.add(digest, status)
            return status
        if not found and not self._is_hollow(status) and self._is_other_size(digest, fd, status):
            raise DataLoss(
                f"blob {digest}: the cache has this hash with a size of {status.st_size} bytes, "
                "so the digest is wrong"
            )
        self._quarantine(digest, status)
        raise DataLoss(
            f"blob {digest} in the file cache had wrong bytes and is in quarantine now: fetch it again"
        )

    def _is_hollow(self, status: os.stat_result) -> bool:
        """Tell whether a file is larger than the cache and mostly a hole, so that reading it takes hours."""
        return status.st_size > max(self._context.ledger.max_bytes, disk_bytes(status))

    def _is_other_size(self, digest: Digest, fd: int, status: os.stat_result) -> bool:
        """Tell whether the file is right and the size in the digest is wrong."""
        real = Digest(digest.hash, status.st_size, digest.function)
        if self._memo.knows(real, status):
            return True
        right = files.hash_file(fd, digest.function) == (digest.hash, status.st_size)
        if right:
            self._memo.add(real, status)
        return right

    def _quarantine(self, digest: Digest, status: os.stat_result) -> None:
        """Take a bad file out of use, unless another stands in its place by now."""
        with self._context.ledger.section() as section:
            now = self._context.folder.set_aside(self._layout.blob(digest), known=status)
            if now is None:
                return
            section.change(self._name(digest), disk_bytes(now), 0)
        self._count(quarantined_blobs=1)
        _logger.warning("blob %s had wrong bytes and was moved to %s", digest, self._layout.quarantine)

    # Adding

    def put_bytes(self, digest: Digest, data: Buffer) -> bool:
        """Add bytes whose hash was checked; return False when the blob was here."""
        self.check_fits(digest.size_bytes)
        with translate_os_errors(f"cannot add blob {digest}"):
            if self._is_present(digest):
                return False
            with self.stage(digest) as staged:
                files.write_all(staged.fd, data)
                return self.publish_written(digest, staged)

    def put_file(
        self,
        digest: Digest,
        path: str,
        *,
        move: bool,
        link: bool,
        verify: bool,
        space: Space | None = None,
    ) -> bool:
        self.check_fits(digest.size_bytes)
        with translate_os_errors(f"cannot add {path!r} as blob {digest}"):
            fd, size = files.open_source(path)
            with closing_fd(fd):
                if size != digest.size_bytes:
                    raise DataLoss(f"{path!r} has {size} bytes, so it is not blob {digest}")
                if self._is_present(digest):
                    added = False
                elif not (move or link):
                    return self._put_copy(digest, fd, path, verify=verify, space=space)
                else:
                    if verify and files.hash_file(fd, digest.function)[0] != digest.hash:
                        raise DataLoss(f"{path!r} does not have the digest {digest}")
                    added = self._put_link(digest, fd, path, space)
            if move:
                os.unlink(path)
            return added

    def _put_link(self, digest: Digest, fd: int, path: str, space: Space | None = None) -> bool:
        before = os.fstat(fd)
        try:
            # The time of last write is the time of adding: it tells what a power failure may have damaged.
            os.utime(fd)
            return self._publish(digest, fd, lambda target: os.link(path, target), space)
        except BaseException as error:
            # Not the cache's after all.
            with suppress(PermissionError):
                os.fchmod(fd, stat.S_IMODE(before.st_mode))
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            if not isinstance(error, OSError) or error.errno not in _NO_LINK:
                raise
        return self._put_copy(digest, fd, path, verify=False, space=space)

    def _put_copy(
        self, digest: Digest, source: int, name: str, *, verify: bool, space: Space | None = None
    ) -> bool:
        with self.stage(digest) as staged:
            if verify:
                hasher = digest.function.hasher()
                size = files.copy_hashing(source, staged.fd, hasher, digest.size_bytes)
                if size != digest.size_bytes or hasher.hexdigest() != digest.hash:
                    raise DataLoss(f"{name!r} does not have the digest {digest}")
            else:
                files.copy_content(source, staged.fd, digest.size_bytes)
            return self.publish_written(digest, staged, space=space)

    def add_file(self, path: str, function: DigestFunction) -> tuple[Digest, bool]:
        with translate_os_errors(f"cannot add {path!r} to the file cache"):
            source, size = files.open_source(path)
            with closing_fd(source):
                self.check_fits(size)
                with self.stage() as staged:
                    hasher = function.hasher()
                    size = files.copy_hashing(source, staged.fd, hasher)
                    digest = Digest(hasher.hexdigest(), size, function)
                    return digest, self.publish_written(digest, staged, look=True)

    def check_fits(self, size: int) -> None:
        """Raise ResourceExhausted for a blob that can never fit."""
        max_bytes = self._context.ledger.max_bytes
        if size > max_bytes:
            raise ResourceExhausted(
                f"a blob of {size} bytes does not fit into a file cache of {max_bytes}: raise its max_bytes"
            )

    def stage(self, digest: Digest | None = None) -> NamelessFile:
        """Make an empty file that is to become a blob, near its place if the digest is known already."""
        self._context.ledger.keep_bound()
        return self._context.folder.nameless_file(
            self._layout.group_path() if digest is None else os.path.dirname(self._layout.blob(digest))
        )

    def _is_present(self, digest: Digest) -> bool:
        """Tell whether a blob that is to be added is here already and verified, which counts as a use.

        What is there is verified, or else good bytes at hand would be dropped in favour of bad ones.
        """
        path = self._layout.blob(digest)
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
                    touch(path, status, self._now_ns())
            if is_known:
                self._count(present_blobs=1)
                return True
            try:
                # Takes long for a big blob, so that it is not done in a section; and then it is known.
                os.close(self._open(digest))
            except (NotFound, DataLoss):
                return False
        # It is replaced all the time. `_publish` copes with one that is there.
        return False

    def publish_written(
        self, digest: Digest, staged: NamelessFile, *, look: bool = False, space: Space | None = None
    ) -> bool:
        """Publish a staged file; with `look`, unless the blob is here by now."""
        self._context.host.after_step("blob.written")
        if look and self._is_present(digest):
            return False
        return self._publish(digest, staged.fd, staged.link, space)

    def _publish(
        self, digest: Digest, fd: int, link: Callable[[str], None], space: Space | None = None
    ) -> bool:
        """Make a whole, verified file the blob; return False when there was one already.

        It appears under its name in one step, by `link`, as link(2) never replaces what is there. In the
        space of private files it need not be verified.
        """
        space = SPACE_OF[digest.function] if space is None else space
        os.fchmod(fd, self.mode)
        status = os.fstat(fd)
        # The kernel's time may be a tick old, and so older than an earlier use of another blob.
        set_used(fd, status, self._now_ns())
        size = disk_bytes(status)
        added = self._context.ledger.add(size, lambda section: self._link(section, space, digest, size, link))
        if added:
            if space is not Space.PRIVATE:
                self._memo.add(digest, status)
            self._count(added_blobs=1, added_bytes=digest.size_bytes)
        else:
            self._count(present_blobs=1)
        return added

    def _link(
        self, section: Section, space: Space, digest: Digest, size: int, link: Callable[[str], None]
    ) -> bool:
        target = self._layout.entry(space, check_hash(digest.hash))
        name = self._context.name(space, digest.hash)
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(target, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                touch(target, status, self._now_ns())
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

    def _name(self, digest: Digest) -> str:
        return self._context.name(SPACE_OF[digest.function], digest.hash)

    # Private files: named by whoever adds them, not by a hash of their bytes

    def put_private(self, digest: Digest, path: str, *, link: bool) -> bool:
        return self.put_file(digest, path, move=False, link=link, verify=False, space=Space.PRIVATE)

    def find_private(self, digests: Iterable[Digest]) -> set[Digest]:
        if not self._has_private_files():
            return set()
        return {digest for digest in digests if self._is_private(digest, use=False)}

    def path(self, digest: Digest) -> str:
        """Return where a blob or private file is, if it is here at all."""
        path = self._layout.blob(digest)
        return path if os.path.lexists(path) else self._layout.private(digest)

    def _has_private_files(self) -> bool:
        return os.path.isdir(f"{self._layout.group_path()}/{Space.PRIVATE.folder}")

    def _is_private(self, digest: Digest, *, use: bool) -> bool:
        try:
            fd = self._open_private(digest, use=use)
        except NotFound:
            return False
        os.close(fd)
        return True

    def _open_private(self, digest: Digest, *, use: bool = True) -> int:
        """Open a private file. Nothing but its name, its size and its date vouches for its bytes.

        So NotFound where a power failure may have damaged it, and it is removed.
        """
        fd, status = self._context.open_entry(self._layout.private(digest), f"blob {digest}")
        is_damaged = bool(self._durability.windows) and self._durability.is_suspect(status)
        if not is_damaged and status.st_size == digest.size_bytes:
            if use:
                touch(fd, status, self._now_ns())
            return fd
        os.close(fd)
        if is_damaged:
            self._context.remove_entry(Space.PRIVATE, digest.hash, status.st_ino)
            raise NotFound(f"private file {digest} may be damaged by a power failure and was removed")
        raise NotFound(f"private file {digest} has {status.st_size} bytes in the file cache")

    # Taking away, and putting elsewhere

    def remove(self, digest: Digest) -> bool:
        with translate_os_errors(f"cannot remove blob {digest}"):
            was_blob = self._context.remove_entry(SPACE_OF[digest.function], check_hash(digest.hash))
            return self._context.remove_entry(Space.PRIVATE, digest.hash) or was_blob

    def materialize(self, digest: Digest, destination: str, *, writable: bool, mode: int | None) -> None:
        what = f"cannot put blob {digest} at {destination!r}"
        with closing_fd(self.open(digest)) as fd, translate_os_errors(what):
            try:
                if mode is None:
                    mode = WRITABLE_MODE if writable else self.mode
                # A link shows the mode of the blob, which the cache and other links share.
                if writable or mode != self.mode or not self._link_out(digest, fd, destination):
                    _copy_out(fd, digest.size_bytes, destination, mode)
            except FileExistsError:
                raise FailedPrecondition(
                    f"{destination!r} exists and is not overwritten: remove it or choose another place"
                ) from None

    def _link_out(self, digest: Digest, fd: int, destination: str) -> bool:
        """Link the verified file to its destination; return False when only a copy will do."""
        try:
            os.link(self.path(digest), destination)
            if os.stat(destination, follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
                return True
            # Evicted and added again: this file is another one, which was not verified.
            os.unlink(destination)
        except OSError as error:
            # Evicted between opening and linking, or on another file system, or linked too often already.
            if error.errno not in {*_NO_LINK, errno.ENOENT}:
                raise
        return False


class BlobWriter:
    """A writer of one blob, which adds it when all its bytes came, in order. For one thread.

    A context manager; leaving it without `commit` drops what was written, and so does a write that fails.
    What calls off the call that made it calls off its methods too.
    """

    def __init__(self, blobs: BlobSpace, digest: Digest, *, verify: bool = True) -> None:
        blobs.check_fits(digest.size_bytes)
        cancellation = current().cancellation
        self._default_context = None if cancellation is None else CallContext(cancellation=cancellation)
        self._blobs = blobs
        self._digest = digest
        self._hasher = digest.function.hasher() if verify else None
        self._size = 0
        with translate_os_errors(f"cannot write blob {digest}"):
            self._staged = blobs.stage(digest)

    @in_context
    def write(self, data: Buffer, *, context: CallContext | None = None) -> None:
        """Append bytes. DataLoss when they are more than the digest says."""
        self._check_open()
        view = memoryview(data).cast("B")
        with ExitStack() as undo:
            # A part of the bytes is worth nothing.
            undo.callback(self.close)
            if self._size + len(view) > self._digest.size_bytes:
                raise DataLoss(f"blob {self._digest}: more bytes came than its digest says")
            with translate_os_errors(f"cannot write blob {self._digest}"):
                for piece in files.pieces(view):
                    if self._hasher is not None:
                        self._hasher.update(piece)
                    files.write_all(self._staged.fd, piece)
            undo.pop_all()
        self._size += len(view)

    @in_context
    def commit(self, *, context: CallContext | None = None) -> bool:
        """Add the blob; return False when it was here. DataLoss when the bytes do not have the digest."""
        self._check_open()
        if self._size != self._digest.size_bytes:
            raise DataLoss(f"blob {self._digest}: only {self._size} bytes came")
        if self._hasher is not None and (found := self._hasher.hexdigest()) != self._digest.hash:
            raise DataLoss(f"blob {self._digest}: the bytes that came have the hash {found}")
        with translate_os_errors(f"cannot add blob {self._digest}"):
            added = self._blobs.publish_written(self._digest, self._staged, look=True)
        self.close()
        return added

    def close(self) -> None:
        """Drop what was written, unless it was committed. Again is fine."""
        self._staged.close()

    def _check_open(self) -> None:
        if self._staged.fd < 0:
            raise FailedPrecondition(f"the writer of blob {self._digest} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy_out(source: int, size: int, destination: str, mode: int) -> None:
    """Copy to a new file that gets its name in one step when it is whole, and never before."""
    folder, name = os.path.split(destination)
    folder = folder or "."
    with files.NamelessFile(folder, lambda: f"{folder}/.{name[:100]}.{secrets.token_hex(8)}") as copy:
        files.copy_content(source, copy.fd, size)
        os.fchmod(copy.fd, mode)
        copy.link(destination)


def _array_of(digests: Iterable[Digest], function: DigestFunction) -> DigestArray:
    """Return those digests that are of this function."""
    rest = (one for one in digests if one.function is function)
    parts = []
    while some := list(islice(rest, BULK_DIGESTS)):
        current().check()
        parts.append(DigestArray.of(some, function))
    return DigestArray(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        function,
    )


def _is_empty_blob(digest: Digest) -> bool:
    return digest.size_bytes == 0 and digest.hash == digest.function.hash(b"")
