"""The loader: from a task to its machine's state, and back. `SnapshotLoader` is the way in.

- `loader`: `SnapshotLoader`, which puts the parts together
- `find`: the best snapshot of a key set that is whole
- `explain`: why it is that one, or none
- `unpack`: a snapshot as lazy stores, or written out in full; how files are written
- `read`: files of a snapshot read in place
- `save`, `capture`: the order of a save, blobs go to the server; files and stores become blobs
- `directory`, `scan`: a directory becomes a tree; what is in it, and what the last save found
- `derive`, `versions`: a snapshot out of another one; what invalidates all of a kind
- `manifests`: the one owner of what stands under keys: manifests, tombstones, taken ids, pins; deleting
- `fetch`: one fetch per blob, from the nearest tier; what will likely be wanted soon
- `results`: what calls return, and what they tell while they run
"""

from snaploader.loader.directory import DEFAULT_CHUNK_THRESHOLD_BYTES, DirectorySource
from snaploader.loader.explain import Explanation, KeyExplanation, ManifestExplanation, Rule
from snaploader.loader.loader import SnapshotLoader
from snaploader.loader.read import SnapshotReader
from snaploader.loader.results import (
    DeleteResult,
    DeriveResult,
    KeyFailure,
    ManifestSource,
    PassedOver,
    Progress,
    ProgressCallback,
    RestoreResult,
    SavedDirectory,
    SavedFile,
    SaveResult,
    Snapshot,
    SnapshotIdTaken,
    SnapshotMetadata,
)
from snaploader.loader.unpack import UnpackedSnapshot

__all__ = [
    "DEFAULT_CHUNK_THRESHOLD_BYTES",
    "DeleteResult",
    "DeriveResult",
    "DirectorySource",
    "Explanation",
    "KeyExplanation",
    "KeyFailure",
    "ManifestExplanation",
    "ManifestSource",
    "PassedOver",
    "Progress",
    "ProgressCallback",
    "RestoreResult",
    "Rule",
    "SaveResult",
    "SavedDirectory",
    "SavedFile",
    "Snapshot",
    "SnapshotIdTaken",
    "SnapshotLoader",
    "SnapshotMetadata",
    "SnapshotReader",
    "UnpackedSnapshot",
]
