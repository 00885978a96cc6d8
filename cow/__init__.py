"""A big file as copy-on-write chunks, read lazily from wherever they are.

    with COWStore("/scratch/vm1", size=image_size, chunks=present, source=my_source) as store:
        store.read_at(0, 4096)                      # opens one chunk
        store.write_at(1 << 20, b"...")             # copies one chunk
        with store.checkpoint() as checkpoint:      # a moment to save, while writes go on
            for index in checkpoint.chunks: ...

Chunks come through the `ChunkSource` protocol. Needs numpy and Linux; knows nothing of networks, digests
or snapshots.
"""

from cow.budget import MappingBudget, default_budget
from cow.checkpoint import Checkpoint
from cow.errors import CheckpointConflict, COWError, OutOfBounds, StoreClosed, StoreInUse, TruncatedFile
from cow.geometry import DEFAULT_CHUNK_SIZE, MAX_CHUNK_SIZE, PAGE_SIZE
from cow.readahead import DEFAULT_READAHEAD, ReadaheadOptions
from cow.source import ChunkSource, OpenedChunk
from cow.sparse import clone_range, data_extents, read_all, write_all, write_nonzero
from cow.statistics import OriginStatistics, StoreStatistics
from cow.store import COWStore
from cow.zero import is_zero

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "DEFAULT_READAHEAD",
    "MAX_CHUNK_SIZE",
    "PAGE_SIZE",
    "COWError",
    "COWStore",
    "Checkpoint",
    "CheckpointConflict",
    "ChunkSource",
    "MappingBudget",
    "OpenedChunk",
    "OriginStatistics",
    "OutOfBounds",
    "ReadaheadOptions",
    "StoreClosed",
    "StoreInUse",
    "StoreStatistics",
    "TruncatedFile",
    "clone_range",
    "data_extents",
    "default_budget",
    "is_zero",
    "read_all",
    "write_all",
    "write_nonzero",
]
