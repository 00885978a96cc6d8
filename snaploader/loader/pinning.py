"""Pinning what is about to be published, and taking that back when it was not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from snaploader.digest import Digest
from snaploader.errors import NotFound, SnaploaderError
from snaploader.filecache import FileCache, Pin


def pin_before(file_cache: FileCache, name: str | None) -> Pin | None:
    """What stands under the name of a pin that is to be made. Errors as `FileCache.pinned`."""
    if name is not None:
        with contextlib.suppress(NotFound):
            return file_cache.pinned(name)
    return None


@contextlib.contextmanager
def pinned(
    file_cache: FileCache,
    name: str | None,
    before: Pin | None,
    digests: Iterable[Digest],
    refs: Iterable[str],
) -> Iterator[None]:
    """Pin a snapshot before it is there to be evicted. If that or the block fails, what was pinned is again.

    Where that cannot be done, a note of the error says so.

    Args:
        name: None pins nothing.
        before: What stood under the name.
    """
    if name is None:
        yield
        return
    try:
        # Also when this fails the new pin may stand, not flushed to disk.
        file_cache.pin(name, digests, refs=refs)
        yield
    except BaseException as error:
        try:
            if before is None:
                file_cache.unpin(name)
            else:
                _pin_again(file_cache, before)
        except SnaploaderError as failure:
            error.add_note(f"what was pinned as {name!r} before may not be so any more: {failure.message}")
        raise


def _pin_again(file_cache: FileCache, pin: Pin) -> None:
    """Put a pin back as it was."""
    known = pin.sizes_bytes >= 0
    digests = [
        # A pin does not keep the function, nor does it matter to one.
        Digest(row.tobytes().hex(), size)
        for row, size in zip(pin.hashes[known], pin.sizes_bytes[known].tolist(), strict=True)
    ]
    file_cache.pin(pin.name, digests, hashes=[pin.hashes[~known]], refs=pin.refs)
