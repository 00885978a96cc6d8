"""The chunks of one file: which of them hold data, and the digest of each.

A file of 100 GiB has 200,000 chunks, so a table is two numpy arrays, 40 bytes per stored chunk, and
Python objects are made for single chunks only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import numpy.typing as npt

from snaploader.digest import HASH_BYTES, MAX_BLOB_BYTES, Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.formats.digests import DigestArray

Indices: TypeAlias = "npt.NDArray[np.int64]"
Hashes: TypeAlias = "npt.NDArray[np.uint8]"

MIN_CHUNK_SIZE = 4 << 10
MAX_CHUNK_SIZE = 64 << 20

MAX_CHUNKS = 1 << 24
"""Most chunks of a file, holes included: 8 TiB in chunks of 512 KiB."""

MAX_STORED_CHUNKS = 1 << 20
"""Most chunks of a file that hold data: 512 GiB in chunks of 512 KiB."""


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChunkTable:
    """The size of a file, its chunk size, and the hash of every chunk that is no hole. Immutable.

    A chunk has an *index*, its offset divided by the chunk size. A chunk that holds data also has a
    *row*, its place among the stored ones. All other chunks are holes and read as zeros.

    Args:
        size: Of the file, in bytes.
        chunk_size: In bytes: a power of two of 4 KiB to 64 MiB. The last chunk may be shorter.
        function: Behind all hashes.
        indices: Of the stored chunks, strictly ascending; int64.
        hashes: One row of 32 bytes for each of `indices`; uint8. Both arrays are made read-only, and
            copied only if they are of another type or not contiguous: do not keep views that can write.

    Raises:
        InvalidArgument: Any of this does not hold, or a limit (`MAX_CHUNKS`, …) is exceeded.
    """

    size: int
    chunk_size: int
    function: DigestFunction
    indices: Indices
    hashes: Hashes

    def __post_init__(self) -> None:
        check_geometry(self.size, self.chunk_size)
        indices = np.ascontiguousarray(self.indices, dtype=np.int64)
        hashes = np.ascontiguousarray(self.hashes, dtype=np.uint8)
        if indices.ndim != 1 or hashes.shape != (len(indices), HASH_BYTES):
            raise InvalidArgument(
                f"a chunk table needs n indices and n hashes of {HASH_BYTES} bytes, "
                f"not arrays of shape {indices.shape} and {hashes.shape}"
            )
        if len(indices) > MAX_STORED_CHUNKS:
            raise InvalidArgument(
                f"{len(indices)} chunks with data are more than the {MAX_STORED_CHUNKS} a file may have: "
                "use larger chunks"
            )
        if len(indices):
            if indices[0] < 0 or indices[-1] >= self.chunk_count:
                raise InvalidArgument(
                    f"chunks {indices[0]} to {indices[-1]} lie outside a file of {self.chunk_count} chunks"
                )
            if not (indices[1:] > indices[:-1]).all():
                raise InvalidArgument("the indices of a chunk table must be strictly ascending")
        indices.flags.writeable = False
        hashes.flags.writeable = False
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "hashes", hashes)

    @classmethod
    def empty(cls, size: int, chunk_size: int, function: DigestFunction) -> ChunkTable:
        """The table of a file that is one hole."""
        return cls(size, chunk_size, function, np.empty(0, np.int64), np.empty((0, HASH_BYTES), np.uint8))

    @property
    def chunk_count(self) -> int:
        """Chunks of the file, holes included."""
        return -(-self.size // self.chunk_size)

    @property
    def stored_count(self) -> int:
        """Chunks that hold data, which is the number of rows."""
        return len(self.indices)

    @property
    def stored_bytes(self) -> int:
        """Bytes in chunks that hold data."""
        stored = len(self.indices) * self.chunk_size
        if len(self.indices) and self.indices[-1] == self.chunk_count - 1:
            stored -= self.chunk_count * self.chunk_size - self.size
        return stored

    @property
    def hole_bytes(self) -> int:
        """Bytes of the file in holes."""
        return self.size - self.stored_bytes

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """For every chunk of the file, whether it holds data. A new array at every call."""
        mask = np.zeros(self.chunk_count, np.bool_)
        mask[self.indices] = True
        return mask

    def chunk_length(self, index: int) -> int:
        """Bytes of chunk `index`: the chunk size, or less for the last one. IndexError outside the file."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(f"chunk {index} lies outside a file of {self.chunk_count} chunks")
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def row_of(self, index: int) -> int | None:
        """The row of chunk `index`, or None when it is a hole. IndexError outside the file."""
        if not 0 <= index < self.chunk_count:
            raise IndexError(f"chunk {index} lies outside a file of {self.chunk_count} chunks")
        row = int(self.indices.searchsorted(index))
        return row if row < len(self.indices) and self.indices[row] == index else None

    def digest(self, row: int) -> Digest:
        """The digest in `row`, one of range(table.stored_count)."""
        hash_ = self.hashes[row].tobytes().hex()
        return Digest(hash_, self.chunk_length(int(self.indices[row])), self.function)

    def get(self, index: int) -> Digest | None:
        """The digest of chunk `index`, or None when it is a hole. IndexError outside the file."""
        row = self.row_of(index)
        return None if row is None else self.digest(row)

    def digests(self) -> Iterator[Digest]:
        """The digest of every row, in order, made as they are asked for; equal chunks repeat."""
        return iter(self.digest_array())

    def digest_array(self) -> DigestArray:
        """The digest of every row, in order, without an object for each."""
        sizes = np.full(len(self.indices), self.chunk_size, np.int64)
        if len(sizes):
            sizes[-1] = self.chunk_length(int(self.indices[-1]))
        return DigestArray(self.hashes, sizes, self.function)

    def merge(
        self,
        indices: npt.ArrayLike,
        hashes: npt.ArrayLike,
        holes: npt.ArrayLike = (),
        *,
        size: int | None = None,
    ) -> ChunkTable:
        """A new table in which some chunks have other content. All work is done on whole arrays.

        Args:
            indices: Chunks with new data, in any order, none twice.
            hashes: Their hashes, in the same order.
            holes: Chunks that are holes now, none of them in `indices`.
            size: Of the file, when it has grown; it cannot have shrunk. If it ended in a short chunk
                with data, that chunk is longer now and must be among the changes.

        Raises:
            InvalidArgument: Any of this does not hold.
        """
        new = np.asarray(indices, dtype=np.int64).reshape(-1)
        new_hashes = np.asarray(hashes, dtype=np.uint8).reshape(-1, HASH_BYTES)
        gone = np.asarray(holes, dtype=np.int64).reshape(-1)
        size = self.size if size is None else size
        if len(new) != len(new_hashes):
            raise InvalidArgument(f"{len(new)} chunks were given with {len(new_hashes)} hashes")
        changed = np.concatenate((new, gone))
        # np.unique would import numpy.ma first, which takes some 15 ms.
        ordered = np.sort(changed)
        if (ordered[1:] == ordered[:-1]).any():
            raise InvalidArgument("a chunk is among the changes of a table twice")
        self._check_growth(size, changed)
        if len(gone) and not 0 <= gone.min() <= gone.max() < -(-size // self.chunk_size):
            raise InvalidArgument(f"a hole lies outside a file of {size} bytes")
        kept = ~np.isin(self.indices, changed)
        merged = np.concatenate((self.indices[kept], new))
        order = merged.argsort(kind="stable")
        merged_hashes = np.concatenate((self.hashes[kept], new_hashes))
        return ChunkTable(size, self.chunk_size, self.function, merged[order], merged_hashes[order])

    def replace(self, changes: Mapping[int, bytes | None], *, size: int | None = None) -> ChunkTable:
        """Do as `merge` does, for few changes: chunk indices to hashes of 32 bytes, or None for a hole."""
        data = {index: hash_ for index, hash_ in changes.items() if hash_ is not None}
        for index, hash_ in data.items():
            if len(hash_) != HASH_BYTES:
                raise InvalidArgument(f"the hash of chunk {index} has {len(hash_)} bytes, not {HASH_BYTES}")
        hashes = np.frombuffer(b"".join(data.values()), np.uint8)
        holes = [index for index, hash_ in changes.items() if hash_ is None]
        return self.merge(list(data), hashes, holes, size=size)

    def _check_growth(self, size: int, changed: Indices) -> None:
        if size < self.size:
            raise InvalidArgument(f"a chunked file cannot shrink from {self.size} to {size} bytes")
        last = self.chunk_count - 1
        grows_last = size > self.size and self.size % self.chunk_size and self.row_of(last) is not None
        if grows_last and last not in changed:
            raise InvalidArgument(f"chunk {last} grew with its file, so its digest must be given anew")

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same content with the same chunks."""
        if not isinstance(other, ChunkTable):
            return NotImplemented
        mine = (self.size, self.chunk_size, self.function)
        return (
            mine == (other.size, other.chunk_size, other.function)
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.hashes, other.hashes)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"ChunkTable(size={self.size}, chunk_size={self.chunk_size}, function={self.function.name}, "
            f"{self.stored_count} of {self.chunk_count} chunks stored)"
        )


def check_geometry(size: int, chunk_size: int) -> None:
    """InvalidArgument unless a file of `size` bytes can be cut into chunks of `chunk_size` bytes."""
    if not MIN_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise InvalidArgument(
            f"chunk size {chunk_size} is not a power of two of {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE} bytes"
        )
    if not 0 <= size <= MAX_BLOB_BYTES:
        raise InvalidArgument(f"file size {size} is out of range")
    if -(-size // chunk_size) > MAX_CHUNKS:
        raise InvalidArgument(
            f"a file of {size} bytes has over {MAX_CHUNKS} chunks of {chunk_size} bytes: use larger chunks"
        )
