"""The loader: from a task to its machine's state, and back. `SnapshotLoader` is the way in."""

from snaploader.loader.delete import DeleteResult
from snaploader.loader.derive import DeriveResult
from snaploader.loader.directory import DEFAULT_CHUNK_THRESHOLD_BYTES, DirectorySource
from snaploader.loader.loader import SnapshotLoader
from snaploader.loader.restore import RestoreResult
from snaploader.loader.results import (
    KeyFailure,
    ManifestSource,
    Progress,
    ProgressCallback,
    SavedDirectory,
    SavedFile,
    SaveResult,
    Snapshot,
)
from snaploader.loader.unpack import UnpackedSnapshot

__all__ = [
    "DEFAULT_CHUNK_THRESHOLD_BYTES",
    "DeleteResult",
    "DeriveResult",
    "DirectorySource",
    "KeyFailure",
    "ManifestSource",
    "Progress",
    "ProgressCallback",
    "RestoreResult",
    "SaveResult",
    "SavedDirectory",
    "SavedFile",
    "Snapshot",
    "SnapshotLoader",
    "UnpackedSnapshot",
]
