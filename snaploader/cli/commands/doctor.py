"""`snaploader doctor`."""

from __future__ import annotations

import dataclasses

import click

from snaploader.cli.doctor.check import Result, Status, run_checks
from snaploader.cli.doctor.conformance import run_conformance
from snaploader.cli.doctor.local import local_checks, local_remedy
from snaploader.cli.doctor.remote import remote_checks, remote_remedy
from snaploader.cli.doctor.workspaces import check_workspaces
from snaploader.cli.exits import CheckFailed
from snaploader.cli.options import Command, option, with_workspaces
from snaploader.cli.session import Session
from snaploader.cli.values import format_time
from snaploader.cli.workspaces import Workspaces


@click.command(short_help="Exercise the caches and say what is wrong.", cls=Command)
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
    session = workspaces.session
    results = run_checks("cache", local_checks(session.settings), local_remedy)
    remote = session.remote_cache
    if remote is not None:
        results += run_checks("remote", remote_checks(remote), remote_remedy)
        if conformance:
            results += run_conformance(session.settings)
    else:
        session.output.talk("no --remote-cache is configured, so none is checked")
    if workspaces.settings.has_catalog:
        results += check_workspaces(workspaces)
    _print(session, results)
    failed = [result for result in results if result.status is Status.FAILED]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(results)} checks failed")


def _print(session: Session, results: list[Result]) -> None:
    output = session.output
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
