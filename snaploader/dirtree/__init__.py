"""Directory trees: what a directory held, as entries in memory and as a Remote Execution API Tree.

    tree = DirectoryTree({"": DirectoryEntry(0o755), "etc": DirectoryEntry(0o755), ...}, function)
    decode_directory_tree(encode_directory_tree(tree), function) == tree

docs/formats/directories.md describes the format.
"""

from snaploader.dirtree.decode import decode_directory_tree
from snaploader.dirtree.encode import child_directories, encode_directory_tree
from snaploader.dirtree.entries import (
    MAX_DECODED_BYTES,
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_PATH_BYTES,
    MAX_TARGET_BYTES,
    ChunkedEntry,
    DirectoryEntry,
    Entry,
    FileEntry,
    SymlinkEntry,
    check_entry_count,
)
from snaploader.dirtree.model import DirectoryTree

__all__ = [
    "MAX_DECODED_BYTES",
    "MAX_DEPTH",
    "MAX_ENTRIES",
    "MAX_PATH_BYTES",
    "MAX_TARGET_BYTES",
    "ChunkedEntry",
    "DirectoryEntry",
    "DirectoryTree",
    "Entry",
    "FileEntry",
    "SymlinkEntry",
    "check_entry_count",
    "child_directories",
    "decode_directory_tree",
    "encode_directory_tree",
]
