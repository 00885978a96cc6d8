"""The file cache: blobs, refs and directories in a folder of this host, shared by its processes.

    from snaploader.filecache import FileCache

    with FileCache("/var/cache/snaploader", max_bytes=50 << 30) as cache:
        digest, added = cache.add_file("memory.img")
        cache.put_ref(key, digest.hash.encode())

The file system is the only truth; there is no database beside it that could disagree. The layout:

    <root>/v1/
      groups/<group>/blobs/<sha256|blake3>/<2 hex>/<62 hex>   immutable, mode 0400, named by hash
      groups/<group>/refs/<2 hex>/<62 hex>                    mutable, replaced in one step
      groups/<group>/trees/<2 hex>/<62 hex>/                  a tracked directory and its lock
      tmp/<token>/, tmp/<token>.lock                          staging files of an open cache
      groups/<group>/pins/<name>                              what is kept until it is unpinned
      leases/<token>.<number>                                 blobs that must not be evicted
      trash/                                                  removed directories, on their way out
      quarantine/                                             the last 16 files that had wrong bytes
      usage/                                                  the bytes in use, uses in bulk, locks
      state                                                   what a power failure may have damaged

The group "" is the folder `_default`. Promises:

- A blob is visible when it is whole and verified, and not before. It is hashed again at its first use in
  each process; wrong bytes are never served.
- A process killed at any step leaves whole entries or nothing visible. What it left in staging goes when
  the next cache opens the folder, because nobody holds its lock; age plays no part.
- What all entries take, in disk blocks, stays within `max_bytes`; the longest unused go first, over
  restarts and over all processes. What is leased or pinned stays. An open file and a link keep their bytes
  whatever happens.
- After a power failure, blobs that may not have reached the disk are verified before they count as
  present.

Each module explains its part: `layout`, `session` (life and staging), `ledger` (bytes in use), `blobs`,
`exchange` (files in and out), `refs`, `directories`, `evict`, `candidates`, `scan`, `recency`, `leases`,
`pins`, `pinfile`, `pintable`, `protection`, `listing`, `durability`.
"""

from snaploader.filecache.cache import DEFAULT_MAX_BYTES, FileCache
from snaploader.filecache.directories import DirectoryHandle
from snaploader.filecache.leases import Lease
from snaploader.filecache.pinfile import Pin
from snaploader.filecache.statistics import CacheEntry, CacheStatistics, VerifyReport
from snaploader.filecache.writer import BlobWriter

__all__ = [
    "DEFAULT_MAX_BYTES",
    "BlobWriter",
    "CacheEntry",
    "CacheStatistics",
    "DirectoryHandle",
    "FileCache",
    "Lease",
    "Pin",
    "VerifyReport",
]
