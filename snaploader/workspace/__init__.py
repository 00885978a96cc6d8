"""Long-lived sandboxes whose state is kept as snapshots: versions, rollback, pause, commit, fork, lifecycle.

Needs the extra `workspace`. Everything here stands on `snaploader.loader`, which knows nothing of it.
"""
