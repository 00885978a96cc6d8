"""The file cache: blobs and refs in a folder of this host, shared by its processes.

    from snaploader.filecache import FileCache

    with FileCache("/var/cache/snaploader", max_bytes=50 << 30) as cache:
        digest, added = cache.add_file("memory.img")
        cache.put_ref(key, digest.hash.encode())

The file system is the only truth; there is no database beside it that could disagree. What lies where, and in
which format, is in docs/formats/filecache.md. Promises:

- A blob is visible when it is whole and verified, and not before. It is hashed again at its first use in
  each process; wrong bytes are never served.
- A process killed at any step leaves whole entries or nothing visible. What it left in staging goes when
  the next cache opens the folder, because nobody holds its lock; age plays no part.
- What all entries take, in disk blocks, stays within `max_bytes`; the longest unused go first, over
  restarts and over all processes. What is leased or pinned stays. An open file and a link keep their bytes
  whatever happens.
- After a power failure, blobs that may not have reached the disk are verified before they count as
  present.

Where to look:

    cache       FileCache, which puts the parts together
    blobs       looking blobs up, opening them verified, adding them, putting them elsewhere
    refs        small mutable values
    retention   what eviction leaves alone: leases and pins
    usage       bytes in use, under the lock of all changes; statistics
    layout      where everything lies; an open cache's hold on it: staging, quarantine, sweeping
    evict       making room, in order of last use
    bulk        many entries at once: scans, listings, the log of uses
    durability  what a power failure may have damaged
"""

from snaploader.filecache.blobs import BlobWriter
from snaploader.filecache.cache import DEFAULT_MAX_BYTES, FileCache
from snaploader.filecache.retention import Lease, Pin
from snaploader.filecache.usage import CacheEntry, CacheStatistics, VerifyReport

__all__ = [
    "DEFAULT_MAX_BYTES",
    "BlobWriter",
    "CacheEntry",
    "CacheStatistics",
    "FileCache",
    "Lease",
    "Pin",
    "VerifyReport",
]
