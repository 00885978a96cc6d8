"""What is stored and sent, as bytes and in memory. Pure: nothing here reads a file or a network.

- `manifest`: a snapshot's manifest, which is a Remote Execution API ActionResult
- `chunktable`: the chunks of one file, and the digest of each
- `chunktree`: a chunk table as a Remote Execution API Tree
- `dirtree`: a directory in memory: paths, and what stands at each
- `dirtreecodec`: a directory as a Remote Execution API Tree
- `digests`: many digests as arrays
- `wire`: protobuf's wire format, for messages that are too large to parse whole
"""
