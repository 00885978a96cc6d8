"""Does all that is kept of workspaces agree? Nothing is changed but the schema of an older catalog."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from snaploader.cli.doctor.check import Check, Finding, Result, Status, run_checks
from snaploader.cli.workspaces import Workspaces

if TYPE_CHECKING:
    from snaploader.workspace import check

AREA = "workspaces"

_RECOVER = "`snaploader workspace recover` repairs it, on this host"
_UNKNOWN = (
    "recovery leaves alone what the catalog does not know: see whether --catalog is the right one. If so, "
    "remove it from --state-dir; `snaploader cache unpin` lets go of a pin"
)
_REMEDIES = {
    "unmanaged": _UNKNOWN,
    "incomplete": (
        "`snaploader cache verify` tells what is damaged; a snapshot in the remote cache is fetched from "
        "there; roll back to another version, or delete the workspace"
    ),
    "process": (
        "`snaploader workspace recover` starts again, on this host, what the catalog says is running, also a "
        "command that has ended by itself, and stops the rest; to leave one ended, "
        "`snaploader workspace stop` it"
    ),
    "unpinned": "`snaploader workspace recover`; take a new version, and delete the workspace if that fails",
}


def check_workspaces(workspaces: Workspaces) -> list[Result]:
    """Look at the catalog, and whether it agrees with what is here; a result for each thing that is wrong."""
    found: list[check.Finding] = []

    def agreement() -> Finding:
        from snaploader.workspace.check import check

        found.extend(check(workspaces.manager))
        if found:
            things = "1 thing is" if len(found) == 1 else f"{len(found)} things are"
            return Finding(f"{things} wrong, listed below", Status.FAILED)
        return Finding("catalog, snapshots, slots and what runs agree")

    checks = [
        Check(
            "catalog",
            lambda: _catalog(workspaces),
            "see whether --catalog and --state-dir are right, and the database can be reached",
            needed=True,
        ),
        Check("agreement", agreement, "see whether the folders of --state-dir and --cache-dir can be read"),
    ]
    results = run_checks(AREA, checks)
    return results + [
        Result(
            AREA,
            f"{finding.kind} of {finding.workspace_id}" if finding.workspace_id else str(finding.kind),
            Status.FAILED,
            finding.detail,
            _remedy(finding),
            0.0,
        )
        for finding in found
    ]


def _remedy(finding: check.Finding) -> str:
    return _REMEDIES.get(finding.kind, _RECOVER) if finding.is_known else _UNKNOWN


def _catalog(workspaces: Workspaces) -> Finding:
    catalog = workspaces.catalog
    with catalog.reading() as reader:
        states = Counter(str(each.state) for each in reader.workspaces(host=workspaces.manager.host))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return Finding(f"{catalog.url}: {counts or 'no workspaces'}")
