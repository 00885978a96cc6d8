"""A big file as copy-on-write chunks, read lazily from wherever they are.

    with COWStore("/scratch/vm1", size=image_size, chunks=present, source=my_source) as store:
        store.read_at(0, 4096)                      # opens one chunk
        store.write_at(1 << 20, b"...")             # copies one chunk
        with store.checkpoint() as checkpoint:      # a moment to save, while writes go on
            for index in checkpoint.chunks: ...

Chunks come through the `ChunkSource` protocol. Needs numpy and Linux; knows nothing of networks, digests
or snapshots.

Its modules, from the outside in:

    store               COWStore, a moment of it to save, and it as a file of Python
    reader, writer      the two halves of the work on chunks; readahead; whole files in and out
    chunks              what these share: where chunks lie and come from, the state of each, lock order
    mapping             mapped memory and open files, and their budget
    sync                gate, locks of chunks, single flight
    fileio              holes and zeros, whole reads and writes, copies, replacing a file, private files
    errors              what may be raised
"""

from cow.chunks import (
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    ChunkSource,
    OpenedChunk,
    OriginStatistics,
    StoreStatistics,
)
from cow.errors import CheckpointConflict, COWError, OutOfBounds, StoreClosed, StoreInUse, TruncatedFile
from cow.fileio import (
    PAGE_SIZE,
    chunk_extents,
    clone_range,
    copy_sparse,
    data_extents,
    is_zero,
    read_all,
    write_all,
    write_nonzero,
)
from cow.mapping import MappingBudget, default_budget, new_bytes
from cow.reader import DEFAULT_READAHEAD, ReadaheadOptions, ReadaheadPlanner
from cow.store import Checkpoint, COWStore
from cow.sync import Flight, SingleFlight

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
    "Flight",
    "MappingBudget",
    "OpenedChunk",
    "OriginStatistics",
    "OutOfBounds",
    "ReadaheadOptions",
    "ReadaheadPlanner",
    "SingleFlight",
    "StoreClosed",
    "StoreInUse",
    "StoreStatistics",
    "TruncatedFile",
    "chunk_extents",
    "clone_range",
    "copy_sparse",
    "data_extents",
    "default_budget",
    "is_zero",
    "new_bytes",
    "read_all",
    "write_all",
    "write_nonzero",
]
