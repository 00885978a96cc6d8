"""What is stored and sent, as bytes and in memory. Pure: nothing here reads a file or a network.

- `manifest`: a snapshot's manifest, which is a Remote Execution API ActionResult
- `chunktable`: the chunks of one file, and the digest of each; as a chunk tree
- `dirtree`: a directory: paths, and what stands at each; as a Remote Execution API Tree
- `digests`: many digests as arrays; fields of messages that are too large to parse whole
"""
