"""Brings a machine's state back in milliseconds: lazy copy-on-write snapshots over the Remote Execution API.

    with FileCache("/var/cache/snaploader") as file_cache, SnapshotLoader(file_cache) as loader:
        keys = loader.snapshot_key_set(task, configuration_hash)
        with loader.unpack_snapshot(loader.get_snapshot(keys), "/run/vm") as unpacked:
            unpacked.chunked_files["disk"].read_at(0, 4096)

See the README for a tour, `snaploader.errors` for what is raised, `snaploader.testing` for a server to
test against, and `cow` for the stores.
"""

from snaploader._lazy import attach as _attach

__getattr__, __dir__ = _attach(__name__, globals())
