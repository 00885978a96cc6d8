"""A Remote Execution API server as a blob store and an action cache.

From the top down, each module about one thing:

    cache                 RemoteCache, the public face, and its connection, where the stack is put together
    cas, streams          blobs: found, in batches, many at once within bounds, and single big ones
    calls                 an operation's calls and attempts, its errors and counters; calling work off
    channel               opening a channel; watching what comes over it
    codec, capabilities   pure parts: how blobs look on the wire, what a server offers
    config, auth          what the user sets
"""

from snaploader.context import RequestMetadata
from snaploader.remote.auth import BearerToken
from snaploader.remote.cache import RemoteCache
from snaploader.remote.calls import RemoteStatistics
from snaploader.remote.capabilities import RemoteCapabilities
from snaploader.remote.channel import tune_malloc
from snaploader.remote.config import Limits, RetryEvent, RetryPolicy, Timeouts, TLSConfig

__all__ = [
    "BearerToken",
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
