"""A Remote Execution API server as a blob store and an action cache.

From the top down, each module about one thing:

    cache            RemoteCache, the public face
    transfer, bulk   which way each blob goes; many at once, within bounds
    session          one process's connection; where the stack is put together
    cas, stream_read, stream_write, action_cache   the services
    client           what they share: `retry`, `transport`, what was negotiated (`capabilities`)
    transport        single calls on a `channel`, watched by a `watchdog`, errors by way of `status`
    batching, names, encoding, wire, compression, content   pure parts
    config, endpoint, metadata, credentials   what the user sets
"""

from snaploader.remote.cache import RemoteCache
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.config import Limits, RetryEvent, RetryPolicy, Timeouts, TLSConfig
from snaploader.remote.malloc import tune_malloc
from snaploader.remote.metadata import RequestMetadata
from snaploader.remote.statistics import RemoteStatistics

__all__ = [
    "Limits",
    "RemoteCache",
    "RemoteCapabilities",
    "RemoteStatistics",
    "RequestMetadata",
    "RetryEvent",
    "RetryPolicy",
    "TLSConfig",
    "Timeouts",
    "tune_malloc",
]
