"""Errors of this package, all below `COWError`.

Errors of the operating system (a full disk, a lost file) stay OSErrors, and what a chunk source
raises reaches the reader unchanged. Arguments of a wrong type are TypeErrors.
"""

from __future__ import annotations


class COWError(Exception):
    """Base of the errors that this package raises on purpose."""


class OutOfBounds(COWError, ValueError):
    """A range or an index is not inside the store. Nothing was read or written."""


class StoreClosed(COWError, ValueError):
    """The store was closed. Also a ValueError, as for files."""


class StoreInUse(COWError):
    """The data folder is another store's, or holds files that an earlier store left there."""


class TruncatedFile(COWError):
    """A file is shorter than what the store must read from it."""


class CheckpointConflict(COWError):
    """A store has at most one open checkpoint, and an ended checkpoint cannot be used."""
