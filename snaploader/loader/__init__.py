"""The loader: from a task to its machine's state, and back. `SnapshotLoader` is the way in."""

from snaploader.loader.loader import SnapshotLoader
from snaploader.loader.progress import Progress, ProgressCallback
from snaploader.loader.restore import RestoreResult
from snaploader.loader.results import KeyFailure, ManifestSource, SavedFile, SaveResult, Snapshot
from snaploader.loader.unpack import UnpackedSnapshot

__all__ = [
    "KeyFailure",
    "ManifestSource",
    "Progress",
    "ProgressCallback",
    "RestoreResult",
    "SaveResult",
    "SavedFile",
    "Snapshot",
    "SnapshotLoader",
    "UnpackedSnapshot",
]
