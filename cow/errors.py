"""Errors of this package.

    COWError
    ├── OutOfBounds        a range is not inside the store (also a ValueError); nothing was touched
    ├── StoreClosed        the store, or the checkpoint, is closed (also a ValueError, as for files)
    ├── StoreInUse         the data folder belongs to another store, or holds files of one
    ├── TruncatedFile      a file is shorter than the chunk it should hold
    └── CheckpointConflict another checkpoint is open, or this one has ended

Errors of the operating system (a full disk, a lost file) stay OSErrors, and what a chunk source
raises reaches the reader unchanged. Arguments of a wrong type are TypeErrors.
"""

from __future__ import annotations


class COWError(Exception):
    """Base of the errors that this package raises on purpose."""


class OutOfBounds(COWError, ValueError):
    """A range or an index is not inside the store. Nothing was read or written."""


class StoreClosed(COWError, ValueError):
    """The store was closed."""


class StoreInUse(COWError):
    """The data folder is another store's, or holds files that an earlier store left there."""


class TruncatedFile(COWError):
    """A file is shorter than what the store must read from it."""


class CheckpointConflict(COWError):
    """A store has at most one open checkpoint, and an ended checkpoint cannot be used."""
