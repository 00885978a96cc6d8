from snaploader._proto.snaploader_pb2 import VMConfiguration as VMConfiguration, VMMetadata as VMMetadata
from snaploader._version import __version__ as __version__
from snaploader.blobstore import (
    BlobStore as BlobStore,
    RemoteStore as RemoteStore,
    TieredStore as TieredStore,
    TransferStatistics as TransferStatistics,
    Upload as Upload,
)
from snaploader.context import (
    CallContext as CallContext,
    Cancellation as Cancellation,
    Credentials as Credentials,
    RequestMetadata as RequestMetadata,
)
from snaploader.digest import Digest as Digest, DigestFunction as DigestFunction
from snaploader.errors import (
    Cancelled as Cancelled,
    DataLoss as DataLoss,
    DeadlineExceeded as DeadlineExceeded,
    FailedPrecondition as FailedPrecondition,
    Internal as Internal,
    InvalidArgument as InvalidArgument,
    NotFound as NotFound,
    PermissionDenied as PermissionDenied,
    ResourceExhausted as ResourceExhausted,
    SnaploaderError as SnaploaderError,
    Unauthenticated as Unauthenticated,
    Unavailable as Unavailable,
    Unimplemented as Unimplemented,
)
from snaploader.filecache import FileCache as FileCache
from snaploader.formats.chunktable import ChunkTable as ChunkTable
from snaploader.formats.dirtree import DirectoryTree as DirectoryTree
from snaploader.formats.manifest import Manifest as Manifest, PlainFile as PlainFile
from snaploader.keys import (
    SnapshotKey as SnapshotKey,
    SnapshotKeySet as SnapshotKeySet,
    SnapshotTask as SnapshotTask,
)
from snaploader.loader import (
    DeleteResult as DeleteResult,
    DeriveResult as DeriveResult,
    DirectorySource as DirectorySource,
    Explanation as Explanation,
    KeyExplanation as KeyExplanation,
    KeyFailure as KeyFailure,
    ManifestExplanation as ManifestExplanation,
    ManifestSource as ManifestSource,
    PassedOver as PassedOver,
    Progress as Progress,
    RestoreResult as RestoreResult,
    SavedDirectory as SavedDirectory,
    SavedFile as SavedFile,
    SaveResult as SaveResult,
    Snapshot as Snapshot,
    SnapshotIdTaken as SnapshotIdTaken,
    SnapshotLoader as SnapshotLoader,
    SnapshotMetadata as SnapshotMetadata,
    SnapshotReader as SnapshotReader,
    UnpackedSnapshot as UnpackedSnapshot,
)
from snaploader.metrics import PrometheusMetrics as PrometheusMetrics
from snaploader.policy import (
    PolicyOverrides as PolicyOverrides,
    ReadPolicy as ReadPolicy,
    ReadSources as ReadSources,
    SavePolicy as SavePolicy,
)
from snaploader.protocols import (
    BlobWriterProtocol as BlobWriterProtocol,
    FileCacheProtocol as FileCacheProtocol,
    LeaseProtocol as LeaseProtocol,
    Loader as Loader,
)
from snaploader.remote import (
    BearerToken as BearerToken,
    RemoteCache as RemoteCache,
    RetryPolicy as RetryPolicy,
    Timeouts as Timeouts,
    TLSConfig as TLSConfig,
)
from snaploader.telemetry import (
    Observer as Observer,
    Observers as Observers,
    Operation as Operation,
)
from snaploader.tracing import OpenTelemetryTraces as OpenTelemetryTraces
