"""`snaploader doctor`: are the caches fit for use, and does all that is kept of workspaces agree?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snaploader.cli.commands import Command, option
from snaploader.cli.doctor_checks import (
    Check,
    Finding,
    Result,
    Status,
    local_checks,
    local_remedy,
    remote_checks,
    remote_remedy,
    run_checks,
)
from snaploader.cli.exits import CheckFailed
from snaploader.cli.options import with_workspaces
from snaploader.cli.resources import Caches, Settings, Workspaces, read_secret
from snaploader.cli.values import format_time
from snaploader.errors import InvalidArgument, translate_os_errors

if TYPE_CHECKING:
    from snaploader.testing import conformance
    from snaploader.workspace import check

_AREA = "workspaces"
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

_STATUS = {"PASSED": Status.OK, "FAILED": Status.FAILED, "SKIPPED": Status.SKIPPED}
"""By the outcome of a check of the conformance suite."""
_DEVIATES = "the server deviates from the Remote Execution API; see whether a newer version does"


@click.command(cls=Command)
@option(
    "--conformance",
    scope="doctor",
    is_flag=True,
    help="Also run the conformance suite against the server (leaves about 60 MiB of random blobs there).",
)
@with_workspaces
def doctor(workspaces: Workspaces, conformance: bool) -> None:
    """Exercise the cache folder and the remote cache; say what is wrong and what to do.

    Where there is a catalog of workspaces, it is compared with what is on this host. Ends with exit code 13
    when something is wrong. Warnings are not.
    """
    caches = workspaces.caches
    results = run_checks("cache", local_checks(caches.settings), local_remedy)
    remote = caches.remote_cache
    if remote is not None:
        results += run_checks("remote", remote_checks(remote), remote_remedy)
        if conformance:
            results += run_conformance(caches.settings)
    else:
        caches.output.talk("no --remote-cache is configured, so none is checked")
    if workspaces.settings.has_catalog:
        results += check_workspaces(workspaces)
    _print(caches, results)
    failed = [result for result in results if result.status is Status.FAILED]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(results)} checks failed")


def _print(caches: Caches, results: list[Result]) -> None:
    output = caches.output
    output.json(
        {
            "checks": [{**dataclasses.asdict(result), "status": str(result.status)} for result in results],
            "passed": all(result.status is not Status.FAILED for result in results),
        }
    )
    output.table(
        ["", "check", "time>", "found"],
        [
            [str(result.status), f"{result.area}: {result.name}", format_time(result.seconds), result.detail]
            for result in results
        ],
    )
    for result in results:
        if result.remedy:
            output.text()
            output.text(f"{result.area}: {result.name} ({result.status})")
            output.text(f"  {result.detail}")
            output.text(f"  → {result.remedy}")


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
    results = run_checks(_AREA, checks)
    return results + [
        Result(
            _AREA,
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


def run_conformance(settings: Settings) -> list[Result]:
    """The result of every check. InvalidArgument when an option is set that the suite does not know."""
    from snaploader.testing import conformance

    with _endpoint(settings) as endpoint:
        return [_result(result) for result in conformance.run(endpoint)]


def _result(result: conformance.CheckResult) -> Result:
    status = _STATUS[result.outcome.name]
    remedy = _DEVIATES if status is Status.FAILED else ""
    name = result.name.replace("_", " ")
    return Result("conformance", name, status, result.detail, remedy, result.elapsed_s)


@contextlib.contextmanager
def _endpoint(settings: Settings) -> Iterator[conformance.Endpoint]:
    if settings.tls_server_name:
        raise InvalidArgument(
            "--conformance works without --tls-server-name: name the server in --remote-cache as its "
            "certificate does"
        )
    from snaploader.remote.auth import make_credentials
    from snaploader.remote.config import parse_endpoint
    from snaploader.testing import conformance

    server = parse_endpoint(settings.remote_cache)
    credentials = make_credentials(
        server,
        bearer_token=read_secret(settings.bearer_token_file),
        credential_helper=settings.credential_helper,
        netrc_file=settings.netrc,
        helper_timeout_s=settings.remote_timeout,
    )
    headers: list[tuple[str, str | bytes]] = [(name.lower(), value) for name, value in settings.remote_header]
    if credentials is not None:
        headers += credentials.headers()  # once: the suite is over before they expire
    with conformance.Endpoint(
        settings.remote_cache,
        instance_name=settings.remote_instance_name,
        headers=headers,
        root_certificates=_pem(settings.tls_certificate),
        client_certificate=_pem(settings.tls_client_certificate),
        client_key=_pem(settings.tls_client_key),
        timeout_s=settings.remote_timeout,
    ) as endpoint:
        yield endpoint


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with translate_os_errors(f"cannot read {str(path)!r}"):
        return path.read_bytes()
