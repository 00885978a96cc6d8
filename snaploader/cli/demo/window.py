"""debugfs reads out of an image that is not there yet.

debugfs opens a file, not a store, and a kernel file system in between (FUSE, NBD) is not part of this
package. So the demo gives it a window: a sparse file as long as the image, into which blocks are
copied from the lazy store just before debugfs needs them. Which ones it needs, debugfs itself says
from those that are there already: the superblock tells where the descriptors lie, the descriptors
where an inode lies, the inode where its folder lies, and so on down the path. Nothing is known
beforehand, and what debugfs reads in the end has all come through the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cow import COWStore
from snaploader.cli.demo import ext4

SUPERBLOCK_BYTES = 4096
"""The superblock lies 1024 bytes into the image and is 1024 bytes long, whatever the block size."""


class Window:
    """A sparse file with those blocks of a store that were needed."""

    def __init__(self, store: COWStore, path: Path) -> None:
        self._store = store
        self._path = path
        with path.open("xb") as file:
            file.truncate(store.size)
        self._copy(0, SUPERBLOCK_BYTES)
        layout = ext4.layout(path)
        self.block_size = layout.block_size
        self._present: set[int] = set()
        self.load(layout.descriptor_blocks)

    @property
    def loaded_bytes(self) -> int:
        """What was copied from the store so far."""
        return len(self._present) * self.block_size

    def load(self, blocks: Iterable[int]) -> None:
        """Copy blocks that are not there yet."""
        for block in sorted(set(blocks) - self._present):
            self._copy(block * self.block_size, self.block_size)
            self._present.add(block)

    def read_file(self, name: str) -> bytes:
        """The content of the file `name`, read by debugfs."""
        self._walk(name)
        return ext4.read_file(self._path, name)

    def first_block(self, name: str) -> int:
        """The block in which the file `name` begins."""
        self._walk(name)
        return ext4.first_block(self._path, name)

    def _walk(self, name: str) -> None:
        """Load what leads to a file, from the root folder on, and the file."""
        parts = name.strip("/").split("/")
        for depth in range(len(parts) + 1):
            place = "/" + "/".join(parts[:depth])
            self.load([ext4.inode_block(self._path, place)])
            self.load(ext4.file_blocks(self._path, place))

    def _copy(self, offset: int, size: int) -> None:
        data = self._store.read_at(offset, min(size, self._store.size - offset))
        with self._path.open("r+b") as file:
            os.pwrite(file.fileno(), data, offset)
