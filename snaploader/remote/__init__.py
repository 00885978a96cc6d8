"""A Remote Execution API server as a blob store and an action cache.

From the top down, each module about one thing:

    cache                        RemoteCache, the public face: which way each blob goes
    connection                   one process's connection; where the stack is put together
    cas, streams, action_cache   the services: batches of blobs, single big ones, action results
    bulk                         which blobs travel together; many transfers at once, within bounds
    calls                        calls on a `channel`, watched and counted; errors by way of `status`
    retry                        what is tried again, and when; calling work off
    codec, capabilities          pure parts: how blobs look on the wire, what a server offers
    config, auth, statistics     what the user sets and sees
"""

from snaploader.remote.auth import RequestMetadata
from snaploader.remote.cache import RemoteCache
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.channel import tune_malloc
from snaploader.remote.config import Limits, RetryEvent, RetryPolicy, Timeouts, TLSConfig
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
