"""Long-lived sandboxes whose state is kept as snapshots: versions, rollback, pause, commit, fork, lifecycle.

    with (
        FileCache("/var/cache/snaploader") as file_cache,
        SnapshotLoader(file_cache) as loader,
        Catalog.open("/var/lib/snaploader/catalog.db") as catalog,
        ProcessRuntime("/var/lib/snaploader/runtime") as runtime,
        WorkspaceManager(catalog, loader, file_cache, runtime, "/var/lib/snaploader") as manager,
    ):
        manager.recover()
        workspace = manager.create(command=["my-agent"], volumes=[Volume("home", "/home/agent")])
        version = manager.create_version(workspace.id)
        manager.rollback(workspace.id, version.version)

docs/workspaces.md says what each operation does. Needs the extra `workspace`; `snaploader.workspace.testing`
has a runtime without processes. Everything here stands on `snaploader.loader`, which knows nothing of it.
"""

from snaploader._lazy import attach as _attach

__getattr__, __dir__ = _attach(__name__, globals(), "workspace")
