"""A big file as copy-on-write chunks, read lazily from wherever they are.

    with COWStore("/scratch/vm1", size=image_size, chunks=present, source=my_source) as store:
        store.read_at(0, 4096)                      # opens one chunk
        store.write_at(1 << 20, b"...")             # copies one chunk
        with store.checkpoint() as checkpoint:      # a moment to save, while writes go on
            for index in checkpoint.chunks: ...

Chunks come through the `ChunkSource` protocol. Needs numpy and Linux; knows nothing of networks, digests
or snapshots.

Its modules, from the outside in:

    store                       COWStore, and a store as a Python file
    reader, writer              the two halves of the work on chunks
    checkpoint, export          a moment to save; whole files in and out
    readahead                   what to ask a source for before it is read
    state                       what these share: locks and their order, private files
    chunks                      where chunks lie, the state of each, statistics
    mapping                     mapped memory and open files, and their budget
    sync                        gate, locks of chunks, single flight
    fileio                      holes and zeros, whole reads and writes, copies, replacing a file
    source, errors              the protocol to implement; what may be raised
"""

from cow.checkpoint import Checkpoint
from cow.chunks import (
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    PAGE_SIZE,
    OriginStatistics,
    StoreStatistics,
)
from cow.errors import CheckpointConflict, COWError, OutOfBounds, StoreClosed, StoreInUse, TruncatedFile
from cow.fileio import clone_range, data_extents, is_zero, read_all, write_all, write_nonzero
from cow.mapping import MappingBudget, default_budget
from cow.readahead import DEFAULT_READAHEAD, ReadaheadOptions
from cow.source import ChunkSource, OpenedChunk
from cow.store import COWStore

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
