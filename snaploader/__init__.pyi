from snaploader._proto.snaploader_pb2 import (
    VMConfiguration as VMConfiguration,
)
from snaploader._proto.snaploader_pb2 import (
    VMMetadata as VMMetadata,
)
from snaploader._version import __version__ as __version__
from snaploader.blobstore import (
    BlobStore as BlobStore,
)
from snaploader.blobstore import (
    RemoteStore as RemoteStore,
)
from snaploader.blobstore import (
    TieredStore as TieredStore,
)
from snaploader.blobstore import (
    TransferStatistics as TransferStatistics,
)
from snaploader.blobstore import (
    Upload as Upload,
)
from snaploader.digest import (
    Digest as Digest,
)
from snaploader.digest import (
    DigestFunction as DigestFunction,
)
from snaploader.errors import (
    Cancelled as Cancelled,
)
from snaploader.errors import (
    DataLoss as DataLoss,
)
from snaploader.errors import (
    DeadlineExceeded as DeadlineExceeded,
)
from snaploader.errors import (
    FailedPrecondition as FailedPrecondition,
)
from snaploader.errors import (
    Internal as Internal,
)
from snaploader.errors import (
    InvalidArgument as InvalidArgument,
)
from snaploader.errors import (
    NotFound as NotFound,
)
from snaploader.errors import (
    PermissionDenied as PermissionDenied,
)
from snaploader.errors import (
    ResourceExhausted as ResourceExhausted,
)
from snaploader.errors import (
    SnaploaderError as SnaploaderError,
)
from snaploader.errors import (
    Unauthenticated as Unauthenticated,
)
from snaploader.errors import (
    Unavailable as Unavailable,
)
from snaploader.errors import (
    Unimplemented as Unimplemented,
)
from snaploader.filecache import FileCache as FileCache
from snaploader.formats.chunktable import ChunkTable as ChunkTable
from snaploader.formats.dirtree import DirectoryTree as DirectoryTree
from snaploader.formats.manifest import (
    Manifest as Manifest,
)
from snaploader.formats.manifest import (
    PlainFile as PlainFile,
)
from snaploader.keys import (
    SnapshotKey as SnapshotKey,
)
from snaploader.keys import (
    SnapshotKeySet as SnapshotKeySet,
)
from snaploader.loader import (
    DeleteResult as DeleteResult,
)
from snaploader.loader import (
    DeriveResult as DeriveResult,
)
from snaploader.loader import (
    DirectorySource as DirectorySource,
)
from snaploader.loader import (
    KeyFailure as KeyFailure,
)
from snaploader.loader import (
    ManifestSource as ManifestSource,
)
from snaploader.loader import (
    Progress as Progress,
)
from snaploader.loader import (
    RestoreResult as RestoreResult,
)
from snaploader.loader import (
    SavedDirectory as SavedDirectory,
)
from snaploader.loader import (
    SavedFile as SavedFile,
)
from snaploader.loader import (
    SaveResult as SaveResult,
)
from snaploader.loader import (
    Snapshot as Snapshot,
)
from snaploader.loader import (
    SnapshotLoader as SnapshotLoader,
)
from snaploader.loader import (
    UnpackedSnapshot as UnpackedSnapshot,
)
from snaploader.policy import (
    PolicyOverrides as PolicyOverrides,
)
from snaploader.policy import (
    ReadPolicy as ReadPolicy,
)
from snaploader.policy import (
    SavePolicy as SavePolicy,
)
from snaploader.remote import (
    RemoteCache as RemoteCache,
)
from snaploader.remote import (
    RetryPolicy as RetryPolicy,
)
from snaploader.remote import (
    Timeouts as Timeouts,
)
from snaploader.remote import (
    TLSConfig as TLSConfig,
)
from snaploader.task import SnapshotTask as SnapshotTask
