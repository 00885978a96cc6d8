"""Brings a machine's state back in milliseconds: lazy copy-on-write snapshots over the Remote Execution API.

    with FileCache("/var/cache/snaploader") as file_cache, SnapshotLoader(file_cache) as loader:
        keys = loader.snapshot_key_set(task, configuration_hash)
        with loader.unpack_snapshot(loader.get_snapshot(keys), "/run/vm") as unpacked:
            unpacked.chunked_files["disk"].read_at(0, 4096)

See the README for a tour, `snaploader.errors` for what is raised, `snaploader.testing` for a server to
test against, and `cow` for the stores.
"""

import typing as _typing

from snaploader._proto.snaploader_pb2 import VMConfiguration, VMMetadata
from snaploader._version import __version__
from snaploader.blobstore import BlobStore, RemoteStore, TransferStatistics, Upload
from snaploader.chunktable import ChunkTable
from snaploader.digest import Digest, DigestFunction
from snaploader.dirtree import DirectoryTree
from snaploader.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SnaploaderError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from snaploader.filecache import FileCache
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader import (
    DeleteResult,
    DeriveResult,
    DirectorySource,
    KeyFailure,
    ManifestSource,
    Progress,
    RestoreResult,
    SavedDirectory,
    SavedFile,
    SaveResult,
    Snapshot,
    SnapshotLoader,
    UnpackedSnapshot,
)
from snaploader.manifest import Manifest, PlainFile
from snaploader.policy import PolicyOverrides, ReadPolicy, SavePolicy
from snaploader.task import SnapshotTask

if _typing.TYPE_CHECKING:
    from snaploader.remote import RemoteCache, RetryPolicy, Timeouts, TLSConfig

__all__ = [
    "BlobStore",
    "Cancelled",
    "ChunkTable",
    "DataLoss",
    "DeadlineExceeded",
    "DeleteResult",
    "DeriveResult",
    "Digest",
    "DigestFunction",
    "DirectorySource",
    "DirectoryTree",
    "FailedPrecondition",
    "FileCache",
    "Internal",
    "InvalidArgument",
    "KeyFailure",
    "Manifest",
    "ManifestSource",
    "NotFound",
    "PermissionDenied",
    "PlainFile",
    "PolicyOverrides",
    "Progress",
    "ReadPolicy",
    "RemoteCache",
    "RemoteStore",
    "ResourceExhausted",
    "RestoreResult",
    "RetryPolicy",
    "SavePolicy",
    "SaveResult",
    "SavedDirectory",
    "SavedFile",
    "SnaploaderError",
    "Snapshot",
    "SnapshotKey",
    "SnapshotKeySet",
    "SnapshotLoader",
    "SnapshotTask",
    "TLSConfig",
    "Timeouts",
    "TransferStatistics",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnpackedSnapshot",
    "Upload",
    "VMConfiguration",
    "VMMetadata",
    "__version__",
]


def __getattr__(name: str) -> _typing.Any:
    # With what is remote comes gRPC, which costs a tenth of a second and reads its environment when it is
    # imported: not before somebody asks for it.
    if name not in {"RemoteCache", "RetryPolicy", "TLSConfig", "Timeouts"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from snaploader import remote as _remote

    return getattr(_remote, name)


def __dir__() -> list[str]:
    return __all__
