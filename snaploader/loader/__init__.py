"""The loader: from a task to its machine's state, and back. `SnapshotLoader` is the way in.

- `loader`: `SnapshotLoader`, which puts the parts together
- `find`: the best snapshot of a key set that is whole
- `unpack`, `restore`, `place`: a snapshot as lazy stores, or written out in full; how files are written
- `save`, `capture`, `upload`: the order of a save; files and stores become blobs; blobs go to the server
- `directory`, `scan`, `captureindex`: a directory becomes a tree; what is in it; what the last save found
- `derive`, `delete`, `versions`: a snapshot out of another one; its end; what invalidates all of a kind
- `manifests`: the one owner of what stands under keys: manifests, tombstones, ids that are taken, pins
- `fetch`: one fetch per blob, from the nearest tier; what will likely be wanted soon
- `results`: what calls return, and what they tell while they run
"""

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
