from snaploader.testing.dispatch import Call as Call
from snaploader.testing.fake import FakeCAS as FakeCAS
from snaploader.testing.faults import (
    CallGate as CallGate,
    Fault as Fault,
    FaultScript as FaultScript,
    Firing as Firing,
    Link as Link,
)
from snaploader.testing.options import (
    PRESETS as PRESETS,
    ServerOptions as ServerOptions,
    ServerTLS as ServerTLS,
    like_bazel_remote as like_bazel_remote,
    like_buildbarn as like_buildbarn,
    like_buildgrid as like_buildgrid,
    like_casd as like_casd,
    like_nativelink as like_nativelink,
)
from snaploader.testing.server import EmbeddedServer as EmbeddedServer
from snaploader.testing.storage import DiskStorage as DiskStorage, MemoryStorage as MemoryStorage
